"""Into and out of MLX model folders: from PyTorch and GGUF, to Core ML and Core AI.

``ifp_mlx convert`` and ``ifp_mlx to-coreml`` run it where the package is installed; in a
clone ``python convert/from_pytorch.py`` and ``python convert/to_coreml.py`` are the same
two commands.
"""
