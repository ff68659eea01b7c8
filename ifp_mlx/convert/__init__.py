"""Into and out of MLX model folders: from PyTorch and GGUF, to Core ML and Core AI.

The commands are ``ifp_mlx convert`` and ``ifp_mlx to-coreml``; in a clone,
``python convert/from_pytorch.py`` and ``python convert/to_coreml.py`` are the same two.
"""
