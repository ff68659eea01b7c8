"""A prompt read by the dense model, for a compact one to go on from.

The answer then starts from keys and values that lack nothing, as in GRIFFIN (Dong et al.
2024, arXiv:2404.01365): closer to the dense model, at the price of its weights in memory
for as long as the prompt is read, and of its time.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from .model import IFPModel
from .selectors import steps_of


def dense_cache(model: IFPModel, tokens: Sequence[int]) -> list[Any]:
    """Return the KV cache of mlx-lm after the dense model has read ``tokens``.

    The compact models of ``model`` have the same attention, and take the cache as
    their own. The dense weights are let go.

    Args:
        model: from :func:`ifp_mlx.load`.
        tokens: ``T`` ids; at least one more must follow for an answer.
    """
    from mlx_lm.models.cache import make_prompt_cache

    dense = model.dense()
    cache = make_prompt_cache(dense)
    for step in steps_of(tokens):
        dense(mx.array(step)[None], cache=cache)  # the logits are never computed
        mx.eval([layer.state for layer in cache])
    return cache
