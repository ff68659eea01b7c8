"""The machine, and whether MLX works on it.

MLX is tried in separate processes, since a broken one may end its process.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from ctypes.util import find_library
from typing import Any

from ..files.amounts import in_words, physical_memory
from .findings import Finding, State

SECONDS = 300  # that a trial may take
QUESTION, ANSWER = "What is Germany called in French?", "Allemagne"
GENERATE = ("-m", "ifp_mlx.generate", "--prompt", QUESTION)
# Prints MLX's description of its device, and the libraries that its import loads.
PROBE = """
import json
import mlx.core as mx
float((mx.ones((8, 8)) @ mx.ones((8, 8))).sum())
maps = "/proc/self/maps"
try:
    lines = open(maps).read().splitlines()
except OSError:
    lines = []
files = {line.split()[-1] for line in lines if ".so" in line}
about = {"metal": mx.metal.is_available(), "device": str(mx.default_device())}
print(json.dumps(about | {"info": mx.device_info(), "files": sorted(files)}))
"""


def machine() -> Iterator[Finding]:
    """Yield findings on memory, MLX's device, its BLAS, and a first answer."""
    yield Finding("memory", "ok", in_words(physical_memory()))
    status, out, why = _tried("-c", PROBE)
    if status:
        yield Finding("MLX", "fix", f"cannot be used: {why}", _install())
        return
    about = json.loads(out.splitlines()[-1])
    yield from _device(about)
    if sys.platform == "linux" and "cpu" in about["device"]:
        yield _blas(about["files"])
        yield _compiler()
    status, out, why = _tried(*GENERATE)
    if not status and out.strip() == ANSWER:
        yield Finding("answer", "ok", f"{QUESTION} {ANSWER}, by the shipped model")
    else:
        said = f"the shipped model does not answer: {why or out.strip()!r}"
        yield Finding("answer", "fix", said, f"python {' '.join(GENERATE[:3])} 'Hello'")


def _tried(*arguments: str) -> tuple[int, str, str]:
    """Run Python; return its status, its output, and the last line of its errors."""
    how: dict[str, Any] = {"capture_output": True, "text": True, "timeout": SECONDS}
    try:
        done = subprocess.run([sys.executable, *arguments], check=False, **how)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, "", str(error)
    said = done.stderr.strip().splitlines()
    why = said[-1] if said else f"it ended with status {done.returncode}"
    return done.returncode, done.stdout, why if done.returncode else ""


def _install() -> str:
    extra = "[cpu]" if sys.platform == "linux" else ""
    return f"pip install --force-reinstall 'mlx{extra}'"


def _device(about: dict[str, Any]) -> Iterator[Finding]:
    info = about["info"]
    name = info.get("device_name") or info.get("architecture") or "unknown"
    if not about["metal"]:
        state: State = "note" if sys.platform == "darwin" else "ok"
        yield Finding("device", state, f"{about['device']}, {name}, without Metal")
        return
    most = info.get("max_recommended_working_set_size")
    limit = f", at best {in_words(int(most))} of memory at once" if most else ""
    yield Finding("device", "ok", f"Metal on {name}{limit}")


def _blas(files: list[str]) -> Finding:
    """Return which library multiplies matrices; the one that MLX brings is slow."""
    quick = [file for file in files if "openblas" in file or "libmkl" in file]
    if quick:
        return Finding("BLAS", "ok", f"{quick[0]}, preloaded")
    own = next((f for f in files if "blas" in os.path.basename(f)), "unknown")
    said = f"{own}, MLX's own: it multiplies 20 to 50 times slower than OpenBLAS"
    library = find_library("openblas")
    remedy = f"export LD_PRELOAD={library or 'libopenblas.so.0'}"
    if library is None:
        remedy = f"apt-get install libopenblas0-pthread; {remedy}"
    return Finding("BLAS", "note", said, remedy)


def _compiler() -> Finding:
    """Return whether MLX compiles: on a CPU it calls g++ for each new kernel."""
    if os.environ.get("MLX_DISABLE_COMPILE"):
        return Finding("g++", "ok", "not used: MLX_DISABLE_COMPILE is set")
    if path := shutil.which("g++"):
        said = f"{path}; MLX calls it for each new kernel, which takes seconds"
        return Finding("g++", "ok", said)
    said = "is missing: MLX computes without compiling, a little slower"
    return Finding("g++", "note", said, "apt-get install g++")
