"""Export a compact model to Core ML: ``ifp_mlx to-coreml``, from a clone."""

from ifp_mlx.convert.to_coreml import main

main()
