"""Converters into and out of MLX model folders: scripts, and importable."""
