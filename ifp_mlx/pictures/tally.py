"""What selections have in common, counted: the numbers behind every picture."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..evaluation.tasks import overlap
from ..selection.masks import Selection


@dataclass(frozen=True)
class Tally:
    """Named selections of one model, and what they share.

    Attributes:
        names: ``N`` names.
        selections: as many, of equal shape.
    """

    names: Sequence[str]
    selections: Sequence[Selection]

    @cached_property
    def masks(self) -> np.ndarray:
        """Whether a unit is kept, bool ``[N, L, F]``; gates count as kept."""
        shape = (len(self.names), len(self.sizes[0]), self.channels)
        masks = np.zeros(shape, dtype=bool)
        for mask, selection in zip(masks, self.selections, strict=True):
            for row, index in zip(mask, selection.indices, strict=True):
                row[np.array(index)] = True
        return masks

    @property
    def channels(self) -> int:
        """``F``; of experts, how many there are."""
        return self.selections[0].channels

    @property
    def units(self) -> str:
        """What is kept, in words: channels or experts."""
        return f"{self.selections[0].unit}s"

    @property
    def sizes(self) -> np.ndarray:
        """Kept units, ``[N, L]``."""
        return np.array([selection.sizes for selection in self.selections])

    @cached_property
    def kept_by(self) -> np.ndarray:
        """How many selections keep a unit, ``[L, F]``."""
        return self.masks.sum(axis=0)

    @cached_property
    def shares(self) -> np.ndarray:
        """Shares of the units kept by exactly 0 … ``N`` selections,
        ``[L, N + 1]``.
        """
        counts = range(len(self.names) + 1)
        return np.stack([(self.kept_by == n).mean(axis=1) for n in counts], axis=1)

    @property
    def always(self) -> np.ndarray:
        """Share of the units that all selections keep, ``[L]``."""
        return self.shares[:, -1]

    @property
    def always_by_chance(self) -> np.ndarray:
        """The same for random selections of these sizes, ``[L]``."""
        return np.prod(self.sizes / self.channels, axis=0)

    @cached_property
    def overlaps(self) -> np.ndarray:
        """The overlap of every two selections and its chance level,
        ``[N, N, L, 2]``; see :func:`ifp_mlx.evaluation.tasks.overlap`.
        """
        pairs = [[overlap(a, b) for b in self.selections] for a in self.selections]
        return np.array(pairs)

    @cached_property
    def by_depth(self) -> np.ndarray:
        """The overlaps of every pair of different selections,
        ``[N (N - 1) / 2, L, 2]``.
        """
        return self.overlaps[np.triu_indices(len(self.names), 1)]

    def pairs(self) -> list[tuple[str, str, np.ndarray]]:
        """Return :attr:`by_depth` with the names of every pair."""
        numbers = zip(*np.triu_indices(len(self.names), 1), strict=True)
        names = [(self.names[int(a)], self.names[int(b)]) for a, b in numbers]
        return [(*two, found) for two, found in zip(names, self.by_depth, strict=True)]

    @cached_property
    def pruned(self) -> list[int]:
        """The layers in which a selection drops something."""
        some = (self.sizes < self.channels).any(axis=0)
        return [int(layer) for layer in np.flatnonzero(some)]

    @property
    def shown_layers(self) -> list[int]:
        """The first, the middle and the last of the pruned layers.

        Source: Hou et al. 2025 (arXiv:2501.02086) fig. 3.
        """
        found = self.pruned or list(range(self.sizes.shape[1]))
        return sorted({found[0], found[len(found) // 2], found[-1]})

    @cached_property
    def order(self) -> np.ndarray:
        """Every layer's units, those that most selections keep first, then by
        which selections these are, ``[L, F]``.
        """
        keys = [~mask for mask in self.masks[::-1]]
        return np.lexsort((*keys, -self.kept_by), axis=-1)

    def bits(self) -> str:
        """Return the masks as base64 of ``N * L * F`` bits, lowest bit first."""
        packed = np.packbits(self.masks.ravel(), bitorder="little")
        return base64.b64encode(packed.tobytes()).decode("ascii")
