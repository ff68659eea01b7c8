"""Train a model and its masker together: one loss, one loop, and the command."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import mlx.core as mx
import mlx.nn as nn
from tqdm import tqdm

from .data import Batch
from .maskers import Budget, Form, Masker, checkpoint_layers
from .masks import check_multiple, target_size
from .step import Pair, Parent, Step, target_losses

Batches = Callable[[int], Batch]  # the number of a micro-batch to its global batch
Report = dict[str, float]


@dataclass
class TrainConfig:
    """Every setting of a training run, and the only place where a default stands."""

    keep: float = 0.5
    target_size: int | None = None
    granularity: int = 1
    gates: Literal["soft", "binary"] = "soft"
    temperature: float = 0.3
    anneal_keep: int = 0
    anneal_temperature: int = 0
    start_temperature: float = 1.0

    steps: int = 1000
    accumulate: int = 1
    lr: float = 1e-4
    masker_lr: float | None = None
    warmup: int = 0
    weight_decay: float = 0.01
    clip: float = 1.0
    ce_weight: float = 1.0
    kl_weight: float = 0.0
    grad_checkpoint: bool = False
    compile: bool = True
    seed: int = 0

    eval_every: int = 100
    log_every: int = 10
    save_every: int = 100

    def budget(self, channels: int, step: int | None = None) -> Budget:
        """Return how scores become masks at a step, or at the end.

        Args:
            channels: ``F``.
            step: steps already made; ``None`` is the end of annealing.

        Raises:
            ValueError: if keep, target size and granularity do not fit.
        """
        k = self.target_size or target_size(channels, self.keep, self.granularity)
        check_multiple(k, self.granularity, channels)
        temperature = self.temperature
        if step is not None and step < self.anneal_keep:
            # In sixteenths: every k of its own is compiled once.
            left = 1 - int(16 * step / self.anneal_keep) / 16
            blocks = round((channels - k) * left) // self.granularity
            k += blocks * self.granularity
        if step is not None and step < self.anneal_temperature:
            done = step / self.anneal_temperature
            ratio = self.temperature / self.start_temperature
            temperature = self.start_temperature * ratio**done
        return Budget(k, temperature, self.gates, self.granularity)


def train(
    model: nn.Module,
    masker: Masker,
    batches: Batches,
    config: TrainConfig,
    *,
    parent: Parent | None = None,
    validate: Callable[[], Report] | None = None,
    log: Callable[[Report], None] | None = None,
    folder: Path | None = None,
) -> list[Report]:
    """Train model and masker together, in place.

    Args:
        model: a stock mlx-lm model, or one with LoRA layers; what is not frozen is
            trained. Its FFNs are masked in place and stay so, the mask being ones
            outside of a step, so that it is the dense model.
        masker: where the masks come from; what is not frozen in it is trained.
        batches: gives micro-batch ``i``, always the same for the same ``i``; step ``s``
            takes ``s·accumulate`` and those after it. Under mlx.launch every machine
            takes its share of the rows.
        config: see :class:`TrainConfig`.
        parent: the dense parent's logits ``[B, T - 1, V]`` of a batch.
        validate: called every ``eval_every`` steps, before the first and after the
            last; what it returns goes into the log.
        log: called with every line of the log, besides the returned list.
        folder: where checkpoints are kept.

    Returns:
        The log: one dictionary for every ``log_every`` steps and every validation.
    """
    mx.random.seed(config.seed)
    pair = Pair(model, masker)
    channels = pair.masked()[0].gate_proj.weight.shape[0]
    if config.grad_checkpoint:
        checkpoint_layers(model)
    step = Step(pair, config, compiled=config.compile)
    world = mx.distributed.init()
    history: list[Report] = []

    def note(number: int, report: Report) -> None:
        history.append({"step": number, **report})
        if log is not None:
            log(history[-1])

    if validate is not None:
        note(0, validate())
    for number in tqdm(range(config.steps), disable=None, unit="step"):
        first = number * config.accumulate
        parts = (
            batches(first + i).share(world.rank(), world.size())
            for i in range(config.accumulate)
        )
        report = step(parts, config.budget(channels, number), parent)
        done = number + 1
        if done % config.log_every == 0 or done == config.steps:
            note(done, {name: float(value) for name, value in report.items()})
        if validate is not None and (
            done % config.eval_every == 0 or done == config.steps
        ):
            note(done, validate())
    return history


def evaluate_loss(
    model: nn.Module,
    masker: Masker,
    batches: Iterable[Batch],
    budget: Budget,
    form: Form | None = None,
) -> float:
    """Return the mean cross-entropy of the targets, nats per token.

    Args:
        model: as in :func:`train`.
        masker: where the masks come from.
        batches: validation examples.
        budget: how scores become masks.
        form: default: what inference does, hard masks with the budget's gates.
    """
    pair = Pair(model, masker)
    total = targets = 0.0
    pair.eval()
    for batch in batches:
        losses = target_losses(pair.logits(batch, budget, form), batch)
        total += float(losses.sum())
        targets += float(batch.loss_mask[:, 1:].sum())
    return total / max(targets, 1.0)
