"""What fits into the memory there is, before anything is loaded."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..checking.drift import RECENT
from ..decoding.kv import PLAIN, KVOptions
from ..files.amounts import physical_memory
from ..selection.calibration import CHATS, MOST_TOKENS
from ..slicing import sketch
from ..slicing.compensation import RANK, TOKENS
from ..slicing.reading import FFN_STEP
from ..slicing.stock import PREFILL_STEP
from .agreement import PLACES
from .decision import Decision
from .footprint import Footprint

ROW_FLOATS = 5  # arrays [m, F] in memory while a layer's channels are judged
GRAM_FLOATS = 4  # arrays [m, m] besides
DOWN_FLOATS = 2  # arrays [D, F] in float32 while a down_proj is compensated
SAID_FLOATS = 2  # arrays [2n, V] while dense and compact model are compared
CACHE_STEP = 256  # tokens by which mlx-lm lengthens its caches


@dataclass(frozen=True)
class Limits:
    """What a generation may take.

    Attributes:
        context: tokens of prompt and answer.
        memory_bytes: for compact model, KV cache and predictor, and for the dense
            layer and its activations that a sweep holds above them; ``None`` is what
            this machine has.
        kv: how the KV cache is kept.
    """

    context: int
    memory_bytes: int | None = None
    kv: KVOptions = PLAIN

    def weigh(self, model: Any) -> Footprint:
        """Return the footprint of an :class:`ifp_mlx.model.checkpoint.IFPModel`."""
        footprint: Footprint = model.footprint
        return footprint.keeping(self.kv)


def check_fits(model: Any, decision: Decision, limits: Limits) -> None:
    """Refuse what does not fit, before anything is loaded.

    Args:
        model: an :class:`ifp_mlx.model.checkpoint.IFPModel`.
        decision: what is to be loaded.
        limits: what it may take.

    Raises:
        ValueError: naming what is needed and what would fit.
    """
    memory, footprint = _allowed(model, decision, limits)
    footprint.check_fits(decision.sizes, memory, limits.context)


def fitting_size(
    model: Any,
    decision: Decision,
    limits: Limits,
    sizes: Callable[[int], Sequence[int]],
    step: int,
) -> int:
    """Return the largest ``k`` that fits into a limit of memory, or the memory there is.

    Args:
        model: an :class:`ifp_mlx.model.checkpoint.IFPModel`.
        decision: what is asked for, of any size.
        limits: what it may take.
        sizes: the units of every layer for a ``k``.
        step: ``k`` is a multiple of it.

    Raises:
        ValueError: if nothing fits.
    """
    memory, footprint = _allowed(model, decision, limits)
    footprint = replace(footprint, granularity=step)
    return footprint.largest_size(memory, limits.context, sizes)


def _allowed(model: Any, decision: Decision, limits: Limits) -> tuple[int, Footprint]:
    """Return the bytes that may be taken, and the footprint that has to fit them."""
    if limits.memory_bytes is None:
        return physical_memory(), limits.weigh(model)
    return limits.memory_bytes, _in_passing(model, decision, limits)


def room_beside(model: Any, decision: Decision, limits: Limits) -> int:
    """Return the bytes under a memory limit in which dropped channels can stay."""
    if limits.memory_bytes is None or not decision.checks:
        return 0
    footprint = _in_passing(model, decision, limits)
    needed = footprint.total_bytes(decision.sizes, limits.context)
    return max(0, limits.memory_bytes - needed)


def _in_passing(model: Any, decision: Decision, limits: Limits) -> Footprint:
    """Return the model's footprint, including what is in memory only for a while."""
    swept = _in_sweep(model, decision, limits)
    return in_checks(model, decision, swept) if decision.request.checks else swept


def in_checks(model: Any, decision: Decision, swept: Footprint) -> Footprint:
    """Return a footprint that includes what checking needs: dropped channels of the
    layer being computed and of the next, corrections, inlets that stay whole, and with
    ``reselect="drift"`` the remembered channels.
    """
    units, width = swept.channels, swept.hidden_size
    floats = swept.reading_floats * FFN_STEP
    passing = 2 * round(max(swept.layer_bytes) * units) + floats * mx.float32.size
    swept = replace(swept, passing_bytes=max(swept.passing_bytes, passing))
    if decision.request.reselect == "drift":
        remembered = RECENT * units * swept.layers * mx.float32.size
        swept = replace(swept, core_bytes=swept.core_bytes + remembered)
    if decision.compensate or decision.request.reselect == "drift":
        factors = RANK * (units + width) * swept.layers * mx.float32.size
        swept = replace(swept, core_bytes=swept.core_bytes + factors)
    if not cuts_inlets(model, decision):
        return swept
    inlets = model.plan.inlets(model.source.skeleton)
    sizes = [sum(t.nbytes for _, t in tree_flatten(i.parameters())) for i in inlets]
    pairs = zip(swept.layer_bytes, sizes, strict=True)
    left = tuple(layer - size / units for layer, size in pairs)
    return replace(swept, core_bytes=swept.core_bytes + sum(sizes), layer_bytes=left)


def cuts_inlets(model: Any, decision: Decision) -> bool:
    """Whether a decision cuts quantisation groups of ``down_proj``."""
    if decision.selection is not None:
        return bool(model.cut_layers(decision.selection))
    return decision.granularity % math.lcm(*model.groups) != 0


def _in_sweep(model: Any, decision: Decision, limits: Limits) -> Footprint:
    """Return the model's footprint, including what a sweep has in memory for a
    while.
    """
    footprint = limits.weigh(model)
    reading, channels = len(decision.tokens), footprint.channels
    condensing = 0
    asks = decision.compensate or decision.selector in ("prior", "blend")
    if asks and model.prior is None:
        reading = PREFILL_STEP  # the calibration text
        condensing = CHATS * MOST_TOKENS * channels * mx.float16.size
    elif not (decision.compensate or decision.reads):
        return footprint
    floats = footprint.reading_floats * min(reading, FFN_STEP)
    if decision.compensate:
        floats += min(reading, PREFILL_STEP) * channels
        rows = min(reading, TOKENS) + sketch.RANK
        judging = rows * (ROW_FLOATS * channels + GRAM_FLOATS * rows)
        judging += DOWN_FLOATS * channels * footprint.hidden_size
        floats = max(floats, judging)
    rounded = -(-max(limits.context, reading) // CACHE_STEP) * CACHE_STEP
    spare = footprint.kv_bytes(rounded) - footprint.kv_bytes(limits.context)
    layer = round(max(footprint.layer_bytes) * channels)
    passing = layer + floats * mx.float32.size + condensing
    if decision.compares:
        said = 2 * min(reading, PLACES) * model.vocabulary
        passing = max(passing, SAID_FLOATS * said * mx.float32.size)
    return replace(footprint, passing_bytes=passing + spare)
