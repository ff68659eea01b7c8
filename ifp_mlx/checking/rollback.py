"""A KV cache that can go back: drafted tokens leave no trace, rejected ones neither."""

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..slicing.stock import StandIn


class Rollback:
    """Takes a KV cache back to a mark.

    Caches that grow are shortened. One that goes round overwrites what is in it, so it is
    copied at a mark, and put back; tokens that stay are then put in again, by the keys and
    values that the model made of them.

    Args:
        cache: mlx-lm's, of every layer.

    Raises:
        ValueError: if a layer's cache cannot go back, naming its class.
    """

    def __init__(self, cache: Sequence[Any]) -> None:
        from mlx_lm.models.cache import RotatingKVCache

        self.cache = list(cache)
        self._rotates = [isinstance(layer, RotatingKVCache) for layer in cache]
        for layer, rotates in zip(self.cache, self._rotates, strict=True):
            if not (rotates or layer.is_trimmable()):
                raise ValueError(
                    f"Checking has to take back what was drafted, and the cache "
                    f"{_kind_of(layer)} of this model cannot go back; generate without "
                    "checking."
                )
        self._copies: list[dict[str, Any]] = []
        self._made: list[tuple[mx.array, mx.array] | None] = []

    def mark(self) -> None:
        """Remember this place; :meth:`back` and :meth:`keep` go to it or from it."""
        pairs = zip(self.cache, self._rotates, strict=True)
        self._copies = [_copied(layer) if rotates else {} for layer, rotates in pairs]

    def back(self, tokens: int) -> None:
        """Forget the last tokens, which are all since the mark."""
        self._to(tokens, 0)

    def noting(self) -> list[Any]:
        """Return the cache for a model to read tokens with; what it makes of them is noted
        where :meth:`keep` needs it.
        """
        self._made = [None] * len(self.cache)
        return [
            StandInCache(layer, self._made, number) if rotates else layer
            for number, (layer, rotates) in enumerate(
                zip(self.cache, self._rotates, strict=True)
            )
        ]

    def keep(self, some: int, tokens: int) -> None:
        """Keep the first of the tokens that were read with :meth:`noting`.

        Args:
            some: how many stay.
            tokens: how many were read, all since the mark.
        """
        if some < tokens:
            self._to(tokens, some)

    def _to(self, tokens: int, some: int) -> None:
        for number, layer in enumerate(self.cache):
            if not self._rotates[number]:
                layer.trim(tokens - some)
                continue
            vars(layer).update(self._copies[number])
            # The copy is used up: the cache writes into it from now on.
            self._copies[number] = _copied(layer)
            if some:
                made = self._made[number]
                assert made is not None
                layer.update_and_fetch(*(part[..., :some, :] for part in made))


class StandInCache(StandIn):
    """Stands in for one layer's cache, and notes what is put into it."""

    def __init__(self, layer: Any, made: list[Any], number: int) -> None:
        super().__init__(layer, layer)
        self._made, self._number = made, number

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """See mlx-lm's."""
        self._made[self._number] = keys, values
        return self.module.update_and_fetch(keys, values)


def _copied(layer: Any) -> dict[str, Any]:
    """Return a cache's attributes, its arrays copied: it writes into its own."""
    return {
        name: mx.array(value) if isinstance(value, mx.array) else copy.copy(value)
        for name, value in vars(layer).items()
    }


def _kind_of(layer: Any) -> str:
    """Return the class of a cache that cannot go back, inside a list of caches too."""
    inner = [part for part in getattr(layer, "caches", ()) if not part.is_trimmable()]
    return type(inner[0] if inner else layer).__name__
