"""Let the kept channels make up for the dropped ones, as far as texts show how.

A dropped channel's contribution to the FFN's output is partly predictable from the
channels that stay. Where the dense model has just read a text (as it does to choose
by activation), the channels of every token are at hand, and the best linear stand-in
is a ridge regression of what is missing on what is kept. It changes ``down_proj``
alone, needs no training, and costs nothing afterwards. A short text alone is learned by
heart, so a sketch of a calibration text stands beside it; which channels are kept can then
be chosen by what the others cannot make up for.

The ridge into ``down_proj``, from a calibration text alone, was published as GRAIL
(arXiv:2602.23795), and kin to it as MoDeGPT (arXiv:2408.09632).
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .masked import tapped
from .shapes import LayerPlan, Plan, at
from .sketch import unit_rows
from .sliced import columns, count_units, cut_rows, dequantised, put_down

STRENGTH = 0.3  # as good as any between 0.1 and 1 on other text than it was chosen on
EXPECTED_SHARE = 0.8  # of a token's energy, in the channels that will be kept
WORTH = 300  # tokens that a calibration text counts as, beside the text that selects
KNOWN = 330  # tokens' worth of rows at which that was found beside a sketch
TOKENS = 2048  # of a text that are looked at, at most
TOKENS_ALONE = 1024  # without a sketch, as in version 0.1
TEXT_TOKENS = 2000  # of a task's examples, which make one text
RANK = 128  # of a correction that stays a matrix of its own


Strength = float | mx.array


class Correction(NamedTuple):
    """What to add to the kept columns of ``down_proj``, as two factors.

    Attributes:
        reads: ``[k, r]``, from the kept channels.
        writes: ``[r, D]``, to the FFN's output.
    """

    reads: mx.array
    writes: mx.array


def evidence(channels: mx.array, sketch: mx.array | None = None) -> mx.array:
    """Return what is known of a layer's channels: rows that count as tokens do.

    Args:
        channels: what comes into the inlet of the dense layer for a text, ``[T, F]``; of
            a long text, ``TOKENS`` of it, evenly spread.
        sketch: of a calibration text, ``[r, F]``, from
            :func:`ifp_mlx.slicing.sketch.condensed`.

    Returns:
        ``[m, F]`` float32, each token of length 1.
    """
    most = TOKENS_ALONE if sketch is None else TOKENS
    rows = unit_rows(channels[:: max(1, -(-len(channels) // most))])
    if sketch is None:
        return rows
    return mx.concatenate([rows, WORTH**0.5 * sketch.astype(mx.float32)])


def strength_of(rows: mx.array, *, sketched: bool) -> Strength:
    """Return how little some rows are to be trusted, for :func:`down_correction`.

    Args:
        rows: from :func:`evidence`.
        sketched: whether a sketch is among them; without one it is as in version 0.1, so
            that what was compensated then can be made again.
    """
    if not sketched:
        return STRENGTH
    return STRENGTH * mx.sqrt(mx.square(rows).sum() / KNOWN)


def worth(rows: mx.array, strength: Strength = STRENGTH) -> mx.array:
    """Return what would be lost of each channel if all others made up for it.

    With the second moment ``A = Hᵀ H + λ I`` of the rows ``H`` it is ``1 / (A⁻¹)ⱼⱼ``: a
    channel's energy, less what follows from the others (optimal brain surgeon, Hassibi and
    Stork 1993, without the weights: how large a channel's column of ``down_proj`` is
    misleads).

    Args:
        rows: from :func:`evidence`, ``[m, F]``.
        strength: as for :func:`down_correction`.

    Returns:
        ``[F]`` float32, not negative.
    """
    penalty = strength * EXPECTED_SHARE
    gram = rows @ rows.T + penalty * mx.eye(len(rows))
    with mx.stream(mx.cpu):  # where linear systems are solved
        known = mx.linalg.tri_inv(mx.linalg.cholesky(gram)) @ rows
    return penalty / mx.maximum(1 - mx.square(known).sum(axis=0), 1e-6)


def merit(rows: mx.array, keep: float, strength: Strength = STRENGTH) -> mx.array:
    """Return by what channels are chosen that will make up for the others.

    Their :func:`worth` and ``4 keep⁵`` times their energy, an eighth of it at keep 0.5 and
    about all of it at 0.75: few kept channels have much to make up for, and have to be
    unlike each other; of many the strongest do best. Both shares were found on a few
    calibration prompts of SmolLM2-135M.

    Args:
        rows: from :func:`evidence`, ``[m, F]``.
        keep: share of the channels that will be kept.
        strength: as for :func:`down_correction`.

    Returns:
        ``[F]`` float32, not negative.
    """
    energy = mx.square(rows).sum(axis=0)
    alone = worth(rows, strength) - strength * EXPECTED_SHARE
    return mx.maximum(alone, 0) + 4 * keep**5 * energy


def cut_compensated(
    module: nn.Module,
    layer: LayerPlan,
    index: mx.array,
    rows: mx.array,
    strength: Strength = STRENGTH,
) -> None:
    """Keep the channels ``index`` of one layer, in place, compensated.

    A quantised inlet (``down_proj`` in most types) is quantised again, as it was.

    Args:
        module: the layer's.
        layer: its plan.
        index: int32 ``[k]``, sorted.
        rows: what is known of the dense layer's channels, from :func:`evidence`.
        strength: see :func:`down_correction`.

    Raises:
        ValueError: as :func:`ifp_mlx.slicing.sliced.cut`.
    """
    units = count_units(module, layer)
    if index.size == units:
        return  # nothing is dropped
    inlet = at(module, layer.inlet)
    down = compensated_down(dequantised(inlet), rows, index, strength)
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
    down: mx.array, rows: mx.array, index: mx.array, strength: Strength = STRENGTH
) -> mx.array:
    """Return the kept columns of ``down_proj``, corrected for those that are dropped.

    Args:
        down, rows, index, strength: see :func:`down_correction`.

    Returns:
        ``[D, k]`` in the dtype of ``down``.
    """
    correction = down_correction(down, rows, index, strength)
    kept = columns(down, index).astype(mx.float32)
    return (kept + correction.T).astype(down.dtype)


def down_correction(
    down: mx.array, rows: mx.array, index: mx.array, strength: Strength = STRENGTH
) -> mx.array:
    """Return what to add to each kept column of ``down_proj``.

    With the rows split into kept ``K`` and dropped ``R``, the correction ``Δ`` minimises
    ``|K Δᵀ − R Rdownᵀ|² + λ |Δ|²``, each token counting the same. It is solved in
    whichever of the two dual forms is smaller.

    Args:
        down: ``[D, F]``, not quantised.
        rows: from :func:`evidence`, ``[m, F]``.
        index: int32 ``[k]``, sorted, what is kept.
        strength: λ as a share of the energy that the kept channels have in a token;
            larger trusts the rows less; see :func:`strength_of`.

    Returns:
        ``[k, D]`` float32, one row per kept channel.
    """
    D, F = down.shape
    if index.size == F or not len(rows):
        return mx.zeros((index.size, D))
    kept, missing = columns(rows, index), missing_of(down, rows, index)
    with mx.stream(mx.cpu):  # where linear systems are solved
        return _ridge(kept, missing, strength * _share(kept, rows))


def missing_of(down: mx.array, rows: mx.array, index: mx.array) -> mx.array:
    """Return what ``down_proj`` makes of the dropped part of some rows, ``[m, D]``.

    Args:
        down, rows, index: see :func:`down_correction`.
    """
    dropped = mx.ones(rows.shape[1])
    dropped[index] = 0
    return (rows * dropped) @ down.astype(mx.float32).T


def correction_of(
    inlet: nn.Module,
    rows: mx.array,
    index: mx.array,
    rank: int = RANK,
    strength: Strength = STRENGTH,
) -> Correction:
    """Return :func:`down_correction` as two factors of a limited rank.

    Of the rows' outputs, the factors keep the ``r`` directions in which the correction
    does most: reduced-rank regression (Izenman 1975).

    Args:
        inlet: ``down_proj`` of the dense layer, quantised or not.
        rows: from :func:`evidence`, ``[m, F]``.
        index: int32 ``[k]``, sorted, what is kept.
        rank: at most so many directions.
        strength: see :func:`down_correction`.
    """
    down = dequantised(inlet)
    found = learned(rows, index, missing_of(down, rows, index), rank, strength)
    return Correction(*(factor.astype(down.dtype) for factor in found))


def learned(
    rows: mx.array,
    index: mx.array,
    missing: mx.array,
    rank: int = RANK,
    strength: Strength = STRENGTH,
) -> Correction:
    """Return what makes the kept channels do what is missing, as two factors.

    Args:
        rows: from :func:`evidence`, ``[m, F]``.
        index: int32 ``[k]``, sorted, what is kept.
        missing: what ``down_proj`` makes of the others, ``[m, D]``.
        rank: at most so many directions.
        strength: see :func:`down_correction`.
    """
    kept = columns(rows, index)
    gram = kept @ kept.T
    # The dual form throughout: nothing of the size of down_proj is ever made.
    penalty = strength * _share(kept, rows) * mx.eye(len(gram))
    with mx.stream(mx.cpu):  # where linear systems are solved
        weights = mx.linalg.solve(gram + penalty, missing.astype(mx.float32))
    reads, writes = kept.T, weights
    if len(gram) > rank:
        does = gram @ weights
        with mx.stream(mx.cpu):
            _, sides = mx.linalg.eigh(does @ does.T)
            most = sides[:, ::-1][:, :rank].T @ does
            # Orthonormal also where fewer directions than that have any strength.
            writes = mx.linalg.qr(most.T)[0].T
        reads = kept.T @ (weights @ writes.T)
    return Correction(reads, writes)


def _share(kept: mx.array, rows: mx.array) -> mx.array:
    """Return the share of a token's energy that the kept channels have, on average."""
    return mx.square(kept).sum() / mx.maximum(mx.square(rows).sum(), 1e-30)


def _ridge(kept: mx.array, missing: mx.array, penalty: mx.array) -> mx.array:
    """Return the ridge solution of ``kept @ X = missing``, ``[k, D]``."""
    m, k = kept.shape
    if m <= k:
        gram = kept @ kept.T + penalty * mx.eye(m)
        return kept.T @ _solved(gram, missing)
    gram = kept.T @ kept + penalty * mx.eye(k)
    return _solved(gram, kept.T @ missing)


def _solved(gram: mx.array, right: mx.array) -> mx.array:
    """Return the solution for a positive definite matrix, by its Cholesky factor."""
    back = mx.linalg.tri_inv(mx.linalg.cholesky(gram))
    return back.T @ (back @ right)
