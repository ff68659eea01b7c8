"""Where scores come from, by name, and how they are combined."""

import mlx.core as mx
import numpy as np

SELECTORS = ("auto", "predictor", "activation", "prior", "blend", "random")
READING = ("activation", "blend")  # for which the dense model reads the instruction


def blend_scores(local: mx.array, prior: mx.array, weight: float = 0.5) -> mx.array:
    """Aggregate two rankings of the units, layer by layer.

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
    """Return ranks from 0 to 1; equal scores, as of experts that no token was sent to,
    have the mean of theirs.
    """
    ranks = []
    for row in np.array(scores):
        _, value, counts = np.unique(row, return_inverse=True, return_counts=True)
        middle = np.cumsum(counts) - (counts + 1) / 2
        ranks.append(middle[value] / (len(row) - 1))
    return mx.array(np.array(ranks, dtype=np.float32))
