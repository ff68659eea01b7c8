"""What fits into the memory there is, before anything is loaded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from ..slicing.reading import FFN_STEP
from ..slicing.stock import PREFILL_STEP
from .agreement import PLACES
from .decision import Decision
from .footprint import Footprint, physical_memory

DOWN_FLOATS = 2  # arrays [D, F], in float32 too, while one is compensated
SAID_FLOATS = 3  # arrays [n, V] while dense and compact model are compared
CACHE_STEP = 256  # tokens by which mlx-lm lengthens its caches


@dataclass(frozen=True)
class Limits:
    """What a generation may take.

    Attributes:
        context: tokens of prompt and answer.
        memory_bytes: for compact model, KV cache and predictor, and for the dense
            layer and its activations that a sweep holds above them; ``None`` is what
            this machine has.
    """

    context: int
    memory_bytes: int | None = None


def check_fits(model: Any, decision: Decision, limits: Limits) -> None:
    """Refuse what does not fit, before anything is loaded.

    Args:
        model: an :class:`ifp_mlx.model.checkpoint.IFPModel`.
        decision: what is to be loaded.
        limits: what it may take.

    Raises:
        ValueError: naming what is needed and what would fit.
    """
    if limits.memory_bytes is None:
        memory, footprint = physical_memory(), model.footprint
    else:
        memory = limits.memory_bytes
        footprint = _in_passing(model, decision, limits)
    footprint.check_fits(decision.sizes, memory, limits.context)


def fitting_size(
    model: Any,
    decision: Decision,
    limits: Limits,
    sizes: Callable[[int], Sequence[int]],
    step: int,
) -> int:
    """Return the largest ``k`` that fits into a limit of memory.

    Args:
        model: an :class:`ifp_mlx.model.checkpoint.IFPModel`.
        decision: what is asked for, of any size.
        limits: what it may take.
        sizes: the units of every layer for a ``k``.
        step: of which ``k`` is to be a multiple.

    Raises:
        ValueError: if nothing fits.
    """
    assert limits.memory_bytes is not None
    footprint = replace(_in_passing(model, decision, limits), granularity=step)
    return footprint.largest_size(limits.memory_bytes, limits.context, sizes)


def _in_passing(model: Any, decision: Decision, limits: Limits) -> Footprint:
    """Return the model's footprint with what a sweep has in memory for a while."""
    footprint: Footprint = model.footprint
    reading, channels = len(decision.tokens), footprint.channels
    if decision.selector in ("prior", "blend") and model.prior is None:
        reading = PREFILL_STEP  # the calibration text
    elif not (decision.compensate or decision.reads):
        return footprint
    floats = footprint.reading_floats * min(reading, FFN_STEP)
    if decision.compensate:
        floats += min(reading, PREFILL_STEP) * channels
        floats += DOWN_FLOATS * channels * footprint.hidden_size
    rounded = -(-max(limits.context, reading) // CACHE_STEP) * CACHE_STEP
    spare = footprint.kv_bytes(rounded) - footprint.kv_bytes(limits.context)
    layer = round(max(footprint.layer_bytes) * channels)
    passing = layer + floats * mx.float32.size
    if decision.compares:
        said = min(reading, PLACES) * model.vocabulary
        passing = max(passing, SAID_FLOATS * said * mx.float32.size)
    return replace(footprint, passing_bytes=passing + spare)
