"""Tokenizers and chat formats of other files than Meta's: which there are, and how each is read."""
