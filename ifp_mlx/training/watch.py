"""Do the masks still depend on the instruction? Measured, and a loud stop if not."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from .batches import Batch
from .maskers import Budget, Masker


@dataclass(frozen=True)
class Overlap:
    """The share of kept units that two instructions have in common, mean over pairs and
    layers.

    Attributes:
        within: of different instructions of one task; ``None`` without such pairs.
        between: of instructions of different tasks, or of any two where the tasks are
            not known.
        chance: the share of two random masks, ``k / F``.
    """

    within: float | None
    between: float
    chance: float

    @property
    def dependence(self) -> float:
        """0 when all instructions keep the same units, 1 when they are as different
        as random masks, more when they avoid each other.
        """
        return (1 - self.between) / max(1 - self.chance, 1e-9)

    def report(self) -> dict[str, float]:
        """Return it as entries of a log."""
        log = {
            "overlap_between": self.between,
            "overlap_chance": self.chance,
            "dependence": self.dependence,
        }
        return log if self.within is None else {"overlap_within": self.within, **log}


def mask_overlap(
    masker: Masker, batches: Iterable[Batch], budget: Budget
) -> Overlap | None:
    """Measure the overlap of hard masks between the rows of some batches.

    Args:
        masker: where the masks come from.
        batches: together at least two different instructions.
        budget: how scores become masks.

    Returns:
        The overlap, or ``None`` where all rows have one mask by construction, or there
        are no two different instructions.

    Source: Hou et al. 2025 (arXiv:2501.02086) fig. 3.
    """
    rows, tasks, texts = [], [], []
    for batch in batches:
        masks = masker(batch, budget, "binary")
        if masks is None or masks.ndim == 2:
            return None
        kept = np.array(masks[:, :, 0].transpose(1, 0, 2), dtype=np.float32)
        rows.append(kept.reshape(len(kept), -1))
        lengths = np.array(batch.lengths)
        alone = -np.ones(len(lengths), dtype=np.int32)
        tasks.append(alone if batch.tasks is None else np.array(batch.tasks))
        padded = np.array(batch.instruction)
        texts += [row[:n].tobytes() for row, n in zip(padded, lengths, strict=True)]
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    text = np.array([numbers[text] for text in texts])
    return _overlap(np.concatenate(rows), np.concatenate(tasks), text)


def _overlap(masks: np.ndarray, task: np.ndarray, text: np.ndarray) -> Overlap | None:
    """Compare every pair of rows of ``masks``, ``[N, L·F]``."""
    kept = masks[0].sum()
    shared = masks @ masks.T / kept
    different = np.triu(text[:, None] != text, 1)
    alike = (task[:, None] == task) & (task >= 0)
    within, between = different & alike, different & ~alike
    if not between.any():
        between = within  # one task alone: any two instructions
    if not between.any():
        return None
    return Overlap(
        float(shared[within].mean()) if within.any() else None,
        float(shared[between].mean()),
        float(kept / masks.shape[1]),
    )


class CollapsedError(ValueError):
    """The masks no longer depend on the instruction."""


@dataclass
class Watcher:
    """Raises once the masks have been the same for all instructions for a while.

    The loss does not show it: a run whose predictor has collapsed is a run with a
    static mask, and learns as smoothly.

    Attributes:
        floor: the least :attr:`Overlap.dependence`.
        patience: after how many validations in a row below the floor it raises.
    """

    floor: float = 0.1
    patience: int = 2
    _below: int = field(default=0, repr=False)

    def __call__(self, report: Mapping[str, float]) -> None:
        """Look at one validation.

        Args:
            report: with the entries of :meth:`Overlap.report`; without them, or where
                nearly everything is kept, there is nothing to judge.

        Raises:
            CollapsedError: with what can be done.
        """
        if report.get("overlap_chance", 1.0) > 0.95:
            return
        self._below = self._below + 1 if report["dependence"] < self.floor else 0
        if self._below >= self.patience:
            raise CollapsedError(
                "The masks no longer depend on the instruction: two different ones share "
                f"{report['overlap_between']:.3f} of what they keep, random masks "
                f"{report['overlap_chance']:.3f}. Such a model is a statically pruned "
                "one. Warm-start the predictor, give it a tenth of the model's learning "
                "rate, or centre its scores; watch: off trains on."
            )
