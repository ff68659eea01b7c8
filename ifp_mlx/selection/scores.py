"""Where scores come from, by name, and how they are combined."""

import mlx.core as mx
import numpy as np

SELECTORS = ("auto", "predictor", "activation", "prior", "blend", "random")
READING = ("activation", "blend")  # for which the dense model reads the instruction


def blend_scores(local: mx.array, prior: mx.array, weight: float = 0.5) -> mx.array:
    """Aggregate two rankings of the channels, layer by layer.

    Args:
        local: ``[L, F]``, of this instruction.
        prior: ``[L, F]``, of the model.
        weight: share of the prior, 0 to 1.

    Returns:
        ``[L, F]`` float32 in [0, 1]: the weighted mean of the two ranks.

    Source: GLASS (arXiv:2508.14302).
    """
    return (1 - weight) * _ranks(local) + weight * _ranks(prior)


def random_scores(layers: int, channels: int, seed: int = 0) -> mx.array:
    """Return random scores, ``[L, F]``: the baseline every selector must beat."""
    rng = np.random.default_rng(seed)
    return mx.array(rng.random((layers, channels), dtype=np.float32))


def _ranks(scores: mx.array) -> mx.array:
    order = np.argsort(np.array(scores), axis=-1, kind="stable")
    ranks = np.argsort(order, axis=-1, kind="stable")
    return mx.array(ranks.astype(np.float32) / (scores.shape[-1] - 1))
