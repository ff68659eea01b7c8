"""Scores to kept units: soft top-k in training, hard top-k at inference."""

from collections.abc import Sequence
from typing import Literal

import mlx.core as mx
import numpy as np

from .masks import Selection


def select(
    scores: mx.array,
    sizes: Sequence[int],
    *,
    granularity: int = 1,
    gates: Literal["binary", "soft"] = "binary",
    temperature: float = 1.0,
    groups: int = 1,
) -> Selection:
    """Keep the highest-scored units of every layer.

    Equal scores are decided in favour of the lower index, so that the same scores
    give the same selection everywhere.

    Args:
        scores: ``[L, F]``.
        sizes: kept units ``k_l`` per layer, multiples of ``granularity``.
        granularity: units per selectable block; a block's score is its mean.
        gates: ``"soft"`` keeps λ of :func:`soft_top_k` on the kept channels.
        temperature: of the soft top-k, in units of the scores.
        groups: equal parts of a layer, each of which keeps equally many.

    Raises:
        ValueError: if the scores are not finite.

    Source: Hou et al. 2025 (arXiv:2501.02086) eq. 3, ``m = λ ⊙ Top(λ, k)``.
    """
    L, F = scores.shape
    if not mx.all(mx.isfinite(scores)):
        raise ValueError("The scores hold NaN or infinity; check the weights.")
    blocks = scores.astype(mx.float32).reshape(L, F // granularity, granularity)
    block_scores = np.array(blocks.mean(axis=-1))
    indices, values = [], []
    for layer, k in enumerate(sizes):
        parts = block_scores[layer].reshape(groups, -1)
        order = np.argsort(-parts, axis=1, kind="stable")[
            :, : k // granularity // groups
        ]
        kept = np.sort((order + np.arange(groups)[:, None] * parts.shape[1]).ravel())
        channels = (kept[:, None] * granularity + np.arange(granularity)).ravel()
        indices.append(mx.array(channels.astype(np.int32)))
        if gates == "soft":
            soft = soft_top_k(
                mx.array(block_scores[layer]), k // granularity, temperature
            )
            values.append(mx.repeat(soft[mx.array(kept)], granularity))
    return Selection(tuple(indices), tuple(values) if gates == "soft" else None, F)


def soft_top_k(scores: mx.array, k: int, temperature: float = 1.0) -> mx.array:
    """Relax top-k to λ in [0, 1] with the sum over channels held at ``k``.

    λ = min(1, exp((s − τ) / temperature)). With the scores sorted, τ has a closed
    form for every possible number of saturated channels; the first that is
    consistent is the solution. Gradients flow through τ and respect the budget.

    Args:
        scores: masking scores s, ``[..., F]``; computed in float32.
        k: channels to keep, ``0 < k <= F``.
        temperature: ε; smaller is closer to a hard top-k.

    Returns:
        λ, ``[..., F]`` float32.

    Raises:
        ValueError: if ``k`` is outside ``(0, F]``.

    Source: the fixed point of the coordinate descent in Lei et al. 2023
    (arXiv:2304.04947), which Hou et al. 2025 (arXiv:2501.02086) use in eq. 3.
    """
    F = scores.shape[-1]
    if not 0 < k <= F:
        raise ValueError(f"k={k} must be between 1 and the {F} units.")
    if k == F:
        return mx.ones(scores.shape)
    s = scores.astype(mx.float32) / temperature
    fixed = mx.stop_gradient(s)
    order = mx.argsort(-fixed, axis=-1)
    descending = mx.take_along_axis(fixed, order, axis=-1)[..., :k]
    tail = mx.logcumsumexp(
        mx.take_along_axis(fixed, order, axis=-1), axis=-1, reverse=True
    )
    tau_if = tail[..., :k] - mx.log(k - mx.arange(k, dtype=mx.float32))
    saturated = mx.argmax(descending <= tau_if, axis=-1, keepdims=True)
    rank = mx.argsort(order, axis=-1)
    free = rank >= saturated
    tau = mx.logsumexp(mx.where(free, s, -mx.inf), axis=-1, keepdims=True)
    tau = tau - mx.log((k - saturated).astype(mx.float32))
    return mx.where(free, mx.exp(mx.where(free, s - tau, 0.0)), 1.0)
