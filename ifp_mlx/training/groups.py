"""Which training examples belong together, for masks that stay the same within a task.

If masks differ between two wordings of one question, the model learns less than with
one mask for all; it learns most if masks are the same within a task and differ between
tasks. Rows may name their task. Where they do not, examples with the same answer mostly
ask the same in other words, so words that differ between their instructions say nothing
of the task.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from .batches import Record

How = Literal["auto", "task", "words", "off"]
CLUSTERS = 32
DIRECTIONS = 24  # of word counts, in which instructions are compared
WORDS = 512  # the commonest tokens are looked at
FITTED = 4096  # examples that centres are found from


def groups_of(records: Sequence[Record], how: How, seed: int) -> np.ndarray | None:
    """Return the number of every example's group, int ``[N]``; ``None`` if there are no
    groups.

    Args:
        records: the training examples.
        how: ``task`` by the rows' ``task``; ``words`` by the words that examples with
            the same answer share; ``auto`` for the first of these that the data allow.
        seed: for the k-means centres of ``words``.

    Raises:
        ValueError: if rows name no tasks, and are to be grouped by them.
    """
    if how == "off":
        return None
    tasks = np.array([record.task for record in records])
    several = len(np.unique(tasks)) > 1 and (tasks >= 0).all()
    if how == "task" and not several:
        raise ValueError(
            "groups: task needs rows that all have a task, of two or more; put task "
            "into every row, or use groups: words or off."
        )
    if how != "words" and several:
        return tasks
    answers = _answers(records)
    asked = {
        (a, r.instruction.tobytes()) for a, r in zip(answers, records, strict=True)
    }
    counts: dict[int, int] = {}
    for answer, _ in asked:
        counts[answer] = counts.get(answer, 0) + 1
    shared = np.mean([counts[answer] > 1 for answer in answers])
    return None if how == "auto" and shared < 0.5 else _by_words(records, answers, seed)


def _answers(records: Sequence[Record]) -> list[int]:
    """Return a number for the answer of every example; equal answers have one
    number.
    """
    numbers: dict[bytes, int] = {}
    texts = (record.tokens[record.loss].tobytes() for record in records)
    return [numbers.setdefault(text, len(numbers)) for text in texts]


def _by_words(records: Sequence[Record], answers: list[int], seed: int) -> np.ndarray:
    """Return k-means groups of instructions by the words that tell tasks apart: the
    less a word differs between examples with the same answer, the more it counts.
    """
    bags, answer = _bags(records), np.array(answers)
    order = np.argsort(answer, kind="stable")
    starts = np.flatnonzero(np.diff(answer[order], prepend=-1))
    sizes = np.diff(starts, append=len(order))
    means = np.add.reduceat(bags[order], starts) / sizes[:, None]
    apart = bags - means[answer]
    noise, turn = np.linalg.eigh(apart.T @ apart / max(1, len(bags) - len(starts)))
    quiet = turn / np.sqrt(np.maximum(noise, 0) + 1e-3) @ turn.T
    middle = bags.mean(axis=0)
    points = (bags - middle) @ quiet
    _, axes = np.linalg.eigh(points.T @ points)
    points = points @ axes[:, -DIRECTIONS:]
    some = np.random.default_rng(seed).permutation(len(points))[:FITTED]
    return nearest(points, kmeans(points[some], min(CLUSTERS, len(some)), seed))


def _bags(records: Sequence[Record]) -> np.ndarray:
    """Return which of the commonest tokens occur in each instruction, ``[N, V]``."""
    seen = [np.unique(record.instruction) for record in records]
    tokens, counts = np.unique(np.concatenate(seen), return_counts=True)
    kept = tokens[np.argsort(-counts, kind="stable")[:WORDS]]
    return np.stack([np.isin(kept, found) for found in seen]).astype(np.float64)


def kmeans(points: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return the best of ten sets of ``count`` centres, ``[count, D]``."""
    rng = np.random.default_rng(seed)
    best = (np.inf, points[:count])
    for _ in range(10):
        centres = points[rng.choice(len(points), count, replace=False)]
        for _ in range(50):
            group = nearest(points, centres)
            sums = np.zeros_like(centres)
            np.add.at(sums, group, points)
            sizes = np.bincount(group, minlength=count)[:, None]
            centres = np.where(sizes > 0, sums / np.maximum(sizes, 1), centres)
        loss = float(np.square(points - centres[nearest(points, centres)]).sum())
        best = min(best, (loss, centres), key=lambda found: found[0])
    return best[1]


def nearest(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Return the number of the centre nearest to every point."""
    square = np.square(centres).sum(axis=1) - 2 * points @ centres.T
    return square.argmin(axis=1)
