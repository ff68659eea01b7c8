"""How evenly a mixture's routers spread the tokens over their experts."""

from collections.abc import Sequence

import mlx.core as mx

from ..slicing.masked import DROPPED


def balance_of(
    logits: Sequence[mx.array], chosen: Sequence[mx.array], real: mx.array
) -> mx.array:
    """Return the mean over layers of ``Σ_e f_e · P_e / u_e``: 1 if all experts get
    equally much, up to ``E / K`` if few get all.

    ``f`` is each expert's share of the routers' choices, ``P`` the mean of the softmax
    of the logits, and ``u`` what both would be if every token were spread evenly over
    the experts that its mask keeps: ``1 / E`` where all are kept. The gradient flows
    through ``P`` alone.

    Args:
        logits: one array for each of ``L`` layers, ``[..., E]``, for the ``N`` tokens
            of ``real``.
        chosen: the chosen experts of each layer, integers ``[..., K]``, for the same
            tokens.
        real: 1 where a token counts, 0 where it is padding, ``N`` in all.

    Source: Fedus et al. 2021 (arXiv:2101.03961) eq. 4-6, there for one expert a token.
    """
    weights = real.flatten() / mx.maximum(real.sum(), 1)
    layers = zip(logits, chosen, strict=True)
    return mx.stack([_of_layer(*layer, weights) for layer in layers]).mean()


def _of_layer(logits: mx.array, chosen: mx.array, weights: mx.array) -> mx.array:
    E, K = logits.shape[-1], chosen.shape[-1]
    logits = logits.reshape(-1, E).astype(mx.float32)
    kept = (logits > DROPPED / 2).astype(mx.float32)
    even = weights @ (kept / kept.sum(axis=-1, keepdims=True))
    share = weights @ mx.softmax(logits, axis=-1)
    places = mx.zeros(E).at[chosen.flatten()].add(mx.repeat(weights / K, K))
    return (places * share / mx.maximum(even, 1e-9)).sum()
