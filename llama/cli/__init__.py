"""The llama command: its words in, its text out."""
