"""A chat app whose model keeps only the channels that its task needs."""
