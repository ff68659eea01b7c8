"""Let the kept channels make up for the dropped ones, as far as texts show how.

A dropped channel's contribution to the FFN's output is partly predictable from the
channels that stay. Where the dense model has just read a text (as it does to choose by
activation), the channels of every token are at hand, and the best linear stand-in is a
ridge regression of what is missing on what is kept. It changes ``down_proj`` alone,
needs no training, and costs nothing afterwards. A short text alone would be learned by
heart, so a sketch of a calibration text is added to it. The same rows tell for which
channels the others can least make up, so that these can be kept.

Ridge regression into ``down_proj``, from a calibration text alone, was published as
GRAIL (arXiv:2602.23795), and something similar as MoDeGPT (arXiv:2408.09632).
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .masked import tapped
from .shapes import LayerPlan, Plan, at
from .sketch import unit_rows
from .sliced import (
    count_units,
    cut_rows,
    dequantised,
    gathered,
    others_of,
    put_down,
)

STRENGTH = 0.3  # on text that it was not chosen on, as good as any between 0.1 and 1
EXPECTED_SHARE = 0.8  # of a token's energy, in the channels that will be kept
WORTH = 300  # the calibration text counts as so many tokens of the text that selects
KNOWN = 330  # with a sketch, STRENGTH holds at this energy of all rows; a token has 1
TOKENS = 2048  # of a text that are looked at, at most
TOKENS_ALONE = 1024  # without a sketch, as in version 0.1
TEXT_TOKENS = 2000  # of a task's examples, which make one text
RANK = 128  # of a correction that stays a matrix of its own


class Evidence(NamedTuple):
    """What is known of a layer's channels.

    Attributes:
        rows: float32 ``[m, F]``; each counts like a token.
        tokens: how many of them are tokens of a text, each of length 1; they come first,
            and after them a sketch, whose rows are at right angles.
        energy: of all rows.
        strength: λ as a share of the kept channels' energy in a token; the larger, the
            less the rows are trusted.
    """

    rows: mx.array
    tokens: int
    energy: mx.array
    strength: float | mx.array = STRENGTH


class Correction(NamedTuple):
    """What to add to the kept columns of ``down_proj``, as two factors.

    Attributes:
        reads: ``[k, r]``, from the kept channels.
        writes: ``[r, D]``, to the FFN's output.
    """

    reads: mx.array
    writes: mx.array


def evidence(channels: mx.array, sketch: mx.array | None = None) -> Evidence:
    """Return what is known of a layer's channels.

    Args:
        channels: what comes into the inlet of the dense layer for a text, ``[T, F]``; of
            a long text at most ``TOKENS`` rows are used, evenly spread, or without a
            sketch ``TOKENS_ALONE``.
        sketch: of a calibration text, ``[r, F]``, from
            :func:`ifp_mlx.slicing.sketch.condensed`. Without one, the evidence is that
            of version 0.1, so that models compensated then can be made again.
    """
    most = TOKENS_ALONE if sketch is None else TOKENS
    rows = unit_rows(channels[:: max(1, -(-len(channels) // most))])
    if sketch is None:
        return Evidence(rows, len(rows), mx.square(rows).sum())
    both = mx.concatenate([rows, WORTH**0.5 * sketch.astype(mx.float32)])
    energy = mx.square(both).sum()
    return Evidence(both, len(rows), energy, STRENGTH * mx.sqrt(energy / KNOWN))


def worth(known: Evidence) -> mx.array:
    """Return how much of each channel would be lost if all others made up for it.

    With the second moment ``A = Hᵀ H + λ I`` of the rows ``H`` it is ``1 / (A⁻¹)ⱼⱼ``: a
    channel's energy, less what follows from the others. This is optimal brain surgeon
    (Hassibi and Stork 1993) without the weights, since the size of a channel's column
    of ``down_proj`` misleads.

    Since the rows of a sketch are at right angles, a system has to be solved only for
    the rows of the text, less their part in the sketch.

    Args:
        known: from :func:`evidence`.

    Returns:
        ``[F]`` float32, not negative.
    """
    penalty = known.strength * EXPECTED_SHARE
    rows, sketch = known.rows[: known.tokens], known.rows[known.tokens :]
    squares = mx.square(sketch)
    sizes = squares.sum(axis=1) + penalty
    left = rows - ((rows @ sketch.T) / sizes) @ sketch
    gram = left @ rows.T + penalty * mx.eye(len(rows))
    with mx.stream(mx.cpu):  # MLX solves linear systems on the CPU only
        back = mx.linalg.tri_inv(mx.linalg.cholesky(gram))
    said = (1 / sizes) @ squares + mx.square(back @ left).sum(axis=0)
    return penalty / mx.maximum(1 - said, 1e-6)


def merit(known: Evidence, keep: float) -> mx.array:
    """Return the scores by which channels that make up for others are chosen.

    It is their :func:`worth` without its λ, plus ``4 keep⁵`` times their energy: an
    eighth of the energy at keep 0.5, and about all of it at 0.75. Few kept channels
    have much to make up for and have to differ from each other; among many the
    strongest do best. Both shares were found on a few calibration prompts of
    SmolLM2-135M.

    Args:
        known: from :func:`evidence`.
        keep: share of the channels that will be kept.

    Returns:
        ``[F]`` float32, not negative.
    """
    energy = mx.square(known.rows).sum(axis=0)
    alone = worth(known) - known.strength * EXPECTED_SHARE
    return mx.maximum(alone, 0) + 4 * keep**5 * energy


def cut_compensated(
    module: nn.Module, layer: LayerPlan, index: mx.array, known: Evidence
) -> None:
    """Keep the channels ``index`` of one layer, in place, compensated.

    A quantised inlet (``down_proj`` in most types) is quantised again, as it was.

    Args:
        module: the layer's.
        layer: its plan.
        index: int32 ``[k]``, sorted.
        known: of the dense layer's channels, from :func:`evidence`.

    Raises:
        ValueError: as :func:`ifp_mlx.slicing.sliced.cut`.
    """
    units = count_units(module, layer)
    if index.size == units:
        return  # nothing is dropped
    inlet = at(module, layer.inlet)
    down = compensated_down(dequantised(inlet), known, index)
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
        tokens: ``T`` ids, which go through it in one step.
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


def compensated_down(down: mx.array, known: Evidence, index: mx.array) -> mx.array:
    """Return the kept columns of ``down_proj``, corrected for those that are dropped.

    Args:
        down, known, index: see :func:`down_correction`.

    Returns:
        ``[D, k]`` in the dtype of ``down``.
    """
    correction = down_correction(down, known, index)
    kept = gathered(down, index).astype(mx.float32)
    return (kept + correction.T).astype(down.dtype)


def down_correction(down: mx.array, known: Evidence, index: mx.array) -> mx.array:
    """Return what to add to each kept column of ``down_proj``.

    With ``K`` the kept channels of the rows, ``R`` the dropped ones and ``Rdown`` the
    dropped columns of ``down``, the correction ``Δ`` minimises
    ``|K Δᵀ − R Rdownᵀ|² + λ |Δ|²``, each token counting the same. It is solved in
    whichever of the two dual forms is smaller.

    Args:
        down: ``[D, F]``, not quantised.
        known: from :func:`evidence`.
        index: int32 ``[k]``, sorted, what is kept.

    Returns:
        ``[k, D]`` float32, one row per kept channel.
    """
    D, F = down.shape
    if index.size == F or not len(known.rows):
        return mx.zeros((index.size, D))
    kept, missing = gathered(known.rows, index), missing_of(down, known.rows, index)
    if len(kept) <= index.size:
        return kept.T @ _solved(_penalised(kept @ kept.T, known), missing)
    return _solved(_penalised(kept.T @ kept, known), kept.T @ missing)


def missing_of(down: mx.array, rows: mx.array, index: mx.array) -> mx.array:
    """Return what ``down_proj`` makes of the dropped part of some rows, ``[m, D]``.

    Only the dropped columns are multiplied. Subtracting the kept ones' part from the
    output would be as much work, a sketch has no output, and rounding errors would
    stay.

    Args:
        down: ``[D, F]``, not quantised.
        rows: ``[m, F]``.
        index: int32 ``[k]``, sorted, what is kept.
    """
    dropped = others_of(index, rows.shape[1])
    return gathered(rows, dropped) @ gathered(down, dropped).astype(mx.float32).T


def correction_of(
    inlet: nn.Module, known: Evidence, index: mx.array, rank: int = RANK
) -> Correction:
    """Return :func:`down_correction` as two factors of a limited rank.

    Of the rows' outputs, the factors keep the ``r`` directions in which the correction
    does most: reduced-rank regression (Izenman 1975).

    Args:
        inlet: ``down_proj`` of the dense layer, quantised or not.
        known: from :func:`evidence`.
        index: int32 ``[k]``, sorted, what is kept.
        rank: at most this many directions.
    """
    down = dequantised(inlet)
    found = learned(known, index, missing_of(down, known.rows, index), rank)
    return Correction(*(factor.astype(down.dtype) for factor in found))


def learned(
    known: Evidence, index: mx.array, missing: mx.array, rank: int = RANK
) -> Correction:
    """Return the correction by which kept channels supply what is missing.

    Args:
        known: from :func:`evidence`.
        index: int32 ``[k]``, sorted, what is kept.
        missing: what ``down_proj`` makes of the others, ``[m, D]``.
        rank: at most this many directions.
    """
    kept = gathered(known.rows, index)
    gram = kept @ kept.T
    # The dual form throughout, so that no array is as large as down_proj.
    weights = _solved(_penalised(gram, known), missing.astype(mx.float32))
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


def _penalised(gram: mx.array, known: Evidence) -> mx.array:
    """Return the second moment of the kept channels, in either form, with λ added: the
    strength times the kept channels' average share of a token's energy.
    """
    energy = mx.diag(gram).sum()
    share = known.strength * energy / mx.maximum(known.energy, 1e-30)
    return gram + share * mx.eye(len(gram))


def _solved(gram: mx.array, right: mx.array) -> mx.array:
    """Return the solution for a positive definite matrix, by its Cholesky factor."""
    with mx.stream(mx.cpu):  # MLX solves linear systems on the CPU only
        back = mx.linalg.tri_inv(mx.linalg.cholesky(gram))
    return back.T @ (back @ right)
