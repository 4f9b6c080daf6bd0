"""Formats of quantised weights, and plain functions that make them."""
