"""Where scores come from, by name, and how they are combined."""

import mlx.core as mx
import numpy as np

SELECTORS = ("auto", "predictor", "activation", "prior", "blend", "random")
READING = ("activation", "blend")  # for which the dense model reads the instruction


def blend_scores(
    local: mx.array, prior: mx.array, weight: float = 0.5, *, unit: str = "channel"
) -> mx.array:
    """Aggregate two scorings of the units, layer by layer.

    For channels the ranks are averaged. Ranks say nothing of experts that a short text
    sent no token to, so for experts the shares of the layer's energy are averaged
    instead.

    Args:
        local: ``[L, F]``, of this instruction.
        prior: ``[L, F]``, of the model.
        weight: share of the prior, 0 to 1.
        unit: what is scored.

    Returns:
        ``[L, F]`` float32 in [0, 1]: the weighted mean of the two ranks; for experts
        the square root of the weighted mean of the two shares.

    Source: GLASS (arXiv:2508.14302), for ranks.
    """
    if unit == "expert":
        parts = (1 - weight) * _shares(local) + weight * _shares(prior)
        return mx.sqrt(parts)
    return (1 - weight) * _ranks(local) + weight * _ranks(prior)


def random_scores(layers: int, channels: int, seed: int = 0) -> mx.array:
    """Return random scores, ``[L, F]``: the baseline every selector must beat."""
    rng = np.random.default_rng(seed)
    return mx.array(rng.random((layers, channels), dtype=np.float32))


def _ranks(scores: mx.array) -> mx.array:
    order = np.argsort(np.array(scores), axis=-1, kind="stable")
    ranks = np.argsort(order, axis=-1, kind="stable")
    return mx.array(ranks.astype(np.float32) / (scores.shape[-1] - 1))


def _shares(scores: mx.array) -> mx.array:
    energy = mx.square(scores.astype(mx.float32))
    return energy / mx.maximum(energy.sum(axis=-1, keepdims=True), 1e-30)
