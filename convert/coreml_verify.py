"""Compare a saved Core ML package with the MLX model, from a clone."""

from ifp_mlx.convert.coreml_verify import main

main()
