"""The rows of the comparison: each trains a model and says how it selects."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.optimizers import AdamW, clip_grad_norm
from mlx.utils import tree_flatten
from tqdm import tqdm

from ifp_mlx.data import Batch
from ifp_mlx.masks import select
from ifp_mlx.predictor import SparsityPredictor
from ifp_mlx.pruning import slice_model
from ifp_mlx.training import warm_start
from ifp_mlx.training.maskers import (
    Budget,
    FixedMask,
    Masker,
    PredictorMasker,
    ScoreTable,
)
from ifp_mlx.training.step import schedule, target_losses

from .lab import DENSE, Lab, Trained, importance
from .tasks import all_tasks

PREDICTOR_RANK = 32
EXPERTS = 8
WARM_LR = 3e-3  # of the predictor alone, after that
WARM_BATCHES = 64  # of training examples, from which the head is solved
CLUSTERS = 32  # of questions, where the names of the tasks are not used

LabelOf = Callable[[Batch], np.ndarray]  # a batch to the group of each of its rows


def dense_full(lab: Lab) -> Trained:
    """Train the dense model to the end: what pruning starts from, and the bound."""
    model = lab.dense(lab.scale.steps)
    return _plain(lab, model, lab.scale.start_steps + lab.scale.steps)


def dense_small(lab: Lab) -> Trained:
    """Train a dense model of the activated size from scratch, on the same examples."""
    steps = lab.scale.start_steps + lab.scale.steps
    return _small(lab, steps)


def dense_small_compute(lab: Lab) -> Trained:
    """Train it on more examples, until it has cost what all of IFP's stages cost."""
    scale = lab.scale
    full = scale.compute(scale.channels)
    # The predictor is a copy of the first layer, and reads three quarters of a row.
    predictor = 0.75 * (full - scale.width * 512) / scale.layers
    total = scale.start_steps * full + scale.steps * (full + predictor)
    return _small(lab, round(total / scale.compute(scale.kept)))


def dense_small_long(lab: Lab) -> Trained:
    """Train it on three times the examples: has it learned what it can by then?"""
    return _small(lab, 3 * (lab.scale.start_steps + lab.scale.steps))


def static(lab: Lab) -> Trained:
    """Prune once by activation × weight, then train on."""
    model = _pruned(lab)
    lab.fit(model, DENSE, lab.scale.steps, first=lab.scale.start_steps)
    return _pruned_row(lab, model)


def static_distil(lab: Lab) -> Trained:
    """The same, with the KL from the fully trained dense model as half of the loss."""
    teacher = lab.dense(lab.scale.steps)
    model = _pruned(lab)
    lab.fit(
        model,
        DENSE,
        lab.scale.steps,
        first=lab.scale.start_steps,
        parent=lambda batch: teacher(batch.tokens[:, :-1]),
        ce_weight=0.5,
        kl_weight=0.5,
    )
    return _pruned_row(lab, model)


def static_learned(lab: Lab) -> Trained:
    """Learn one mask for all tasks through the soft top-k."""
    model = lab.dense(0)
    prior = np.log(importance(lab, model))
    table = prior / prior.std(axis=-1, keepdims=True)
    return _masked(lab, model, ScoreTable(mx.array(table.astype(np.float32))))


def task_random(lab: Lab) -> Trained:
    """Give every task a random mask, and the model the true task: an oracle."""
    scale = lab.scale
    rng = np.random.default_rng(lab.seed)
    scores = rng.random((len(all_tasks()), scale.layers, scale.channels))
    order = np.argsort(np.argsort(-scores, axis=-1), axis=-1)
    mask = FixedMask(mx.array((order < scale.kept).astype(np.float32)))
    return _masked(lab, lab.dense(0), mask)


def task_learned(lab: Lab) -> Trained:
    """Learn a mask for every task, and give the model the true task: an oracle."""
    model = lab.dense(0)
    sums = np.zeros((len(all_tasks()), lab.scale.layers, lab.scale.channels))
    counts = np.zeros(len(sums))
    for number in range(WARM_BATCHES):
        batch = lab.data(number)
        used, task = warm_start.channel_importance(model, batch), np.array(batch.tasks)
        np.add.at(sums, task, used)
        np.add.at(counts, task, 1)
    mean = sums / np.maximum(counts, 1)[:, None, None]
    centred = mean - mean[counts > 0].mean(axis=0)
    centred /= centred[counts > 0].std(axis=-1).mean(axis=0)[:, None] + 1e-6
    return _masked(lab, model, ScoreTable(mx.array(centred.astype(np.float32))))


def moe(lab: Lab) -> Trained:
    """Train a stock mixture of experts: a quarter of the experts' channels per token."""
    from mlx_lm.models import mixtral

    scale = lab.scale
    config = scale.config(scale.channels // EXPERTS)
    config |= {"num_local_experts": EXPERTS, "model_type": "mixtral"}
    config["num_experts_per_tok"] = EXPERTS * scale.kept // scale.channels
    mx.random.seed(lab.seed)
    model = mixtral.Model(mixtral.ModelArgs.from_dict(config))
    steps = scale.start_steps + scale.steps
    optimizer = AdamW(schedule(scale.lr, 50, steps), bias_correction=True)

    def loss(batch: Batch) -> mx.array:
        losses = target_losses(model(batch.tokens[:, :-1]), batch)
        return losses.sum() / batch.loss_mask[:, 1:].sum()

    gradient = nn.value_and_grad(model, loss)
    for number in tqdm(range(steps), disable=None, unit="step"):
        _, grads = gradient(lab.data(number))
        optimizer.update(model, clip_grad_norm(grads, 1.0)[0])
        mx.eval(model.parameters(), optimizer.state)
    spent = steps * scale.compute(scale.kept) / scale.compute(scale.channels)
    return Trained(model, DENSE, Budget(scale.kept), spent, {})


def activation(lab: Lab) -> Trained:
    """Select from the fully trained dense model without training (GRIFFIN)."""
    model = lab.dense(lab.scale.steps)
    budget = Budget(lab.scale.kept, gates="binary")
    spent = float(lab.scale.start_steps + lab.scale.steps)
    return Trained(model, ActivationMasker(model), budget, spent, {})


def ifp_naive(lab: Lab) -> Trained:
    """IFP with a new predictor, one learning rate for all, and nothing else."""
    predictor = new_predictor(lab, None, "last")
    model = lab.dense(0)
    return _masked(lab, model, PredictorMasker(predictor), masker_lr=lab.scale.lr)


def ifp(lab: Lab) -> Trained:
    """IFP as it learns reliably: warm-started, decorrelated, a slow predictor."""
    model = lab.dense(0)
    predictor, extra = warm_predictor(lab, model)
    trained = _masked(lab, model, PredictorMasker(predictor))
    trained.extra.update(extra)
    return trained


def ifp_clusters(lab: Lab) -> Trained:
    """IFP that is never told a task: its warm start groups the questions by itself."""
    model = lab.dense(0)
    label = clusters(lab, model)
    predictor, extra = warm_predictor(lab, model, label)
    trained = _masked(lab, model, PredictorMasker(predictor))
    trained.extra.update(extra | _agreement(lab, label))
    return trained


def ifp_both_stages(lab: Lab) -> Trained:
    """IFP with half of its steps in the stage ``pretrain``, and half in ``sft``."""
    model, scale = lab.dense(0), lab.scale
    predictor, extra = warm_predictor(lab, model)
    masker, half = PredictorMasker(predictor), scale.steps // 2
    first = scale.start_steps
    lab.fit(model, masker, half, first=first, batches=lab.data.chunks)
    trained = _masked(lab, model, masker, steps=scale.steps - half, first=first + half)
    trained.spent = float(scale.start_steps + scale.steps)
    trained.extra.update(extra)
    return trained


def task_names(batch: Batch) -> np.ndarray:
    """Return the task that every row was drawn from."""
    return np.array(batch.tasks)


def clusters(lab: Lab, model: nn.Module) -> LabelOf:
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
    fit = _ridge(x - middle, used)
    points = (x - middle) @ fit
    _, axes = np.linalg.eigh(points.T @ points)
    axes = axes[:, -PREDICTOR_RANK:]
    centres = kmeans(points @ axes, CLUSTERS, lab.seed)

    def label(batch: Batch) -> np.ndarray:
        return nearest((features(batch) - middle) @ fit @ axes, centres)

    return label


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


def _agreement(lab: Lab, label: LabelOf) -> dict[str, float]:
    """Return the share of training questions whose group's commonest task is theirs."""
    batches = [lab.data(number) for number in range(WARM_BATCHES)]
    pairs = np.zeros((CLUSTERS, len(all_tasks())))
    for batch in batches:
        np.add.at(pairs, (label(batch), task_names(batch)), 1)
    return {"purity": float(pairs.max(axis=1).sum() / pairs.sum())}


def _ridge(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    square = x.T @ x
    strength = 1e-3 * np.trace(square) / len(square) * np.eye(len(square))
    return np.linalg.solve(square + strength, x.T @ y)


def warm_predictor(
    lab: Lab, model: nn.Module, label: LabelOf = task_names
) -> tuple[SparsityPredictor, dict[str, Any]]:
    """Return a predictor whose head is solved from the dense model's own channels.

    What is wanted of it are masks that stay the same for all questions of a task, and
    differ between tasks. So it regresses what a task uses on average, and not what
    each question uses, from what its backbone makes of the question. Every direction
    in which tasks differ counts the same.
    """
    predictor = new_predictor(lab, model, "mean")
    batches = [lab.data(number) for number in range(WARM_BATCHES)]
    used = np.concatenate([warm_start.channel_importance(model, b) for b in batches])
    task = np.concatenate([label(batch) for batch in batches])
    x = [np.array(predictor.features(b.instruction, b.lengths)) for b in batches]
    codes, channels = _task_codes(used.reshape(len(used), -1), task)
    features = np.concatenate(x).astype(np.float64)
    middle, wanted = features.mean(axis=0), codes[task]
    features -= middle
    fit = _ridge(features, wanted)
    left = ((wanted - features @ fit) ** 2).sum() / (wanted**2).sum()
    predictor.reduce.weight = mx.array(fit.T.astype(np.float32))
    predictor.reduce.bias = mx.array((-middle @ fit).astype(np.float32))
    predictor.expand.weight = mx.array(channels.T.astype(np.float32))
    predictor.expand.bias = mx.zeros_like(predictor.expand.bias)
    found = {"explained_in_closed_form": 1 - float(left), "rank": codes.shape[1]}
    codes = codes.astype(np.float32)
    found["explained"] = 1 - _regress(lab, predictor, mx.array(codes), label)
    warm_start.scale_layers(predictor, batches, centred=True)
    return predictor, {"warm_start": found}


def _regress(
    lab: Lab, predictor: SparsityPredictor, codes: mx.array, label: LabelOf
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
        left, grads = gradient(batch, mx.array(label(batch)))
        optimizer.update(predictor, clip_grad_norm(grads, 1.0)[0])
        mx.eval(predictor.parameters(), optimizer.state)
    return float(left)


def _task_codes(used: np.ndarray, task: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return orthogonal codes of the tasks ``[N, r]``, and their channels ``[r, L·F]``."""
    found = np.unique(task)
    means = np.stack([used[task == number].mean(axis=0) for number in found])
    means -= means.mean(axis=0)
    means /= means.std(axis=0) + 1e-6
    u, s, vt = np.linalg.svd(means, full_matrices=False)
    some = np.flatnonzero(s > 0.05 * s[0])[:PREDICTOR_RANK]
    codes = np.zeros((max(CLUSTERS, len(all_tasks())), len(some)))
    codes[found] = u[:, some] * np.sqrt(len(found))
    return codes, vt[some]


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


class ActivationMasker(Masker):
    """Training-free selection: what the instruction's tokens use.

    Args:
        model: the dense model, which reads the instruction.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = [model]  # in a list, so that it is not a part of this module

    def scores(self, batch: Batch) -> mx.array:
        """Return the log of each channel's use, ``[B, L, F]``."""
        from ifp_mlx.pruning import set_masks
        from ifp_mlx.training.maskers import masked_layers

        layers = masked_layers(self._model[0])
        set_masks(layers, mx.ones((len(layers), 1)))
        width = batch.instruction.shape[1]
        last = mx.arange(width) == batch.lengths[:, None] - 1
        alone = batch._replace(
            tokens=mx.pad(batch.instruction, [(0, 0), (0, 1)]),
            loss_mask=mx.pad(last.astype(mx.float32), [(0, 0), (0, 1)]),
        )
        return mx.array(warm_start.channel_importance(self._model[0], alone))


def _plain(lab: Lab, model: nn.Module, steps: float) -> Trained:
    return Trained(model, DENSE, Budget(lab.scale.kept), steps, {})


def _small(lab: Lab, steps: int) -> Trained:
    scale = lab.scale
    model = lab.new_model(scale.kept)
    lab.fit(model, DENSE, steps, target_size=scale.kept)
    spent = steps * scale.compute(scale.kept) / scale.compute(scale.channels)
    return Trained(model, DENSE, Budget(scale.kept), spent, {"steps": steps})


def _pruned(lab: Lab) -> nn.Module:
    model = lab.dense(0)
    scores = mx.array(importance(lab, model).astype(np.float32))
    slice_model(model, select(scores, [lab.scale.kept] * lab.scale.layers))
    return model


def _pruned_row(lab: Lab, model: nn.Module) -> Trained:
    scale = lab.scale
    share = scale.compute(scale.kept) / scale.compute(scale.channels)
    return _plain(lab, model, scale.start_steps + share * scale.steps)


def _masked(
    lab: Lab,
    model: nn.Module,
    masker: Masker,
    *,
    steps: int | None = None,
    first: int | None = None,
    **changes: Any,
) -> Trained:
    scale = lab.scale
    steps, first = steps or scale.steps, first or scale.start_steps
    log = lab.fit(model, masker, steps, first=first, **changes)
    budget = lab.config(steps, **changes).budget(scale.channels)
    extra = {"train_loss": log[-1]["loss"]}
    return Trained(model, masker, budget, float(scale.start_steps + steps), extra)


ROWS: dict[str, Callable[[Lab], Trained]] = {
    function.__name__: function
    for function in (
        dense_full,
        dense_small,
        static,
        static_distil,
        ifp,
        ifp_naive,
        task_random,
        dense_small_compute,
        static_learned,
        activation,
        moe,
        task_learned,
        ifp_both_stages,
        ifp_clusters,
        dense_small_long,
    )
}
CONTROLS = ("ifp_clusters", "dense_small_long")  # on the seed that tuning was done on
