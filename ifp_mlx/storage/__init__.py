"""Where full weights live, and how parts of them are read."""
