"""Export a compact model to Core ML, for an iPhone or a Mac.

    python examples/core_ml.py [MODEL] [OUT.mlpackage]

The export works on Linux too; running the package needs a Mac. An interpreter of our
own first compares the saved package with MLX. Expect its size, the error of its logits,
and the same greedy tokens.
"""

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

from ifp_mlx import load

QUESTION = "What is Germany called in French?"
EXPORT = Path(__file__).parent.parent / "convert" / "to_coreml.py"

if importlib.util.find_spec("coremltools") is None:
    sys.exit("Core ML needs coremltools; run pip install '.[coreml]' first.")
model, _ = load(*sys.argv[1:2])
with tempfile.TemporaryDirectory() as folder:
    out = Path(sys.argv[2] if len(sys.argv) > 2 else Path(folder) / "out.mlpackage")
    command = [sys.executable, str(EXPORT), "--model", str(model.path)]
    command += ["--instruction", QUESTION, "--output", str(out)]
    command += [] if model.predictor else ["--keep", "0.75"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{out.name}: {size / 1e6:.1f} MB")
print("Running it needs a Mac: examples/apps/swift has a program for it.")
