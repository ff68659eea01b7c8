"""Train a model and its masker together: one loss, one loop, and the command."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from tqdm import tqdm

from . import checkpoints
from .atomic import new_file
from .data import Batch
from .maskers import Budget, Form, Masker, checkpoint_layers
from .recipe import TrainConfig
from .step import Pair, Parent, Step, target_losses
from .watch import CollapsedError, Watcher, mask_overlap

Batches = Callable[[int], Batch]  # the number of a micro-batch to its global batch
Report = dict[str, float]
LOG = "log.jsonl"


def train(
    model: nn.Module,
    masker: Masker,
    batches: Batches,
    config: TrainConfig,
    *,
    parent: Parent | None = None,
    validate: Callable[[], Report] | None = None,
    watcher: Watcher | None = None,
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
        parent: the dense parent's logits ``[B, T - 1, V]`` of a batch, needed if the
            KL has a weight.
        validate: called every ``eval_every`` steps, before the first and after the
            last; what it returns goes into the log. See :class:`Validation`.
        watcher: looks at every validation, and stops a run whose masks collapse.
        log: called with every line of the log, besides the returned list.
        folder: where the log and the checkpoints are kept. A run found there is
            resumed, bit for bit, on one machine or on as many as before.

    Returns:
        The log: one dictionary for every ``log_every`` steps and every validation.

    Raises:
        CollapsedError: from the watcher; a checkpoint has been saved before.
        ValueError: if the loss is no finite number, naming the step and where its
            examples stand; a checkpoint of the step before has been saved.
    """
    mx.random.seed(config.seed)
    pair = Pair(model, masker)
    channels = pair.masked()[0].gate_proj.weight.shape[0]
    if config.grad_checkpoint:
        checkpoint_layers(model)
    step = Step(pair, config, compiled=config.compile)
    world = mx.distributed.init()
    start = _resume(step, folder, world)
    diary = _Diary(folder if world.rank() == 0 else None, start, log)

    def look(done: int) -> None:
        if validate is None:
            return
        diary.note(done, report := validate())
        try:
            if watcher is not None:
                watcher(report)
        except CollapsedError:
            keep(done)
            raise

    def keep(done: int) -> None:
        if folder is not None and world.rank() == 0:
            checkpoints.save(folder / "checkpoints", done, step.tensors())

    if start == 0:
        look(0)
    bar = tqdm(
        range(start, config.steps),
        initial=start,
        total=config.steps,
        unit="step",
        disable=True if world.rank() else None,
    )
    for number in bar:
        first = number * config.accumulate
        numbers = range(first, first + config.accumulate)
        parts = (batches(i).share(world.rank(), world.size()) for i in numbers)
        try:
            report = step(parts, config.budget(channels, number), parent)
        except FloatingPointError as error:
            keep(number)
            raise _not_finite(error, number, batches, numbers) from None
        done = number + 1
        last = done == config.steps
        if done % config.log_every == 0 or last:
            diary.note(done, {name: float(value) for name, value in report.items()})
            bar.set_postfix(loss=f"{diary.lines[-1]['loss']:.3f}")
        if done % config.eval_every == 0 or last:
            look(done)
        if done % config.save_every == 0 or last:
            keep(done)
    return diary.lines


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


class Validation:
    """What is measured at every validation: the loss with the mask of inference, and
    how much instructions share of their masks.

    Args:
        model: as in :func:`train`.
        masker: where the masks come from.
        batches: validation examples.
        budget: how scores become masks, at the end of annealing.
    """

    def __init__(
        self,
        model: nn.Module,
        masker: Masker,
        batches: Sequence[Batch],
        budget: Budget,
    ) -> None:
        self.model, self.masker, self.batches = model, masker, batches
        self.budget = budget

    def __call__(self) -> Report:
        """Return ``valid_loss`` in nats per token, and the overlaps where there are
        several masks.
        """
        loss = evaluate_loss(self.model, self.masker, self.batches, self.budget)
        report = {"valid_loss": loss}
        overlap = mask_overlap(self.masker, self.batches, self.budget)
        return report if overlap is None else report | overlap.report()


class _Diary:
    """The log of a run: in memory, in a file, and for whoever listens."""

    def __init__(
        self, folder: Path | None, start: int, listen: Callable[[Report], None] | None
    ) -> None:
        self.lines: list[Report] = []
        self.path = None if folder is None else folder / LOG
        self.listen = listen
        if self.path is not None:
            if self.path.exists() and start:
                # A killed run may have logged steps that are now made again.
                text = self.path.read_text(encoding="utf-8").splitlines()
                lines = [json.loads(line) for line in text if line.endswith("}")]
                self.lines = [line for line in lines if line["step"] <= start]
            with new_file(self.path) as scratch:
                text = [json.dumps(line) + "\n" for line in self.lines]
                scratch.write_text("".join(text), encoding="utf-8")

    def note(self, step: int, report: Report) -> None:
        line = {"step": step, **report}
        self.lines.append(line)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        if self.listen is not None:
            self.listen(line)


def _resume(step: Step, folder: Path | None, world: mx.distributed.Group) -> int:
    """Take over the newest checkpoint; return the steps made. The first machine's
    state is everyone's: the others need no folder, and no equal start.
    """
    made = 0
    if folder is not None and world.rank() == 0:
        found = checkpoints.load(folder / "checkpoints")
        if found is not None:
            made, tensors = found
            step.restore(tensors)
    if world.size() == 1:
        return made

    def first(array: mx.array) -> mx.array:
        own = array if world.rank() == 0 else mx.zeros_like(array)
        return mx.distributed.all_sum(own, stream=mx.cpu)

    step.restore({name: first(array) for name, array in step.tensors().items()})
    return int(first(mx.array(made)))


def _not_finite(
    error: Exception, number: int, batches: Batches, numbers: Iterable[int]
) -> ValueError:
    places = getattr(batches, "places", None)
    where = ""
    if places is not None:
        found = [place for i in numbers for place in places(i)]
        where = " Its examples: " + ", ".join(found[:8])
        where += f" and {len(found) - 8} more." if len(found) > 8 else "."
    return ValueError(
        f"{error} at step {number + 1}, which was not made.{where} Lower the learning "
        "rate, or look at these examples."
    )
