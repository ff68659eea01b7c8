"""Files: how they are written, copied and where they are kept."""
