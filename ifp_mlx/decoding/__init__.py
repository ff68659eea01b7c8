"""How an answer's tokens are chosen, where it ends, and how its KV cache is kept."""
