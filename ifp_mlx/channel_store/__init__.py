"""A model whose FFN lies channel by channel on disk, so that a few can be read."""
