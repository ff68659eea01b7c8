"""KV caches of what was read and said, for the next turn of a conversation."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

WHOLE_MODEL = "whole model"  # the maker of checked answers' caches, whatever the mask


class Prompts:
    """KV caches, found by their maker and tokens; the least recently used go first.

    Args:
        max_bytes: of all of them; 0 keeps none.
    """

    def __init__(self, max_bytes: int) -> None:
        from mlx_lm.models.cache import LRUPromptCache

        self._kept = LRUPromptCache(max_bytes=max_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return int(self._kept.nbytes)

    def find(self, maker: str, tokens: Sequence[int]) -> tuple[list[Any] | None, int]:
        """Return a copy of the cache that covers most of a prompt, and how many tokens;
        at least the last token is left to read.

        Args:
            maker: the identity of a selection, or ``WHOLE_MODEL``.
            tokens: ids of the prompt.
        """
        from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

        cache, rest = self._kept.fetch_nearest_cache(maker, list(tokens))
        if cache is not None and not rest:
            if not can_trim_prompt_cache(cache):
                return None, 0
            trim_prompt_cache(cache, 1)
            rest = tokens[-1:]
        return cache, len(tokens) - len(rest)

    def keep(self, maker: str, tokens: Sequence[int], cache: list[Any]) -> None:
        """Keep the cache of some tokens, unless it exceeds the limit by itself."""
        if sum(layer.nbytes for layer in cache) <= self._kept.max_bytes:
            mx.eval([layer.state for layer in cache])  # frees the batch it was in
            self._kept.insert_cache(maker, list(tokens), cache)

    def clear(self) -> None:
        """Let all of them go."""
        self._kept.trim_to(n_sequences=0)
