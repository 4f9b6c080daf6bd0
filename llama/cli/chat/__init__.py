"""A talk with a chat model in a terminal."""
