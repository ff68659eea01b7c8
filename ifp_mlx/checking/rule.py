"""Which drafted tokens stand, and what replaces the first that does not.

With ``exact`` the answer is the dense model's. Without a temperature a token stands if
it is the dense model's own choice. With a temperature, it stands with the probability
``min(1, p/q)`` for the dense model's ``p`` and the compact model's ``q``; a rejected
one is replaced by a draw from the part by which ``p`` exceeds ``q``. This rejection
rule of speculative sampling (Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023,
arXiv:2302.01318) preserves the dense model's distribution.

With a tolerance ``T`` a token stands if the dense model gives it at least ``T`` of the
probability of its best token, as in Sirius (Zhou et al. 2024, arXiv:2409.03856); else the
dense model's choice, or a draw from ``p``, takes its place.
"""

import math
from collections.abc import Sequence
from typing import Literal

import mlx.core as mx
import numpy as np

from ..decoding.options import Decoding

Check = Literal["exact"] | float


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
            logits: the dense model's, processed, ``[n + 1, V]``: for each drafted
                token, and for the token after the last one.
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
            # Where p and q are equal, rounding may leave nothing; then either will do.
            return n, self._draw(left if left.sum() > 0 else p)
        return len(drafted), self._draw(chances[len(drafted)])

    def _draw(self, weights: np.ndarray) -> int:
        """Return an index, drawn in proportion to weights that need not add up to 1."""
        edges = np.cumsum(weights)
        found = np.searchsorted(edges, self._draws.random() * edges[-1], side="right")
        return int(min(found, np.flatnonzero(weights)[-1]))
