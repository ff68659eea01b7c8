"""Let the kept channels make up for the dropped ones, as far as one text shows how.

A dropped channel's contribution to the FFN's output is partly predictable from the
channels that stay. Where the dense model has just read a text (as it does to choose
by activation), the channels of every token are at hand, and the best linear stand-in
is a ridge regression of what is missing on what is kept. It changes ``down_proj``
alone, needs no training and no stored statistic, and costs nothing afterwards.
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .masked import tapped
from .shapes import LayerPlan, Plan, at
from .sliced import count_units, cut_rows, dequantised, put_down

STRENGTH = 0.3  # as good as any between 0.1 and 1 on other text than it was chosen on
TOKENS = 1024  # of a text that are looked at, at most
TEXT_TOKENS = 1000  # of a task's examples, which make one text
RANK = 128  # of a correction that stays a matrix of its own


class Correction(NamedTuple):
    """What to add to the kept columns of ``down_proj``, as two factors.

    Attributes:
        reads: ``[k, r]``, from the kept channels.
        writes: ``[r, D]``, to the FFN's output.
    """

    reads: mx.array
    writes: mx.array


def cut_compensated(
    module: nn.Module, layer: LayerPlan, index: mx.array, channels: mx.array
) -> None:
    """Keep the channels ``index`` of one layer, in place, compensated.

    A quantised inlet (``down_proj`` in most types) is quantised again, as it was.

    Args:
        module: the layer's.
        layer: its plan.
        index: int32 ``[k]``, sorted.
        channels: what comes into the inlet of the dense layer for a text, ``[T, F]``.

    Raises:
        ValueError: as :func:`ifp_mlx.slicing.sliced.cut`.
    """
    units = count_units(module, layer)
    if index.size == units:
        return  # nothing is dropped
    some = channels[:: -(-len(channels) // TOKENS)]  # evenly spread
    inlet = at(module, layer.inlet)
    down = compensated_down(dequantised(inlet), some, index)
    mx.eval(down)
    cut_rows(module, layer, index, units)
    put_down(inlet, down)


def read_channels(
    model: nn.Module, plan: Plan, tokens: Sequence[int]
) -> list[mx.array]:
    """Return what comes into each layer's inlet for a text, ``[T, F]``.

    Args:
        model: a dense stock model; its weights are in memory afterwards.
        plan: its plan, of channels.
        tokens: ``T`` ids, which go through it at once.
    """
    channels: list[mx.array] = []

    def keep(h: mx.array) -> mx.array:
        channels.append(h.reshape(-1, h.shape[-1]))
        return h

    inlets = plan.inlets(model)
    with tapped(inlets, [keep] * len(inlets)):
        model(mx.array(list(tokens))[None])
        mx.eval(channels)
    return channels


def compensated_down(
    down: mx.array, channels: mx.array, index: mx.array, strength: float = STRENGTH
) -> mx.array:
    """Return the kept columns of ``down_proj``, corrected for those that are dropped.

    Args:
        down, channels, index, strength: see :func:`down_correction`.

    Returns:
        ``[D, k]`` in the dtype of ``down``.
    """
    correction = down_correction(down, channels, index, strength)
    return (down[:, index].astype(mx.float32) + correction.T).astype(down.dtype)


def down_correction(
    down: mx.array, channels: mx.array, index: mx.array, strength: float = STRENGTH
) -> mx.array:
    """Return what to add to each kept column of ``down_proj``.

    With the tokens' channels split into kept ``K`` and dropped ``R``, the correction
    ``Δ`` minimises ``|K Δᵀ − R Rdownᵀ|² + λ |Δ|²``, each token counting the same. It
    is solved in whichever of the two dual forms is smaller.

    Args:
        down: ``[D, F]``, not quantised.
        channels: what comes into ``down_proj`` of the dense FFN, ``[T, F]``.
        index: int32 ``[k]``, sorted, what is kept.
        strength: λ as a share of the mean energy that the kept channels have in a
            token; larger trusts the text less.

    Returns:
        ``[k, D]`` float32, one row per kept channel.
    """
    D, F = down.shape
    if index.size == F or not channels.shape[0]:
        return mx.zeros((index.size, D))
    h = channels.astype(mx.float32)
    h = h / mx.maximum(mx.linalg.norm(h, axis=1, keepdims=True), 1e-6)
    kept, dropped = h[:, index], mx.ones(F)
    dropped[index] = 0
    missing = (h * dropped) @ down.astype(mx.float32).T
    with mx.stream(mx.cpu):  # where linear systems are solved
        return _ridge(kept, missing, strength)


def correction_of(
    inlet: nn.Module, channels: mx.array, index: mx.array, rank: int = RANK
) -> Correction:
    """Return :func:`down_correction` as two factors of a limited rank.

    Of the text's outputs, the factors keep the ``r`` directions in which the correction
    does most: reduced-rank regression (Izenman 1975).

    Args:
        inlet: ``down_proj`` of the dense layer, quantised or not.
        channels: what comes into it for a text, ``[T, F]``.
        index: int32 ``[k]``, sorted, what is kept.
        rank: at most so many directions.
    """
    some = channels[:: -(-len(channels) // TOKENS)]
    dropped = mx.ones(channels.shape[1], channels.dtype)
    dropped[index] = 0
    missing = (some * dropped) @ dequantised(inlet).astype(channels.dtype).T
    return learned(some, index, missing, rank)


def learned(
    channels: mx.array, index: mx.array, missing: mx.array, rank: int = RANK
) -> Correction:
    """Return what makes the kept channels do what is missing, as two factors.

    Args:
        channels: what comes into ``down_proj`` for a text, ``[T, F]``.
        index: int32 ``[k]``, sorted, what is kept.
        missing: what it makes of the others, ``[T, D]``.
        rank: at most so many directions.
    """
    size = mx.linalg.norm(channels.astype(mx.float32), axis=1, keepdims=True)
    size = mx.maximum(size, 1e-6)
    kept = channels[:, index].astype(mx.float32) / size
    gram = kept @ kept.T
    # The dual form throughout: nothing of the size of down_proj is ever made.
    penalty = STRENGTH * mx.trace(gram) / len(gram) * mx.eye(len(gram))
    with mx.stream(mx.cpu):  # where linear systems are solved
        weights = mx.linalg.solve(gram + penalty, missing.astype(mx.float32) / size)
    reads, writes = kept.T, weights
    if len(gram) > rank:
        does = gram @ weights
        with mx.stream(mx.cpu):
            _, sides = mx.linalg.eigh(does @ does.T)
        writes = sides[:, ::-1][:, :rank].T @ does
        writes = writes / mx.maximum(
            mx.linalg.norm(writes, axis=1, keepdims=True), 1e-6
        )
        reads = kept.T @ (weights @ writes.T)
    dtype = channels.dtype
    return Correction(reads.astype(dtype), writes.astype(dtype))


def _ridge(kept: mx.array, missing: mx.array, strength: float) -> mx.array:
    """Return the ridge solution of ``kept @ X = missing``, ``[k, D]``."""
    T, k = kept.shape
    penalty = strength * mx.square(kept).sum() / T
    if T <= k:
        gram = kept @ kept.T + penalty * mx.eye(T)
        return kept.T @ mx.linalg.solve(gram, missing)
    gram = kept.T @ kept + penalty * mx.eye(k)
    return mx.linalg.solve(gram, kept.T @ missing)
