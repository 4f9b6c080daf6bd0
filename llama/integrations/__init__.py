"""Adapters to programs of others, each of which is imported only where it is asked for."""
