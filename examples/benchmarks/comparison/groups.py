"""Groups of questions, for a warm start that is never told the name of a task."""

import mlx.nn as nn
import numpy as np

from ifp_mlx.training import warm_start
from ifp_mlx.training.batches import Batch

from .corpus import VOCABULARY
from .lab import Lab
from .warm import (
    PREDICTOR_RANK,
    WARM_BATCHES,
    Groups,
    new_predictor,
    ridge,
)

CLUSTERS = 32
DIRECTIONS = 24  # in which instructions are compared by their words
SEEN_BATCHES = 512  # of training examples, whose words are looked at


def clusters(lab: Lab, model: nn.Module) -> Groups:
    """Return k-means groups of questions by the channel use that they foretell.

    What a question's own use is regressed on is what the dense model's first layer
    makes of it, so that a new question is put into a group without its answer.
    """
    reader = new_predictor(lab, model, "mean")
    batches = [lab.data(number) for number in range(WARM_BATCHES)]

    def features(batch: Batch) -> np.ndarray:
        return np.array(reader.features(batch.instruction, batch.lengths), np.float64)

    x = np.concatenate([features(batch) for batch in batches])
    used = np.concatenate([warm_start.channel_importance(model, b) for b in batches])
    used = used.reshape(len(used), -1)
    used = (used - used.mean(axis=0)) / (used.std(axis=0) + 1e-6)
    middle = x.mean(axis=0)
    fit = ridge(x - middle, used)
    points = (x - middle) @ fit
    _, axes = np.linalg.eigh(points.T @ points)
    axes = axes[:, -PREDICTOR_RANK:]
    centres = kmeans(points @ axes, CLUSTERS, lab.seed)

    def label(batch: Batch) -> np.ndarray:
        return nearest((features(batch) - middle) @ fit @ axes, centres)

    return Groups(CLUSTERS, label)


def paraphrases(lab: Lab, *, described: bool = True) -> Groups:
    """Return k-means groups of instructions by the words that tell tasks apart.

    Training examples with the same answer mostly ask the same in other words, so what
    differs between their instructions says nothing of the task: openings, phrases,
    endings, and where the description of a task selects, the key as well. Words count
    the less the more they differ so; what varies most in the rest is the task.

    Args:
        lab: whose training examples are grouped.
        described: look at what selects, which may be the description of the task;
            else at the question, always.
    """
    seen = min(SEEN_BATCHES, len(lab.data.order))
    batches = [lab.data(number) for number in range(seen)]
    bags = np.concatenate([words(batch, described) for batch in batches])
    alike: dict[tuple, list[int]] = {}
    for row, answer in enumerate(a for batch in batches for a in answers(batch)):
        alike.setdefault(answer, []).append(row)
    apart = [bags[rows] - bags[rows].mean(axis=0) for rows in alike.values()]
    rest = np.concatenate(apart)
    noise, turn = np.linalg.eigh(rest.T @ rest / (len(rest) - len(alike)))
    quiet = turn / np.sqrt(np.maximum(noise, 0) + 1e-3) @ turn.T
    middle = bags.mean(axis=0)
    points = (bags - middle) @ quiet
    _, axes = np.linalg.eigh(points.T @ points)
    fit = quiet @ axes[:, -DIRECTIONS:]
    centres = kmeans((bags - middle)[:4096] @ fit, CLUSTERS, lab.seed)

    def label(batch: Batch) -> np.ndarray:
        return nearest((words(batch, described) - middle) @ fit, centres)

    return Groups(CLUSTERS, label)


def words(batch: Batch, described: bool = True) -> np.ndarray:
    """Return which tokens occur in what selects, or in the question, ``[B, V]``."""
    tokens, lengths = np.array(batch.instruction), np.array(batch.lengths)
    if not described:
        tokens, lengths = np.array(batch.tokens), np.array(batch.loss_mask).argmax(1)
    rows, places = np.nonzero(np.arange(tokens.shape[1]) < lengths[:, None])
    found = np.zeros((len(tokens), VOCABULARY))
    found[rows, tokens[rows, places]] = 1
    return found


def answers(batch: Batch) -> list[tuple[int, ...]]:
    """Return the tokens of every answer."""
    pairs = zip(np.array(batch.tokens), np.array(batch.loss_mask) > 0, strict=True)
    return [tuple(tokens[counts]) for tokens, counts in pairs]


def kmeans(points: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return the best of ten sets of ``count`` centres, ``[count, D]``."""
    rng = np.random.default_rng(seed)
    best = (np.inf, points[:count])
    for _ in range(10):
        centres = points[rng.choice(len(points), count, replace=False)]
        for _ in range(50):
            group = nearest(points, centres)
            centres = np.stack(
                [
                    points[group == g].mean(axis=0) if (group == g).any() else c
                    for g, c in enumerate(centres)
                ]
            )
        loss = float(np.square(points - centres[nearest(points, centres)]).sum())
        best = min(best, (loss, centres), key=lambda found: found[0])
    return best[1]


def nearest(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Return the number of the centre nearest to every point."""
    square = np.square(centres).sum(axis=1) - 2 * points @ centres.T
    return square.argmin(axis=1)


def agreement(lab: Lab, groups: Groups) -> dict[str, float]:
    """Return the share of training questions whose group's commonest task is theirs."""
    batches = [lab.data(number) for number in range(WARM_BATCHES)]
    pairs = np.zeros((groups.count, len(lab.tasks)))
    for batch in batches:
        np.add.at(pairs, (groups.of(batch), np.array(batch.tasks)), 1)
    return {"purity": float(pairs.max(axis=1).sum() / pairs.sum())}
