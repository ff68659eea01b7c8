"""Make a model folder from PyTorch or GGUF: ``ifp_mlx convert``, from a clone."""

from ifp_mlx.convert.from_pytorch import main

main()
