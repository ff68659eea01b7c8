"""The rows of the comparison: each trains a model and says how it selects."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.optimizers import AdamW, clip_grad_norm
from tqdm import tqdm

from ifp_mlx.selection.top_k import select
from ifp_mlx.slicing.plan import plan_of
from ifp_mlx.slicing.sliced import slice_model
from ifp_mlx.training import warm_start
from ifp_mlx.training.batches import Batch
from ifp_mlx.training.maskers import (
    Budget,
    FixedMask,
    Masker,
    PredictorMasker,
    ScoreTable,
)
from ifp_mlx.training.step import schedule, target_losses

from .groups import agreement, clusters, paraphrases
from .lab import DENSE, Lab, Trained, importance
from .warm import WARM_BATCHES, new_predictor, warm_predictor

EXPERTS = 8


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


def dense_small_longest(lab: Lab) -> Trained:
    """Train it on six times the examples: does it still learn after three?"""
    return _small(lab, 6 * (lab.scale.start_steps + lab.scale.steps))


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
    scores = rng.random((len(lab.tasks), scale.layers, scale.channels))
    order = np.argsort(np.argsort(-scores, axis=-1), axis=-1)
    mask = FixedMask(mx.array((order < scale.kept).astype(np.float32)))
    return _masked(lab, lab.dense(0), mask)


def task_learned(lab: Lab) -> Trained:
    """Learn a mask for every task, and give the model the true task: an oracle."""
    model = lab.dense(0)
    sums = np.zeros((len(lab.tasks), lab.scale.layers, lab.scale.channels))
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
    groups = clusters(lab, model)
    predictor, extra = warm_predictor(lab, model, groups)
    trained = _masked(lab, model, PredictorMasker(predictor))
    trained.extra.update(extra | agreement(lab, groups))
    return trained


def ifp_paraphrases(lab: Lab) -> Trained:
    """The same with groups by the words, where equal answers show what is a paraphrase."""
    model = lab.dense(0)
    groups = paraphrases(lab)
    predictor, extra = warm_predictor(lab, model, groups)
    trained = _masked(lab, model, PredictorMasker(predictor))
    trained.extra.update(extra | agreement(lab, groups))
    alone = agreement(lab, paraphrases(lab, described=False))
    trained.extra["purity_of_questions_alone"] = alone["purity"]
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
        from ifp_mlx.slicing.masked import set_masks
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
    selection = select(scores, [lab.scale.kept] * lab.scale.layers)
    slice_model(model, plan_of(lab.dense(0)), selection)
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
        ifp_paraphrases,
        dense_small_long,
        dense_small_longest,
    )
}
# Rows that ran only on the seed that choices were made on.
CONTROLS = (
    "ifp_clusters",
    "ifp_paraphrases",
    "dense_small_long",
    "dense_small_longest",
)
