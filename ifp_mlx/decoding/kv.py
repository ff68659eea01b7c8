"""How the KV cache of an answer is kept: quantised, or no more than the latest tokens.

mlx-lm's caches do the work; this module chooses one, and refuses what they cannot do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import mlx.nn as nn

BITS = (2, 4, 8)  # that mlx-lm's cache can pack
GROUPS = (32, 64, 128)
KEPT_FIRST = 4  # first tokens that mlx-lm keeps when a cache overwrites itself


@dataclass(frozen=True)
class KVOptions:
    """How a KV cache is kept, in mlx-lm's words.

    Attributes:
        kv_bits: of each number; ``None`` leaves the cache as the model computes it.
        kv_group_size: numbers that share a scale.
        quantized_kv_start: tokens from which on the cache is quantised.
        max_kv_size: most tokens that it keeps: the first four, and the latest.

    Raises:
        ValueError: on what mlx-lm's caches cannot do.
    """

    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 5000
    max_kv_size: int | None = None

    def __post_init__(self) -> None:
        for name, known in (("kv_bits", (None, *BITS)), ("kv_group_size", GROUPS)):
            if getattr(self, name) not in known:
                choices = ", ".join(str(choice) for choice in known if choice)
                raise ValueError(
                    f"{name}={getattr(self, name)} is none of {choices}; choose one."
                )
        if self.quantized_kv_start < 0:
            raise ValueError(
                f"quantized_kv_start={self.quantized_kv_start} must be at least 0."
            )
        if self.max_kv_size is not None and self.max_kv_size <= KEPT_FIRST:
            raise ValueError(
                f"max_kv_size={self.max_kv_size} must be more than the {KEPT_FIRST} "
                "first tokens, which are always kept."
            )
        if self.kv_bits is not None and self.max_kv_size is not None:
            raise ValueError(
                f"kv_bits={self.kv_bits} and max_kv_size={self.max_kv_size} do not go "
                "together: mlx-lm cannot quantise a cache of fixed size; leave one out."
            )

    @property
    def asked(self) -> dict[str, int]:
        """The options that change anything, by name."""
        given = {"kv_bits": self.kv_bits, "max_kv_size": self.max_kv_size}
        return {name: value for name, value in given.items() if value is not None}

    @classmethod
    def split(cls, options: Mapping[str, Any]) -> tuple[Self, dict[str, Any]]:
        """Split options into those of the KV cache and the others."""
        names = {option.name for option in fields(cls)}
        own = {name: options[name] for name in options.keys() & names}
        return cls(**own), {n: o for n, o in options.items() if n not in names}

    def for_mlx_lm(self) -> dict[str, Any]:
        """Return the options of ``mlx_lm.stream_generate`` for such a cache."""
        return asdict(self)

    def check_unchecked(self, check: object) -> None:
        """Raise ``ValueError`` if anything is set although the whole model checks."""
        for name, value in self.asked.items():
            raise ValueError(
                f"{name}={value} does not go with check={check}, which needs the "
                "whole model's full, exact cache; leave one of them out."
            )

    def check_fits(self, model: nn.Module) -> None:
        """Raise ``ValueError`` unless a model's cache can be kept like this.

        Args:
            model: mlx-lm's; no weight of it is read.
        """
        if self.max_kv_size is not None:
            made = self.cache_of(model)
            if {getattr(layer, "max_size", None) for layer in made} != {
                self.max_kv_size
            }:
                raise ValueError(
                    f"max_kv_size={self.max_kv_size} does not go with this type of model: "
                    "it keeps a window of its own, or other state than keys and values; "
                    "leave it out."
                )
        if self.kv_bits is not None:
            self._check_quantisable(model)

    def _check_quantisable(self, model: nn.Module) -> None:
        import mlx.core as mx
        from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

        cache = make_prompt_cache(model)
        plain = [layer for layer in cache if isinstance(layer, KVCache)]
        if not plain or any(isinstance(layer, RotatingKVCache) for layer in cache):
            raise ValueError(
                f"kv_bits={self.kv_bits} does not go with this type of model: mlx-lm "
                "cannot quantise a sliding window, nor other state than keys and values; "
                "leave it out."
            )
        model(mx.array([[0]]), cache=cache)  # gives the cache shapes; never computed
        for layer in plain:
            for width in (layer.keys.shape[-1], layer.values.shape[-1]):
                if width % self.kv_group_size:
                    raise ValueError(
                        f"kv_group_size={self.kv_group_size} does not divide this "
                        f"model's head size, {width}; choose another of "
                        f"{', '.join(map(str, GROUPS))}, or leave kv_bits out."
                    )

    def read(self, model: nn.Module, tokens: Sequence[int], cache: list[Any]) -> None:
        """Let a model read some tokens at once, and quantise the cache when it is due.

        Args:
            model: mlx-lm's.
            tokens: ids, one at least.
            cache: of the tokens before; it is changed.
        """
        import mlx.core as mx
        from mlx_lm.generate import maybe_quantize_kv_cache

        model(mx.array(list(tokens))[None], cache=cache)
        how = self.quantized_kv_start, self.kv_group_size, self.kv_bits
        maybe_quantize_kv_cache(cache, *how)
        mx.eval([layer.state for layer in cache])

    def cache_of(self, model: nn.Module) -> list[Any]:
        """Return an empty cache for a model. mlx-lm does not pass the size on to types
        that make their own cache, such as llama, so it is set here.
        """
        from mlx_lm.models.cache import make_prompt_cache

        return self.holding(make_prompt_cache(model, self.max_kv_size))

    def holding(self, cache: Sequence[Any]) -> list[Any]:
        """Return a cache kept like this, with the content of another one.

        Args:
            cache: mlx-lm's, one for each layer, plain or quantised.
        """
        from mlx_lm.models.cache import KVCache, RotatingKVCache

        if self.max_kv_size is None:
            return list(cache)
        held = []
        for layer in cache:
            new = layer
            if isinstance(layer, KVCache):
                new = RotatingKVCache(self.max_kv_size, keep=KEPT_FIRST)
                if not layer.empty():
                    known = layer.offset
                    new.update_and_fetch(
                        layer.keys[..., :known, :], layer.values[..., :known, :]
                    )
            held.append(new)
        return held


PLAIN = KVOptions()  # as the model makes its cache
