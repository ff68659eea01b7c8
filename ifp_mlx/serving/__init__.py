"""What the engine and the server are made of: one thread owns MLX, others get events."""
