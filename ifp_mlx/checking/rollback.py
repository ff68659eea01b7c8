"""A KV cache that can go back: drafted and rejected tokens leave no trace."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from ..slicing.stock import StandIn


class Rollback:
    """Takes a KV cache back to a mark.

    Caches that only grow are shortened. Others overwrite or drop entries, so they are
    copied at a mark and put back; the keys and values of tokens that stay are then
    added again.

    Args:
        cache: mlx-lm's, of every layer.

    Raises:
        ValueError: if a layer's cache cannot go back, naming its class.
    """

    def __init__(self, cache: Sequence[Any]) -> None:
        self.cache = list(cache)
        self._parts = [part for layer in self.cache for part in _parts_of(layer)]
        for part in self._parts:
            if not hasattr(part, "update_and_fetch"):
                raise ValueError(
                    f"Checking has to take back what was drafted, and the cache "
                    f"{type(part).__name__} of this model cannot go back; generate "
                    "without checking."
                )
        self._marks: list[Any] = []
        self._made: dict[int, tuple[mx.array, mx.array]] = {}

    def mark(self) -> None:
        """Remember this place, for one :meth:`back` to it or one :meth:`keep` from it."""
        self._made = {}
        self._marks = [
            part.offset if _only_grows(part) else _copied(part) for part in self._parts
        ]

    @contextmanager
    def marked(self) -> Iterator[None]:
        """Remember this place inside the ``with`` block, and go back to it on an
        error.
        """
        self.mark()
        try:
            yield
        except BaseException:
            self.back()
            raise

    def back(self) -> None:
        """Forget what was read since the mark."""
        self._to(0)

    def noting(self) -> list[Any]:
        """Return the cache for a model to read tokens with; new keys and values are
        noted where :meth:`keep` needs them.
        """
        stand_ins = (
            part if _only_grows(part) else StandInCache(part, self._made, number)
            for number, part in enumerate(self._parts)
        )
        return [
            type(layer)(*(next(stand_ins) for _ in layer.caches))
            if hasattr(layer, "caches")
            else next(stand_ins)
            for layer in self.cache
        ]

    def keep(self, some: int, tokens: int) -> None:
        """Keep the first of the tokens that were read with :meth:`noting`.

        Args:
            some: how many stay.
            tokens: how many were read, all since the mark.
        """
        if some < tokens:
            self._to(some)

    def _to(self, some: int) -> None:
        for number, (part, mark) in enumerate(
            zip(self._parts, self._marks, strict=True)
        ):
            if _only_grows(part):
                part.trim(part.offset - mark - some)
                continue
            vars(part).update(mark)
            if some:
                made = self._made[number]
                part.update_and_fetch(*(array[..., :some, :] for array in made))


@contextmanager
def without_last(cache: Sequence[Any], tokens: int) -> Iterator[bool]:
    """Shorten a cache inside the ``with`` block, for another model to read its last
    tokens; afterwards it is as before.

    Args:
        cache: mlx-lm's, of every layer, of at least as many tokens.
        tokens: how many are taken away.

    Yields:
        Whether the cache could be shortened; if not, it is unchanged.
    """
    parts = [part for layer in cache for part in _parts_of(layer)]
    if not all(map(_can_shorten, parts)):
        yield False
        return
    ends = [part.offset for part in parts]
    tails = [
        [mx.array(array[..., end - tokens : end, :]) for array in part.state[:2]]
        for part, end in zip(parts, ends, strict=True)
    ]
    mx.eval(tails)
    for part in parts:
        part.trim(tokens)
    try:
        yield True
    finally:
        for part, end, tail in zip(parts, ends, tails, strict=True):
            part.trim(part.offset - end + tokens)
            part.update_and_fetch(*tail)


class StandInCache(StandIn):
    """A stand-in for one layer's cache that notes what is put into it."""

    def __init__(self, layer: Any, made: dict[int, Any], number: int) -> None:
        super().__init__(layer, layer)
        self._made, self._number = made, number

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """Do what the layer's cache does, and note the keys and values."""
        self._made[self._number] = keys, values
        return self.module.update_and_fetch(keys, values)


def _parts_of(layer: Any) -> Sequence[Any]:
    """Return the caches of a list of them, or the one that it is."""
    parts: Sequence[Any] = getattr(layer, "caches", (layer,))
    return parts


def _only_grows(part: Any) -> bool:
    """Whether shortening restores a cache; not for all that claim to be trimmable."""
    from mlx_lm.models.cache import KVCache, QuantizedKVCache

    return isinstance(part, KVCache | QuantizedKVCache)


def _can_shorten(part: Any) -> bool:
    """Whether a cache can be shortened, and its keys and values be put in again."""
    from mlx_lm.models.cache import KVCache, RotatingKVCache

    whole = isinstance(part, KVCache | RotatingKVCache)
    return whole and bool(part.is_trimmable())


def _copied(part: Any) -> dict[str, Any]:
    """Return a cache's attributes, its arrays copied: it writes into its own."""
    return {
        name: mx.array(value) if isinstance(value, mx.array) else copy.copy(value)
        for name, value in vars(part).items()
    }
