"""Compact models kept on disk, so that a recurring task needs no second sweep.

A sweep reads the dense model layer by layer (:mod:`ifp_mlx.model.sweep`). An entry is a
folder with the mask and the FFN channels of a compact model; everything else of it is
read from the large model's own folder. When all entries together are too large, those
unused for longest are deleted.
"""

import hashlib
import json
import os
import re
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ..files.atomic import new_folder
from ..files.caches import cache_place
from ..files.progress import ProgressBar
from ..selection.masks import Selection
from ..slicing.sliced import count_units, follow, note_units, sliced_names
from ..storage.layout import CHANNEL_FILE
from .agreement import check_agreement
from .checkpoint import Compact, IFPModel
from .decision import Decision

LIMIT_BYTES = 32 << 30
MASK, CHANNELS = "mask.safetensors", "channels.safetensors"
ENTRY_VERSION = 3


def prepare_once(
    model: IFPModel, decision: Decision, cache: "CompactCache", progress: ProgressBar
) -> Compact:
    """Return what was decided on from the cache, or make it and keep it.

    No KV cache goes with it: an answer must not depend on what was kept.

    Args:
        model: the large model.
        decision: what to select and load.
        cache: where it is looked for, and kept.
        progress: wraps the iterations over calibration texts and over layers.
    """
    start = time.perf_counter()
    if decision.selector in ("prior", "blend"):
        model.known_prior(progress)  # a part of the key
    key = cache.key(model, decision)
    found = cache.load(model, key)
    if found is not None:
        check_agreement(found[0], decision.least)
        return Compact(*found, load=time.perf_counter() - start, cache="hit")
    made = model.prepare(decision, progress=progress)
    cache.save(key, model, made.selection, made.model)
    spent = time.perf_counter() - start
    return Compact(made.selection, made.model, select=spent, cache="miss")


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

    def key(self, model: IFPModel, decision: Decision) -> str:
        """Return a selection's key: a hash of the model's files, the tokens that
        select, and what was decided.

        A model that was copied elsewhere, and so has new file times, counts as another
        one: that costs a sweep, but a mix of two models would answer nonsense.
        """
        seed = decision.request.seed
        about = {
            "version": ENTRY_VERSION,
            "config": model.config,
            "ifp": asdict(model.ifp),
            "files": _stamps(model.path),
            "adapter": model.adapter,
            "tokens": decision.tokens,
            "selector": decision.selector,
            "sizes": decision.sizes,
            "granularity": decision.granularity,
            "compensate": decision.compensate,
            "seed": seed if decision.selector == "random" else None,
        }
        digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
        digest.update(np.array(model.fingerprint.view(mx.uint16)).tobytes())
        if decision.selector in ("prior", "blend") and model.prior is not None:
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
            model.check_fits(selection)
            compact = _filled(model, selection, entry / CHANNELS)
        except (KeyError, OSError, RuntimeError, ValueError):
            shutil.rmtree(entry, ignore_errors=True)
            return None
        mx.eval(compact.parameters())
        os.utime(entry)
        return selection, compact

    def save(
        self, key: str, model: IFPModel, selection: Selection, compact: nn.Module
    ) -> None:
        """Keep a compact model; where the folder cannot be written, nothing is kept.

        Entries unused for longest are deleted until the rest is small enough.
        """
        arrays = tree_flatten(compact.parameters(), destination={})
        names = sum(sliced_names(compact, model.plan), [])
        try:
            with new_folder(self.folder / key) as scratch:
                selection.save(scratch / MASK)
                mx.save_safetensors(
                    str(scratch / CHANNELS), {name: arrays[name] for name in names}
                )
        except OSError:  # full, not writable, or another was quicker
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


def _filled(model: IFPModel, selection: Selection, file: Path) -> nn.Module:
    """Return the compact model whose units are in a file, and check that they are."""
    weights = cast(dict[str, mx.array], mx.load(str(file)))
    compact = model.source.open()
    modules = model.plan.modules(compact)
    names = sum(sliced_names(compact, model.plan), [])
    compact.update(tree_unflatten([(name, weights[name]) for name in names]))
    for layer, module, k in zip(
        model.plan.layers, modules, selection.sizes, strict=True
    ):
        if count_units(module, layer) != k:
            raise ValueError(f"{layer.path} does not have {k} units")
        follow(module, layer, k)
        mx.eval(module.parameters())
    note_units(compact, model.plan)
    return compact


def _size(folder: Path) -> int:
    return sum(_state(file, "st_size") for file in folder.glob("*"))


def _last_use(folder: Path) -> int:
    return _state(folder, "st_mtime_ns")


def _state(path: Path, name: str) -> int:
    try:
        return getattr(path.stat(), name)
    except FileNotFoundError:  # another process deleted it meanwhile
        return 0
