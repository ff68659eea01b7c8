"""What is installed here: whether it works, where it keeps things, how shells complete it.

Nothing here imports MLX, since it is needed when MLX is missing or broken.
"""
