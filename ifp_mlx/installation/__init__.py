"""What is installed here: whether it works, where it keeps things, how shells complete it.

Nothing here imports MLX: this is what one turns to when MLX is missing or broken.
"""
