"""How a token is chosen from logits: every option, with its bounds.

This is the only list. The commands make flags from it, the engine and the server read
their options by it, and mlx-lm's ``make_sampler`` and ``make_logits_processors``, which
do the work, take the same names.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn
import numpy as np

Processor = Callable[[mx.array, mx.array], mx.array]
MOST_BIAS = 1000
COLD = (
    1e-6  # a lower temperature counts as 0: logits divided by it could overflow float32
)


def _option(default: Any, low: float, high: float, about: str) -> Any:
    """Return a field for an option from ``low`` to ``high``."""
    return field(default=default, metadata={"bounds": (low, high), "help": about})


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen, and what ends the text.

    Attributes:
        temp: temperature; 0 is greedy.
        top_p: draw from the most likely tokens that together have this probability; 0
            is greedy, 1 takes all.
        min_p, min_tokens_to_keep, top_k, xtc_probability, xtc_threshold: as mlx-lm's
            ``make_sampler``.
        repetition_penalty, repetition_context_size, presence_penalty,
            presence_context_size, frequency_penalty, frequency_context_size: as mlx-lm's
            ``make_logits_processors``; ``None`` or 0 is no penalty.
        logit_bias: added to the logits of some tokens, by id.
        stop_strings: the text ends before the first of these.
        seed: of all draws; ``None`` goes on from MLX's random state.
        processors: more of mlx-lm's logits processors, which may depend only on the
            tokens before.
        xtc_special_tokens: tokens that XTC leaves alone; :meth:`fitted` sets them.

    Raises:
        ValueError: on a value out of its bounds.
    """

    temp: float = _option(0.0, 0, 100, "sampling temperature; 0 is greedy")
    top_p: float = _option(1.0, 0, 1, "sampling top-p; 0 is greedy")
    min_p: float = _option(0.0, 0, 1, "sampling min-p")
    min_tokens_to_keep: int = _option(1, 1, math.inf, "tokens that --min-p leaves")
    top_k: int = _option(0, 0, math.inf, "sampling top-k")
    xtc_probability: float = _option(
        0.0, 0, 1, "how often XTC sampling leaves out the most likely tokens but one"
    )
    xtc_threshold: float = _option(
        0.1, 0, 0.5, "the probability from which a token counts for XTC"
    )
    repetition_penalty: float | None = _option(
        None, 0, 100, "divide the chances of tokens that were there lately"
    )
    repetition_context_size: int = _option(
        20, 0, math.inf, "so many tokens are lately; 0 is all"
    )
    presence_penalty: float | None = _option(
        None, -2, 2, "take this off the logits of tokens that were there lately"
    )
    presence_context_size: int = _option(
        20, 0, math.inf, "so many tokens are lately; 0 is all"
    )
    frequency_penalty: float | None = _option(
        None, -2, 2, "take this off for every time that they were there lately"
    )
    frequency_context_size: int = _option(
        20, 0, math.inf, "so many tokens are lately; 0 is all"
    )
    logit_bias: Mapping[int, float] | None = None
    stop_strings: tuple[str, ...] = ()
    seed: int | None = 0
    processors: Sequence[Processor] = field(default=())
    xtc_special_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_bounds(self, BOUNDS)
        for token, bias in (self.logit_bias or {}).items():
            if not abs(bias) <= MOST_BIAS:  # so NaN is refused
                raise ValueError(
                    f"logit_bias={bias} of the token {token} must be -{MOST_BIAS} to "
                    f"{MOST_BIAS}; -100 is enough to leave a token out."
                )
        given = self.stop_strings
        if not isinstance(given, tuple | list) or not all(
            isinstance(text, str) for text in given
        ):
            raise ValueError(f"stop_strings={given!r} must be a list of texts.")
        if any(not text for text in given):
            raise ValueError("A stop string is empty; leave it out.")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, and nothing drawn."""
        return self.temp < COLD or self.top_p == 0

    def sampler(self) -> Callable[[mx.array], mx.array]:
        """Return mlx-lm's sampler; ``top_p=0`` is greedy, though no limit to mlx-lm."""
        from mlx_lm.sample_utils import make_sampler

        if self.greedy:
            return make_sampler(0)
        draw = make_sampler(
            self.temp,
            0,
            self.min_p,
            self.min_tokens_to_keep,
            top_k=self.top_k,
            xtc_probability=self.xtc_probability,
            xtc_threshold=self.xtc_threshold,
            xtc_special_tokens=list(self.xtc_special_tokens),
        )
        return draw if self.top_p == 1 else lambda found: draw(self._likely(found))

    def _likely(self, found: mx.array) -> mx.array:
        """Return log-probabilities ``[n, V]`` without tokens that ``top_p`` leaves out.
        The most likely token always stays; mlx-lm loses it where ``1 - top_p`` rounds
        to 1.
        """
        from mlx_lm.sample_utils import apply_top_p

        cut = apply_top_p(found, self.top_p)
        best = mx.where(found == found.max(axis=-1, keepdims=True), found, -mx.inf)
        lost = cut.max(axis=-1, keepdims=True) == -mx.inf
        return mx.where(lost, best, cut)

    @cached_property
    def all_processors(self) -> list[Processor]:
        """mlx-lm's logits processors of the penalties and of the bias, then the others."""
        from mlx_lm.sample_utils import make_logits_processors

        made = make_logits_processors(
            logit_bias=None if self.logit_bias is None else dict(self.logit_bias),
            repetition_penalty=self.repetition_penalty,
            repetition_context_size=self.repetition_context_size,
            presence_penalty=self.presence_penalty,
            presence_context_size=self.presence_context_size,
            frequency_penalty=self.frequency_penalty,
            frequency_context_size=self.frequency_context_size,
        )
        return [*made, *self.processors]

    def fitted(self, tokenizer: Any, vocabulary: int) -> Self:
        """Return these options for one model.

        Args:
            tokenizer: mlx-lm's; XTC leaves its line end and its ends of text alone.
            vocabulary: how many tokens the model knows; limits ``top_k`` and the like.

        Raises:
            ValueError: if the bias names a token that the model does not have.
        """
        for token in self.logit_bias or {}:
            if not 0 <= token < vocabulary:
                raise ValueError(
                    f"logit_bias names the token {token}; there are {vocabulary}."
                )
        least = min(self.min_tokens_to_keep, vocabulary)
        top_k = 0 if self.top_k >= vocabulary else self.top_k
        special: tuple[int, ...] = ()
        if self.xtc_probability:
            special = (*tokenizer.encode("\n"), *tokenizer.eos_token_ids)
        how: dict[str, Any] = {"min_tokens_to_keep": least, "top_k": top_k}
        return replace(self, xtc_special_tokens=special, **how)

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of all options that a caller sets."""
        names = [option.name for option in fields(cls)]
        return [name for name in names if name != "xtc_special_tokens"]

    @classmethod
    def split(cls, options: Mapping[str, Any]) -> tuple[Self, dict[str, Any]]:
        """Split options into those of decoding and the others."""
        names = {*cls.names()}
        own = {name: options[name] for name in options.keys() & names}
        return cls(**own), {n: o for n, o in options.items() if n not in names}

    def for_mlx_lm(self, known: Sequence[int] = ()) -> dict[str, Any]:
        """Return these options for ``mlx_lm.stream_generate``, and seed MLX's draws if
        any are made.

        Args:
            known: tokens of the prompt that are already in the KV cache, so that mlx-lm
                does not see them; penalties do.
        """
        if not self.greedy and self.seed is not None:
            mx.random.seed(self.seed)
        processors = self.all_processors
        if known:
            processors = [_after(known, processor) for processor in processors]
        return {"sampler": self.sampler(), "logits_processors": processors}

    def processed(self, logits: mx.array, tokens: Sequence[int]) -> mx.array:
        """Return logits ``[n, V]`` of ``n`` successive tokens after the processors.

        Args:
            logits: at the last ``n`` of the tokens.
            tokens: ids, from the first of the prompt on.
        """
        if not self.all_processors:
            return logits
        rows, before = [], len(tokens) - len(logits)
        for number, row in enumerate(logits):
            row = row[None]
            for processor in self.all_processors:
                row = processor(mx.array(list(tokens[: before + number + 1])), row)
            rows.append(row)
        return mx.concatenate(rows)

    def chances(self, logits: mx.array) -> np.ndarray:
        """Return each token's probability, float64 ``[n, V]``, for logits ``[n, V]``.

        XTC tosses a coin for each token; both outcomes count by their chance.
        """
        from mlx_lm.sample_utils import apply_min_p, apply_xtc

        found = nn.log_softmax(logits.astype(mx.float32), axis=-1)
        if self.top_p < 1:
            found = self._likely(found)
        if self.min_p:
            found = apply_min_p(found, self.min_p, self.min_tokens_to_keep)
        if not self.xtc_probability:
            return self._drawn(found)
        about = self.xtc_threshold, list(self.xtc_special_tokens)
        cut = apply_xtc(found, 1.0, *about)
        share = self.xtc_probability
        return (1 - share) * self._drawn(found) + share * self._drawn(cut)

    def _drawn(self, found: mx.array) -> np.ndarray:
        """Return the chances of tokens for log-probabilities ``[n, V]``, some cut off."""
        from mlx_lm.sample_utils import apply_top_k

        if self.top_k:
            found = apply_top_k(found, self.top_k)
        chances = mx.softmax(found / self.temp, axis=-1)
        wide = np.array(chances).astype(np.float64)
        return wide / wide.sum(axis=-1, keepdims=True)


# The bounds of every option: least and most.
BOUNDS: dict[str, tuple[float, float]] = {
    option.name: option.metadata["bounds"]
    for option in fields(Decoding)
    if option.metadata
}


def check_bounds(values: object, bounds: Mapping[str, tuple[float, float]]) -> None:
    """Raise ``ValueError`` if an attribute is not ``None`` and no number in its bounds."""
    for name, (low, high) in bounds.items():
        value = getattr(values, name)
        if value is not None and not isinstance(value, int | float | np.number):
            raise ValueError(f"{name}={value!r} must be a number.")
        if value is not None and not low <= value <= high:  # so NaN is outside
            limit = f"at least {low}" if high == math.inf else f"{low} to {high}"
            raise ValueError(f"{name}={value} must be {limit}.")


def _after(known: Sequence[int], processor: Processor) -> Processor:
    """Return a processor that also sees ``known`` before the tokens it is given."""
    before = list(known)

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        return processor(mx.concatenate([mx.array(before), tokens]), logits)

    return process
