"""The trainer's latest state on disk, complete and checked."""

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import cast

import mlx.core as mx

from ..files.atomic import new_folder

TENSORS, ABOUT = "state.safetensors", "state.json"


def save(folder: Path, step: int, tensors: dict[str, mx.array]) -> None:
    """Write the state after a step with its checksum, then delete the older one.

    Only one is kept, since it is large: it holds every trained weight and two moments
    of each.

    Args:
        folder: holds the checkpoints of one run.
        step: steps made.
        tensors: all that a later run needs to go on.
    """
    target = folder / f"step-{step:08d}"
    if target.exists() and _whole(target) is not None:
        return  # the same bits are there already, from the run that this one continues
    shutil.rmtree(target, ignore_errors=True)
    with new_folder(target) as scratch:
        path = scratch / TENSORS
        mx.save_safetensors(str(path), tensors)
        about = {"step": step, "sha256": _digest(path)}
        (scratch / ABOUT).write_text(json.dumps(about) + "\n", encoding="utf-8")
    for old in _checkpoints(folder)[1:]:
        shutil.rmtree(old)


def newest(folder: Path) -> int | None:
    """Return the step of the newest checkpoint, ``None`` without any."""
    found = _checkpoints(folder)
    return int(found[0].name.removeprefix("step-")) if found else None


def load(folder: Path) -> tuple[int, dict[str, mx.array]] | None:
    """Return step and tensors of the newest whole checkpoint, ``None`` without any.

    A damaged one is skipped, with a note on standard error.

    Raises:
        ValueError: if there are checkpoints, but none is whole.
    """
    checkpoints = _checkpoints(folder)
    for path in checkpoints:
        if (found := _whole(path)) is not None:
            return found
    if checkpoints:
        raise ValueError(
            f"None of the {len(checkpoints)} checkpoints in {folder} is whole; delete "
            "the folder to begin again."
        )
    return None


def _whole(path: Path) -> tuple[int, dict[str, mx.array]] | None:
    """Return step and tensors of a checkpoint, ``None`` if it is damaged."""
    try:
        about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
        if _digest(path / TENSORS) != about["sha256"]:
            raise ValueError("its content does not match its checksum")
        loaded = cast(dict[str, mx.array], mx.load(str(path / TENSORS)))
        mx.eval(loaded)  # now, since the file may be gone when a lazy array is read
        return int(about["step"]), loaded
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        print(f"Refused checkpoint {path}: {error}.", file=sys.stderr)
        return None


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints, newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
