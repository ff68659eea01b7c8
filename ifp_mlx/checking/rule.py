"""Which drafted tokens stand, and what comes in the place of the first that does not.

Exactly: what is said is what the dense model says. Without a temperature a token stands if
it is the dense model's own choice. With one, it stands with the probability ``min(1, p/q)``
for the dense model's ``p`` and the compact model's ``q``, and else one is drawn from what
``p`` has above ``q``: the rejection rule of speculative sampling (Leviathan et al. 2023,
arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318), which leaves the dense model's
distribution.

Within a tolerance ``T``: a token stands if the dense model gives it at least ``T`` of the
probability of its best token, as in Sirius (Zhou et al. 2024, arXiv:2409.03856); else the
dense model's choice, or a draw from ``p``, takes its place.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self

import mlx.core as mx
import numpy as np

Check = Literal["exact"] | float
Processor = Callable[[mx.array, mx.array], mx.array]


# What decoding may be asked for: at least, at most.
BOUNDS: dict[str, tuple[float, float]] = {
    "temp": (0, 100),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "top_k": (0, math.inf),
}


def check_bounds(values: object, bounds: Mapping[str, tuple[float, float]]) -> None:
    """Raise ``ValueError`` if an attribute is not ``None`` and outside its bounds."""
    for name, (low, high) in bounds.items():
        value = getattr(values, name)
        if value is not None and not low <= value <= high:  # so NaN is outside
            limit = f"at least {low}" if high == math.inf else f"{low} to {high}"
            raise ValueError(f"{name}={value} must be {limit}.")


@dataclass(frozen=True)
class Decoding:
    """How a token is chosen from logits.

    Attributes:
        temp: temperature; 0 is greedy.
        top_p: draw from the most likely tokens that have so much probability together;
            0 is greedy, 1 takes all.
        min_p, top_k: as mlx-lm's ``make_sampler``.
        processors: mlx-lm's logits processors, which may depend on nothing but the tokens
            before.
        seed: of all draws.

    Raises:
        ValueError: on a value out of ``BOUNDS``.
    """

    temp: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    processors: Sequence[Processor] = field(default=())
    seed: int = 0

    def __post_init__(self) -> None:
        check_bounds(self, BOUNDS)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, and nothing drawn."""
        return 0 in (self.temp, self.top_p)

    def sampler(self) -> Callable[[mx.array], mx.array]:
        """Return mlx-lm's sampler, for which ``top_p=0`` would be no limit at all."""
        from mlx_lm.sample_utils import make_sampler

        if self.greedy:
            return make_sampler(0)
        return make_sampler(self.temp, self.top_p, self.min_p, top_k=self.top_k)

    @classmethod
    def names(cls) -> list[str]:
        """Return what there is to choose."""
        return [option.name for option in fields(cls)]

    def for_mlx_lm(self) -> dict[str, Any]:
        """Return the options of ``mlx_lm.stream_generate`` that decode so, and seed MLX's
        draws.
        """
        mx.random.seed(self.seed)
        options = {"sampler": self.sampler()}
        return options | {"logits_processors": list(self.processors)}

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """Make it of some options.

        Raises:
            ValueError: on one that there is not.
        """
        known = cls.names()
        if unknown := options.keys() - {*known}:
            raise ValueError(
                f"{min(unknown)!r} does not go with checking, which has to know how tokens "
                f"are chosen; there are {', '.join(known)}."
            )
        return cls(**options)

    def processed(self, logits: mx.array, tokens: Sequence[int]) -> mx.array:
        """Return logits ``[n, V]`` of ``n`` tokens in a row as the processors leave them.

        Args:
            logits: at the last ``n`` of the tokens.
            tokens: ids, from the first of the prompt on.
        """
        if not self.processors:
            return logits
        rows, before = [], len(tokens) - len(logits)
        for number, row in enumerate(logits):
            row = row[None]
            for processor in self.processors:
                row = processor(mx.array(list(tokens[: before + number + 1])), row)
            rows.append(row)
        return mx.concatenate(rows)

    def chances(self, logits: mx.array) -> np.ndarray:
        """Return each token's probability, float64 ``[n, V]``, for logits ``[n, V]``."""
        from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

        logits = logits.astype(mx.float32)
        found = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        if self.top_p < 1:
            found = apply_top_p(found, self.top_p)
        if self.min_p:
            found = apply_min_p(found, self.min_p)
        if self.top_k:
            found = apply_top_k(found, self.top_k)
        chances = mx.softmax(found / self.temp, axis=-1)
        wide = np.array(chances).astype(np.float64)
        return wide / wide.sum(axis=-1, keepdims=True)


class Rule:
    """Drafts tokens and judges them.

    Args:
        check: ``exact``, or a tolerance above 0 and below 1.
        decoding: how tokens are chosen.
    """

    def __init__(self, check: Check, decoding: Decoding) -> None:
        self.check, self.decoding = check, decoding
        self._draws = np.random.default_rng(decoding.seed)
        self._proposals: list[np.ndarray] = []

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn, so that drafting need not wait for a draw."""
        return self.decoding.greedy

    def begin(self) -> None:
        """Begin a run of drafted tokens."""
        self._proposals = []

    def draft(self, logits: mx.array) -> mx.array:
        """Return the next drafted token, int ``[1]``, for processed logits ``[1, V]``."""
        if self.greedy:
            return mx.argmax(logits, axis=-1)
        chances = self.decoding.chances(logits)[0]
        self._proposals.append(chances)
        return mx.array([self._draw(chances)])

    def judge(self, drafted: Sequence[int], logits: mx.array) -> tuple[int, int]:
        """Return how many drafted tokens stand, and the token that follows them.

        Args:
            drafted: ``n`` tokens of this run.
            logits: the dense model's, processed, ``[n + 1, V]``: at the token before each
                and after the last.
        """
        if self.check != "exact":
            return self._within(drafted, logits)
        if self.greedy:
            choices = np.array(mx.argmax(logits, axis=-1)).tolist()
            pairs = zip(drafted, choices, strict=False)
            stand = next((n for n, (a, b) in enumerate(pairs) if a != b), len(drafted))
            return stand, choices[stand]
        return self._by_rejection(drafted, self.decoding.chances(logits))

    def _within(self, drafted: Sequence[int], logits: mx.array) -> tuple[int, int]:
        assert not isinstance(self.check, str)
        rows = np.array(logits.astype(mx.float32))
        pairs = zip(rows, drafted, strict=False)
        gaps = [float(row[token] - row.max()) for row, token in pairs]
        least = math.log(self.check)
        stand = next((n for n, gap in enumerate(gaps) if gap < least), len(drafted))
        row = logits[stand : stand + 1]
        if self.greedy:
            return stand, int(rows[stand].argmax())
        return stand, self._draw(self.decoding.chances(row)[0])

    def _by_rejection(
        self, drafted: Sequence[int], chances: np.ndarray
    ) -> tuple[int, int]:
        for n, token in enumerate(drafted):
            p, q = chances[n], self._proposals[n]
            if self._draws.random() * q[token] < p[token]:
                continue
            left = np.maximum(p - q, 0.0)
            # All of it may be rounded away where both are equal; then either will do.
            return n, self._draw(left if left.sum() > 0 else p)
        return len(drafted), self._draw(chances[len(drafted)])

    def _draw(self, weights: np.ndarray) -> int:
        """Return an index, drawn in proportion to weights that need not add up to 1."""
        edges = np.cumsum(weights)
        found = np.searchsorted(edges, self._draws.random() * edges[-1], side="right")
        return int(min(found, np.flatnonzero(weights)[-1]))
