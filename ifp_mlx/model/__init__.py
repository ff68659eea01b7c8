"""A checkpoint: decided, selected from, made compact, generated with."""
