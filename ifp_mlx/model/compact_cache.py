"""Compact models kept on disk, so that a task that comes again is not swept again.

An entry is a folder with the mask and the FFN channels of a compact model; everything
else of it is read from the large model's own folder. Entries that were not used for
longest are deleted when all together are larger than they may be.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..files.atomic import new_folder
from ..files.caches import cache_place
from ..selection.masks import Selection
from ..slicing.pruning import PROJECTIONS, ffn_layers, note_width
from ..storage.folder import CHANNEL_FILE
from .checkpoint import IFPModel
from .decision import decide

LIMIT_BYTES = 32 << 30


MASK, CHANNELS = "mask.safetensors", "channels.safetensors"


class CompactCache:
    """Compact models by what they were selected for.

    Args:
        folder: where entries are; default: in the user's cache folder.
        limit_bytes: of all entries together; the newest one stays in any case.
    """

    def __init__(
        self, folder: Path | None = None, limit_bytes: int = LIMIT_BYTES
    ) -> None:
        self.folder = folder or cache_place("compact")
        self.limit_bytes = limit_bytes

    def key(self, model: IFPModel, tokens: Sequence[int], **options: Any) -> str:
        """Return what tells a selection from all others: the model's files, the tokens
        that select, and what is decided of the arguments of :meth:`IFPModel.sweep`.

        A model that was copied elsewhere with new times is another one: that costs a
        sweep, where a mix of two models would answer nonsense.
        """
        seed, compensate = options.get("seed", 0), options.pop("compensate", False)
        choice = decide(model, **options)
        about = {
            "config": model.config,
            "ifp": asdict(model.ifp),
            "files": _stamps(model.path),
            "tokens": list(tokens),
            "choice": asdict(choice),
            "compensate": compensate,
            "seed": seed if choice.selector == "random" else None,
        }
        digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
        digest.update(np.array(model.fingerprint.view(mx.uint16)).tobytes())
        if choice.selector in ("prior", "blend") and model.prior is not None:
            digest.update(np.array(model.prior).tobytes())
        return digest.hexdigest()[:32]

    def load(self, model: IFPModel, key: str) -> tuple[Selection, nn.Module] | None:
        """Return a selection and its compact model, or ``None``.

        An entry that cannot be used is deleted.
        """
        entry = self.folder / key
        if not entry.is_dir():
            return None
        try:
            selection = Selection.load(entry / MASK)
            selection.check_fits(model.layers, model.channels, model.fingerprint)
            weights = cast(dict[str, mx.array], mx.load(str(entry / CHANNELS)))
            compact = model.source.open()
            for layer, ffn in enumerate(ffn_layers(compact)):
                _put(ffn.module, layer, weights, selection.sizes[layer])
        except (KeyError, OSError, RuntimeError, ValueError):
            shutil.rmtree(entry, ignore_errors=True)
            return None
        note_width(compact)
        mx.eval(compact.parameters())
        os.utime(entry)
        return selection, compact

    def save(self, key: str, selection: Selection, compact: nn.Module) -> None:
        """Keep a compact model; where the folder cannot be written, nothing is kept.

        Entries that were not used for longest go, until the rest is small enough.
        """
        weights = {
            f"{layer}.{projection}.{name}": array
            for layer, ffn in enumerate(ffn_layers(compact))
            for projection in PROJECTIONS
            for name, array in ffn.module[projection].parameters().items()
        }
        try:
            with new_folder(self.folder / key) as scratch:
                selection.save(scratch / MASK)
                mx.save_safetensors(str(scratch / CHANNELS), weights)
        except (OSError, RuntimeError):  # full, not writable, or another was quicker
            return
        self._trim(key)

    def _trim(self, newest: str) -> None:
        # The folder may be one of the user's: only what is surely ours is deleted.
        entries = [
            e for e in self.folder.iterdir() if _is_entry(e) and e.name != newest
        ]
        entries.sort(key=_last_use, reverse=True)
        used = _size(self.folder / newest)
        for entry in entries:
            used += _size(entry)
            if used > self.limit_bytes:
                shutil.rmtree(entry, ignore_errors=True)


def _is_entry(folder: Path) -> bool:
    """Whether a folder was made by :meth:`CompactCache.save`."""
    named = re.fullmatch(r"[0-9a-f]{32}", folder.name) is not None
    return named and {file.name for file in folder.glob("*")} == {MASK, CHANNELS}


def _stamps(model: Path) -> list[tuple[str, int, int]]:
    """Return the name, size and time of change of each file that holds weights."""
    patterns = ("model*.safetensors", CHANNEL_FILE, "predictor/*.safetensors")
    files = sorted(file for pattern in patterns for file in model.glob(pattern))
    states = [(str(file.relative_to(model)), file.stat()) for file in files]
    return [(name, state.st_size, state.st_mtime_ns) for name, state in states]


def _put(ffn: nn.Module, layer: int, weights: dict[str, mx.array], k: int) -> None:
    """Give an FFN its channels, and check that there are ``k``."""
    for projection in PROJECTIONS:
        for name in ffn[projection].parameters():
            ffn[projection][name] = weights[f"{layer}.{projection}.{name}"]
    if ffn.gate_proj.weight.shape[0] != k:
        raise ValueError(f"layer {layer} does not have {k} channels")
    mx.eval(ffn.parameters())


def _size(folder: Path) -> int:
    return sum(_state(file, "st_size") for file in folder.glob("*"))


def _last_use(folder: Path) -> int:
    return _state(folder, "st_mtime_ns")


def _state(path: Path, name: str) -> int:
    try:
        return getattr(path.stat(), name)
    except FileNotFoundError:  # another process deleted it meanwhile
        return 0
