"""Core AI, experimental."""
