"""A conversation on a terminal: what is typed, what is shown, and what stops it."""
