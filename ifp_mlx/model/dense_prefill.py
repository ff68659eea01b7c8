"""A prompt read by the dense model, for a compact one to go on from.

The answer then starts from the dense model's own keys and values, as in GRIFFIN (Dong
et al. 2024, arXiv:2404.01365), and is closer to the dense model's. That costs nothing
where the dense model reads the prompt to select anyway; else it costs the time, and
memory for its weights meanwhile.
"""

import time
from typing import Any, NamedTuple

from ..slicing.stock import prefill
from .checkpoint import IFPModel


class Reading(NamedTuple):
    """What has been read of a prompt before the answer begins, by the dense model or for
    a prompt cache file.

    Attributes:
        kv: mlx-lm's KV cache, if there is one.
        tokens: how many tokens of the prompt were read.
        seconds: how long reading took now.
        cached: how many of the tokens were not read now, but come from a prompt cache
            file.
    """

    kv: list[Any] | None
    tokens: int
    seconds: float = 0.0
    cached: int = 0


def read_densely(
    kv: list[Any] | None, read: list[int], tokens: list[int], model: IFPModel | None
) -> Reading:
    """Return the dense model's reading of a prompt, as far as it goes.

    Args:
        kv: a KV cache of the dense model, or ``None``; it may be changed.
        read: the tokens that this cache has read.
        tokens: of the prompt.
        model: unless ``kv`` has all tokens but the last, the dense model of this one
            reads them now; ``None`` goes on from ``kv`` as it is.
    """
    known = 0 if kv is None else _common_start(kv, read, tokens)
    if model is None or known == len(tokens) - 1:
        return Reading(kv if known else None, known)
    start = time.perf_counter()
    cache = prefill(model.dense(), tokens[:-1])
    return Reading(cache, len(tokens) - 1, time.perf_counter() - start)


def _common_start(cache: list[Any], read: list[int], tokens: list[int]) -> int:
    """Return how many of a prompt's first tokens a KV cache has.

    One token at least must be left to read, so a cache that has all of them is
    shortened in place. If it cannot be shortened, or has read other tokens, the number
    is 0.
    """
    from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

    if tokens[: len(read)] != read:
        return 0
    if len(read) < len(tokens):
        return len(read)
    if not can_trim_prompt_cache(cache):
        return 0
    trim_prompt_cache(cache, 1)
    return len(read) - 1
