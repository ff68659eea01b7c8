"""From an instruction and some memory to a compact model: what fits, swept once."""

from dataclasses import replace
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..selection.masks import Selection
from ..selection.prompts import Prompt
from ..slicing.reading import FFN_STEP, PREFILL_STEP
from .checkpoint import IFPModel, Progress
from .compact_cache import CompactCache
from .decision import decide
from .footprint import Footprint, in_words, physical_memory

# Arrays [T, F] that are in memory at once while an FFN is read in float32; in 16 bits
# it is the room of 3.6.
READ_FLOATS = 5


DOWN_FLOATS = 2  # arrays [D, F], in float32 too, while one is compensated


CACHE_STEP = 256  # tokens by which mlx-lm lengthens its caches


def fit(
    model: IFPModel,
    options: dict[str, Any],
    selection: Selection | None,
    memory_bytes: int,
    context: int,
    reading: int = 0,
    *,
    compensate: bool = False,
) -> None:
    """Choose how many channels fit into some memory, before anything is loaded.

    Args:
        model: the large model.
        options: of :meth:`IFPModel.select`; gets the largest ``target_size`` that
            fits, unless it says how many channels to keep.
        selection: that is to be used, or ``None``.
        memory_bytes: for compact model, KV cache and predictor, and for the dense
            layer and its activations that a sweep holds above them.
        context: tokens of prompt and answer.
        reading: tokens that the dense model reads in a sweep, if there is one.
        compensate: whether it compensates.

    Raises:
        ValueError: if what was asked for does not fit, or nothing does.
    """
    footprint = Footprint.of(model)
    chosen = decide(model, **options) if selection is None else None
    if chosen and chosen.selector in ("prior", "blend") and model.prior is None:
        _check_dense(model, footprint, chosen.selector, memory_bytes)
    if compensate or (chosen and chosen.reads):
        passing = _passing_bytes(model, footprint, context, reading, compensate)
        footprint = replace(footprint, passing_bytes=passing)
    if chosen is None:
        assert selection is not None
        footprint.check_fits(selection, memory_bytes, context)
        return
    if options["keep"] is not None or options["target_size"] is not None:
        footprint.check_fits(chosen.sizes, memory_bytes, context)
        return

    def sizes(k: int) -> list[int]:
        return decide(model, **options | {"target_size": k}).sizes

    options["target_size"] = footprint.largest_size(memory_bytes, context, sizes)


def _passing_bytes(
    model: IFPModel, footprint: Footprint, context: int, reading: int, compensate: bool
) -> int:
    """Return what a sweep has in memory above the compact model for a while."""
    layer = round(max(footprint.layer_bytes) * model.channels)
    floats = READ_FLOATS * min(reading, FFN_STEP) * model.channels
    if compensate:
        floats += min(reading, PREFILL_STEP) * model.channels
        floats += DOWN_FLOATS * model.channels * footprint.hidden_size
    rounded = -(-context // CACHE_STEP) * CACHE_STEP
    spare = footprint.kv_bytes(rounded) - footprint.kv_bytes(context)
    return layer + floats * mx.float32.size + spare


def _check_dense(
    model: IFPModel, footprint: Footprint, selector: str, memory_bytes: int
) -> None:
    """Refuse to compute the prior where the dense model, which does it, has no room."""
    if footprint.dense_bytes > memory_bytes:
        raise ValueError(
            f"The selector {selector} needs the prior of {model.path}, which is not "
            f"there; the dense model computes it, with {in_words(footprint.dense_bytes)} "
            f"of weights, and {in_words(memory_bytes)} are allowed; use the selector "
            "activation."
        )


def check_machine(
    model: IFPModel,
    options: dict[str, Any],
    selection: Selection | None,
    context: int,
) -> None:
    """Refuse what this machine's memory cannot hold, before anything is loaded.

    Args:
        model, options, selection, context: see :func:`fit`.

    Raises:
        ValueError: naming what is needed and what would fit.
    """
    sizes = selection or decide(model, **options).sizes
    Footprint.of(model).check_fits(sizes, physical_memory(), context)


class Found(NamedTuple):
    """A selection and its compact model, and whether the cache had them."""

    selection: Selection
    compact: nn.Module
    hit: bool


def sweep_once(
    model: IFPModel,
    instruction: Prompt,
    options: dict[str, Any],
    cache: CompactCache,
    progress: Progress,
) -> Found:
    """Return a selection and its compact model from the cache, or by a sweep, which
    selects and loads at once.

    Args:
        model: the large model.
        instruction: what selects.
        options: of :meth:`IFPModel.sweep`.
        cache: where they are looked for, and kept.
        progress: wraps the iterations over calibration texts and over layers.
    """
    choosing = {name: o for name, o in options.items() if name != "compensate"}
    if decide(model, **choosing).selector in ("prior", "blend"):
        model.known_prior(progress)  # a part of the key
    key = cache.key(model, model.instruction_tokens(instruction), **options)
    found = cache.load(model, key)
    if found is not None:
        return Found(*found, hit=True)
    selection, compact, _ = model.sweep(instruction, **options, progress=progress)
    cache.save(key, selection, compact)
    return Found(selection, compact, hit=False)
