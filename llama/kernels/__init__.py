"""Kernels of our own for a CPU, in C, and what PyTorch does where they are missing."""
