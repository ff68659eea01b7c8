"""A conversation in a terminal: its input, its output, and how it is stopped."""
