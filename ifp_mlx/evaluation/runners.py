"""The ways of running a model that a benchmark compares, each timed from nothing.

- dense: the whole model, as mlx_lm runs it;
- compact: the selection costs no dense pass (a mask file, a predictor, a prior);
- activation: the dense model reads the prompt to select by it, in one sweep over its
  layers, as ``ifp_mlx.generate`` does;
- stock: mlx-lm's own class with as many units per layer, weights random: what the
  compact model's speed should be.
"""

import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from ..model.checkpoint import IFPModel
from ..model.decide import decide
from ..model.dense_prefill import read_densely
from ..model.footprint import quantise_as
from ..selection.masks import Selection
from ..selection.request import Request
from ..slicing.stock import build

ROWS = ("dense", "compact", "activation", "stock")
LOADING = ("dense", "compact", "activation")


@dataclass
class Run:
    """One row, run once.

    Attributes:
        select: seconds to the selection; for ``activation``, of the whole sweep, which
            loads too.
        load: seconds to the weights in memory.
        prefill: seconds of the prompt, to the first token.
        decode: seconds from there to the last token.
        peak_bytes: MLX's peak during the run, minus what was there before.
        read_bytes: bytes that the process read while selecting and loading;
            ``None`` where the system does not count them (macOS).
    """

    select: float
    load: float
    prefill: float = 0.0
    decode: float = 0.0
    peak_bytes: int = 0
    read_bytes: int | None = None

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.select + self.load + self.prefill


@dataclass
class Contest:
    """What the rows have in common.

    Attributes:
        model: the large model.
        choose: makes the selection of ``compact``.
        options: fields of the :class:`Request` of ``activation``.
        prompt: token ids; they select for ``activation``.
        max_tokens: tokens to decode; an end of text does not stop it.
        size: ``k``, the units per layer of ``stock``.
    """

    model: IFPModel
    choose: Callable[[], Selection]
    options: dict[str, Any]
    prompt: list[int]
    max_tokens: int
    size: int

    def run(self, row: str, *, cold: bool = False) -> Run:
        """Run a row from nothing in memory.

        Args:
            row: one of ``ROWS``.
            cold: forget the model's files in the system's cache first, and stop once
                the weights are loaded.
        """
        clear()
        if cold:
            forget_files(self.model.path)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        read = bytes_read()
        model, run, kv = self._open(row)
        run.read_bytes = None if read is None else (bytes_read() or 0) - read
        if not cold:
            run.prefill, run.decode = self._generate(model, kv)
        run.peak_bytes = mx.get_peak_memory() - before
        return run

    def _open(self, row: str) -> tuple[nn.Module, Run, list[Any] | None]:
        """Return a row's model, its times so far, and the KV cache that came with
        it.
        """
        start = time.perf_counter()
        if row == "dense":
            model = self.model.dense()
            mx.eval(model.parameters())
            return model, Run(0.0, time.perf_counter() - start), None
        if row == "activation":
            request = Request(instruction=self.prompt, **self.options)
            made = self.model.prepare(decide(request, self.model))
            return made.model, Run(time.perf_counter() - start, 0.0), made.kv
        if row == "stock":
            return stock_of_width(self.model, self.size), Run(0.0, 0.0), None
        selection = self.choose()
        selected = time.perf_counter()
        model = self.model.compact(selection)
        return model, Run(selected - start, time.perf_counter() - selected), None

    def _generate(self, model: nn.Module, kv: list[Any] | None) -> tuple[float, float]:
        """Return seconds to the first token, and from there to the last."""
        from mlx_lm.generate import generate_step

        start = time.perf_counter()
        kv, read, *_ = read_densely(kv, self.prompt, self.prompt, None)
        # One step below the text level: no end-of-sequence token cuts a run short.
        steps = generate_step(
            mx.array(self.prompt[read:]),
            model,
            max_tokens=self.max_tokens,
            prompt_cache=kv if read else None,
        )
        next(steps)
        first = time.perf_counter()
        for _ in steps:
            pass
        return first - start, time.perf_counter() - first


def stock_of_width(model: IFPModel, k: int) -> nn.Module:
    """Return a random model of mlx-lm's own class with ``k`` units per layer."""
    stock = build(model.plan.resized(model.config, k))
    names = tree_flatten(model.source.skeleton.parameters(), destination={})
    if hasattr(stock, "sanitize"):
        stock.sanitize(dict(names))  # as loading does: some classes then tie their head
    dtype = next(w.dtype for name, w in names.items() if name.endswith("norm.weight"))
    stock.update(tree_map(lambda w: w.astype(dtype), stock.parameters()))
    if how := model.config.get("quantization"):
        quantise_as(stock, how)
    mx.eval(stock.parameters())
    return stock


def clear() -> None:
    """Free memory that nothing refers to any more."""
    gc.collect()
    mx.clear_cache()


def bytes_read() -> int | None:
    """Return the bytes this process has asked of files so far, cached or not."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def forget_files(folder: Path) -> None:
    """Drop a folder's files from the system's cache, so that they are read from disk.

    Raises:
        OSError: where a system cannot.
    """
    if not hasattr(os, "posix_fadvise"):
        raise OSError("This system cannot be told to forget files; leave out --cold.")
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
