"""The warm start of IFP's predictor: masks that stay the same within a task."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.optimizers import AdamW, clip_grad_norm
from mlx.utils import tree_flatten

from ifp_mlx.selection.predictor import SparsityPredictor
from ifp_mlx.training import warm_start
from ifp_mlx.training.batches import Batch
from ifp_mlx.training.step import schedule

from .lab import Lab

PREDICTOR_RANK = 32
WARM_LR = 3e-3  # of the predictor alone, after its head is solved
WARM_BATCHES = 64  # of training examples, from which the head is solved


@dataclass(frozen=True)
class Groups:
    """A division of the questions; each group is to get masks of its own.

    Attributes:
        count: of groups.
        of: a batch to the group of each of its rows.
    """

    count: int
    of: Callable[[Batch], np.ndarray]


def by_task(lab: Lab) -> Groups:
    """Return the division by the task that a question was drawn from."""
    return Groups(len(lab.tasks), lambda batch: np.array(batch.tasks))


def new_predictor(lab: Lab, model: nn.Module | None, pooling: Any) -> SparsityPredictor:
    """Return a predictor of one layer: random, or the first layer of ``model``."""
    from mlx_lm.models import llama

    scale = lab.scale
    config = scale.config(scale.channels if model else scale.width)
    config["num_hidden_layers"] = 1
    mx.random.seed(lab.seed + 1)
    backbone = llama.Model(llama.ModelArgs.from_dict(config))
    if model is not None:
        weights = dict(tree_flatten(model.parameters()))
        names = [name for name, _ in tree_flatten(backbone.parameters())]
        backbone.load_weights([(name, weights[name]) for name in names])
    size = scale.layers, scale.channels
    predictor = SparsityPredictor(
        backbone, *size, PREDICTOR_RANK, config=config, pooling=pooling
    )
    mx.eval(predictor.parameters())
    return predictor


def warm_predictor(
    lab: Lab, model: nn.Module, groups: Groups | None = None
) -> tuple[SparsityPredictor, dict[str, Any]]:
    """Return a predictor whose head is solved from the dense model's own channels.

    What is wanted of it are masks that stay the same for all questions of a task, and
    differ between tasks. So it regresses what a task uses on average, and not what
    each question uses, from what its backbone makes of the question. Every direction
    in which tasks differ counts the same.
    """
    groups = groups or by_task(lab)
    predictor = new_predictor(lab, model, "mean")
    batches = [lab.data(number) for number in range(WARM_BATCHES)]
    used = np.concatenate([warm_start.channel_importance(model, b) for b in batches])
    group = np.concatenate([groups.of(batch) for batch in batches])
    x = [np.array(predictor.features(b.instruction, b.lengths)) for b in batches]
    codes, channels = _codes(used.reshape(len(used), -1), group, groups.count)
    features = np.concatenate(x).astype(np.float64)
    middle, wanted = features.mean(axis=0), codes[group]
    features -= middle
    fit = ridge(features, wanted)
    left = ((wanted - features @ fit) ** 2).sum() / (wanted**2).sum()
    predictor.reduce.weight = mx.array(fit.T.astype(np.float32))
    predictor.reduce.bias = mx.array((-middle @ fit).astype(np.float32))
    predictor.expand.weight = mx.array(channels.T.astype(np.float32))
    predictor.expand.bias = mx.zeros_like(predictor.expand.bias)
    found = {"explained_in_closed_form": 1 - float(left), "rank": codes.shape[1]}
    codes = codes.astype(np.float32)
    found["explained"] = 1 - _regress(lab, predictor, mx.array(codes), groups)
    warm_start.scale_layers(predictor, batches, centred=True)
    return predictor, {"warm_start": found}


def _regress(
    lab: Lab, predictor: SparsityPredictor, codes: mx.array, groups: Groups
) -> float:
    """Train the predictor alone to tell tasks apart; return the part left at the end."""

    def loss(batch: Batch, group: mx.array) -> mx.array:
        reduced = predictor.reduce(predictor.features(batch.instruction, batch.lengths))
        wanted = codes[group]
        return mx.square(reduced - wanted).sum() / mx.square(wanted).sum()

    optimizer = AdamW(schedule(WARM_LR, 20, lab.scale.warm_steps), bias_correction=True)
    gradient, left = nn.value_and_grad(predictor, loss), mx.array(1.0)
    for number in range(lab.scale.warm_steps):
        batch = lab.data(number)
        left, grads = gradient(batch, mx.array(groups.of(batch)))
        optimizer.update(predictor, clip_grad_norm(grads, 1.0)[0])
        mx.eval(predictor.parameters(), optimizer.state)
    return float(left)


def _codes(
    used: np.ndarray, group: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return orthogonal codes of the groups ``[N, r]``, and their channels ``[r, L·F]``."""
    found = np.unique(group)
    means = np.stack([used[group == number].mean(axis=0) for number in found])
    means -= means.mean(axis=0)
    means /= means.std(axis=0) + 1e-6
    u, s, vt = np.linalg.svd(means, full_matrices=False)
    some = np.flatnonzero(s > 0.05 * s[0])[:PREDICTOR_RANK]
    codes = np.zeros((count, len(some)))
    codes[found] = u[:, some] * np.sqrt(len(found))
    return codes, vt[some]


def ridge(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the weights that foretell ``y`` from ``x``, held a little to zero."""
    square = x.T @ x
    strength = 1e-3 * np.trace(square) / len(square) * np.eye(len(square))
    return np.linalg.solve(square + strength, x.T @ y)
