"""Checkpoints in files: opened, checked, described, loaded and written."""
