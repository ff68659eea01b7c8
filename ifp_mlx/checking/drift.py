"""Exchange channels when an answer has moved on, without reading anything more.

A check has just computed every channel of the whole model for the latest tokens, so it
is known which channels they use. When other channels would have clearly more of these
tokens' energy than the kept ones, the next check exchanges them, since it has all
channels of each layer in memory anyway. It learns from the same tokens how the new ones
make up for the rest.

Masks that follow what is generated: DART (arXiv:2601.22632).
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..slicing.shapes import is_quantised
from .whole import Whole

RECENT = 256  # tokens whose channels are remembered
HALF_LIFE = 24  # tokens after which one counts half
FLOOR = 8  # tokens between two changes, at least
GAIN = 0.01  # share of the energy that other channels must have more


@dataclass(frozen=True)
class Move:
    """A change of the kept channels.

    Attributes:
        token: how many tokens the answer had when it was decided.
        kept: share of the latest tokens' energy in the old channels, mean over the
            layers that drop any.
        best: the same share in the new ones.
    """

    token: int
    kept: float
    best: float


class Drift:
    """Follows what an answer uses.

    Args:
        whole: both models; their parts remember the channels of the latest tokens.

    Attributes:
        moves: so far.

    Raises:
        ValueError: if the kept channels cannot be exchanged, saying why.
    """

    def __init__(self, whole: Whole) -> None:
        check_exchangeable(whole)
        self.whole = whole
        self.moves: list[Move] = []
        self._since = FLOOR
        for part in whole.parts:
            if part.drops and part.recent is None:
                part.recent = mx.zeros((0, part.units))

    def prefilled(self) -> None:
        """Note that the prompt has been read."""
        self._keep(0)

    def note(self, stood: int, rejected: int) -> None:
        """Note a check.

        Args:
            stood: tokens that the check read and that stay.
            rejected: tokens after them that do not stay.
        """
        self._keep(rejected)
        self._since += stood

    def decide(self, token: int) -> None:
        """Have the next check exchange channels, if that is worth it.

        Args:
            token: number of tokens that the answer has.
        """
        if self._since < FLOOR:
            return
        indices, kept, best = [], [], []
        for part in self.whole.parts:
            if not part.drops:
                indices.append(part.index)
                continue
            use = _use(part.recent)
            order = np.argsort(-use, kind="stable")[: part.index.size]
            indices.append(mx.array(np.sort(order).astype(np.int32)))
            total = max(float(use.sum()), 1e-30)
            kept.append(float(use[np.array(part.index)].sum()) / total)
            best.append(float(use[order].sum()) / total)
        move = Move(token, float(np.mean(kept)), float(np.mean(best)))
        if move.best - move.kept >= GAIN:
            self.whole.exchange(indices)
            self.moves.append(move)
            self._since = 0

    def _keep(self, rejected: int) -> None:
        parts = [part for part in self.whole.parts if part.drops]
        for part in parts:
            recent = part.recent
            assert recent is not None
            part.recent = recent[: len(recent) - rejected][-RECENT:]
        mx.eval([part.recent for part in parts])


def check_exchangeable(whole: Whole) -> None:
    """Raise ``ValueError`` if kept channels cannot be exchanged during a check."""
    name = type(whole.model).__module__.rpartition(".")[2]
    if any(part.gate is not None for part in whole.parts):
        raise ValueError(
            "reselect=drift does not go with a trained predictor's soft gates, which are "
            "known of the channels alone that it chose; leave reselect out."
        )
    if not whole.visits_once:
        raise ValueError(
            f"reselect=drift does not go with the model type {name}, which goes through "
            "its layers several times; leave reselect out."
        )
    inlets = whole.plan.inlets(whole.model)
    pairs = zip(inlets, whole.parts, strict=True)
    if any(
        is_quantised(inlet) and part.drops and not part.whole for inlet, part in pairs
    ):
        raise ValueError(
            "reselect=drift does not go with a selection of whole quantisation groups; "
            "select single channels, or leave reselect out."
        )


def _use(recent: mx.array | None) -> np.ndarray:
    """Return how much some tokens use each channel, float32 ``[F]``, later ones more; each
    token's energy is 1.
    """
    assert recent is not None
    square = np.square(np.array(recent.astype(mx.float32)))
    share = square / np.maximum(square.sum(axis=1, keepdims=True), 1e-30)
    ages = np.arange(len(share))[::-1]
    return np.asarray(0.5 ** (ages / HALF_LIFE), dtype=np.float32) @ share
