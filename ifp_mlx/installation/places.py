"""Where things are kept: caches, free space, and environment variables."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..files.amounts import in_words
from ..files.caches import cache_place
from .findings import Finding

LOW_DISK = 5 * 10**9  # bytes; less is too little for most models
# Variables that change how commands work. For a secret only that it is set.
VARIABLES = (
    "MLX_DISABLE_COMPILE",
    "MLX_METAL_FAST_SYNCH",
    "LD_PRELOAD",
    "OPENBLAS_NUM_THREADS",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "XDG_CACHE_HOME",
    "TMPDIR",
)
SECRETS = ("HF_TOKEN", "IFP_MLX_API_KEY")


def places() -> Iterator[Finding]:
    """Yield findings on caches, disks and the environment."""
    kept = {
        "compact models": cache_place("compact"),
        "cards": cache_place("cards"),
        "device profiles": cache_place("devices"),
        "hub cache": _hub_cache(),
    }
    if sys.platform == "linux":
        kept["MLX's kernels"] = Path(tempfile.gettempdir()) / "mlx"
    for name, place in kept.items():
        yield _cache(name, place)
    said = "in each model's folder: prior.safetensors and ifp_card.json"
    yield Finding("calibration", "ok", said)
    yield from _disks({cache_place("compact"), kept["hub cache"]})
    set_here = [
        f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ
    ]
    set_here += [f"{name} is set" for name in SECRETS if name in os.environ]
    yield Finding("environment", "ok", ", ".join(set_here) or "nothing of note is set")


def _hub_cache() -> Path:
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return Path.home() / ".cache/huggingface/hub"
    return Path(HF_HUB_CACHE)


def _cache(name: str, place: Path) -> Finding:
    if not place.is_dir():
        home = _there(place)
        if home.is_dir() and os.access(home, os.W_OK):
            return Finding(name, "ok", f"{place}, empty")
        said = (
            f"{place} cannot be made: what would be kept there is made again each time"
        )
        return Finding(name, "note", said, f"chmod u+w {home}")
    said = f"{place}, {in_words(_size_of(place))}"
    return Finding(name, "ok", said, f"rm -r {place}    # empties it")


def _disks(folders: set[Path]) -> Iterator[Finding]:
    for home in sorted({_there(folder) for folder in folders}):
        free = shutil.disk_usage(home).free
        low = free < LOW_DISK
        remedy = "empty a cache, or set XDG_CACHE_HOME and HF_HOME" if low else None
        said = f"{in_words(free)} free at {home}"
        yield Finding("disk", "note" if low else "ok", said, remedy)


def _there(place: Path) -> Path:
    """Return the nearest of a path and its parents that exists."""
    return next(home for home in (place, *place.parents) if home.exists())


def _size_of(folder: Path) -> int:
    """Return the bytes of the files in a folder; links count nothing."""
    total = 0
    for home, _, names in os.walk(folder):
        for name in names:
            try:
                found = os.lstat(os.path.join(home, name))
            except OSError:  # it was deleted meanwhile
                continue
            total += 0 if os.path.islink(os.path.join(home, name)) else found.st_size
    return total
