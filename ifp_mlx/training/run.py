"""Train a model and its masker together: one loss, one loop, and the command."""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from ..files.atomic import new_file
from ..model.checkpoint import IFPConfig
from ..selection.predictor import SparsityPredictor
from ..selection.top_k import select
from ..slicing.shapes import Plan
from ..slicing.stock import context_of, vocabulary_of
from . import checkpoints, warm_start
from .batches import Batch, Batches, Record, in_order
from .card import trained_card
from .cost import Cost, cost_of
from .curve import draw_curve
from .diary import Diary, Pace
from .groups import groups_of
from .maskers import (
    Budget,
    FixedMask,
    Masker,
    PredictorMasker,
    ScoreTable,
    checkpoint_layers,
)
from .output import CHECKPOINTS, RESULT, check_unfinished, claim
from .recipe import TrainConfig
from .records import Reader
from .recover import recover
from .step import Pair, Parent, Step
from .trainee import (
    Trainee,
    adapt,
    dense_parent,
    make_predictor,
    open_trainee,
    teacher_of,
    trained_predictor,
    write_checkpoint,
)
from .validation import GATE_FORMS, Report, Validation, evaluate_loss, sliced_error
from .watch import CollapsedError, Watcher

REPORT = "report.json"  # what the command says at the end
WARMING = partial(tqdm, desc="warm start", disable=None, leave=False)
BatchOf = Callable[[int], Batch]  # the number of a micro-batch to its global batch


def train(
    model: nn.Module,
    masker: Masker,
    batches: BatchOf,
    config: TrainConfig,
    *,
    parent: Parent | None = None,
    plan: Plan | None = None,
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
        parent: returns the dense parent's logits ``[B, T - 1, V]``; for ``kl_weight``.
        plan: the model's plan; needed if ``balance_weight`` is above 0.
        validate: called every ``eval_every`` steps, before the first and after the
            last; it returns a line of the log. See :class:`Validation`.
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
    if config.grad_checkpoint:
        checkpoint_layers(model)
    step = Step(pair, config, compiled=config.compile, plan=plan)
    world = mx.distributed.init()
    start = _resume(step, folder, world)
    diary = Diary(folder if world.rank() == 0 else None, start, log)

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
            checkpoints.save(folder / CHECKPOINTS, done, step.tensors())

    if start == 0:
        look(0)
    budget_at = partial(config.budget, pair.inlets[0].channels)
    _descend(step, batches, config, budget_at, parent, diary, look, keep, start)
    return diary.lines


def _descend(
    step: Step,
    batches: BatchOf,
    config: TrainConfig,
    budget_at: Callable[[int], Budget],
    parent: Parent | None,
    diary: Diary,
    look: Callable[[int], None],
    keep: Callable[[int], None],
    start: int,
) -> None:
    """Make the steps from ``start`` on; log, validate and save as they come due."""
    world = mx.distributed.init()
    bar = tqdm(
        range(start, config.steps),
        initial=start,
        total=config.steps,
        unit="step",
        disable=True if world.rank() else None,
    )
    pace = Pace()
    for number in bar:
        mx.random.seed(config.seed + number)  # so a resumed step draws the same
        first = number * config.accumulate
        numbers = range(first, first + config.accumulate)
        parts = (pace.of(batches(i)).share(world.rank(), world.size()) for i in numbers)
        try:
            with pace:
                report = step(parts, budget_at(number), parent)
        except FloatingPointError as error:
            keep(number)
            raise _not_finite(error, number, batches, numbers) from None
        done = number + 1
        last = done == config.steps
        if done % config.log_every == 0 or last:
            found = {name: float(value) for name, value in report.items()}
            diary.note(done, found | pace.take())
            bar.set_postfix(loss=f"{diary.lines[-1]['loss']:.3f}")
        if done % config.eval_every == 0 or last:
            look(done)
        if done % config.save_every == 0 or last:
            keep(done)


def _resume(step: Step, folder: Path | None, world: mx.distributed.Group) -> int:
    """Take over the newest checkpoint; return the steps made. All machines take the
    first one's state, so the others need no folder, and may start from another state.
    """
    made = 0
    if folder is not None and world.rank() == 0:
        found = checkpoints.load(folder / CHECKPOINTS)
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
    error: Exception, number: int, batches: BatchOf, numbers: Iterable[int]
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


def run(config: TrainConfig, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Train as the settings say, and write the result into the output folder.

    Args:
        config: complete, as :func:`ifp_mlx.training.recipe.from_options` makes it.
        log: takes one line of progress.

    Returns:
        What the command reports.

    Raises:
        FileExistsError: if the run in the output folder is finished.
        ValueError, OSError: about settings, model or data, with a remedy.
    """
    output, first = config.folder, mx.distributed.init().rank() == 0
    check_unfinished(config)
    if config.stage == "recover":
        return recover(config, train, log)
    mx.random.seed(config.seed)
    trainee = open_trainee(config)
    config = config.of(trainee.plan.unit, trainee.own)
    budget = config.budget(trainee.plan.units)
    masker = new_masker(trainee, config)
    examples = read_examples(trainee, config, masker, log)
    if first:
        claim(config, log)
    resumed = any((output / CHECKPOINTS).glob("step-*"))
    if not resumed:
        _begin(masker, trainee, examples.first, config, log)
    parent = dense_parent(trainee, config)
    adapt(trainee.model, trainee.plan, config)
    began = time.perf_counter()
    lines = train(
        trainee.model,
        masker,
        Batches(examples.train, config.batch_size, config.seed),
        config,
        parent=parent,
        plan=trainee.plan,
        validate=Validation(trainee.model, masker, examples.checked, budget),
        watcher=Watcher() if config.watch == "stop" else None,
        log=lambda line: log(_line(line)),
        folder=output if first else None,
    )
    report: dict[str, Any] = {
        "output": str(output / RESULT),
        "steps": config.steps,
        "train_seconds": time.perf_counter() - began,
        "peak_memory_bytes": mx.get_peak_memory(),
        "multiplications": asdict(run_cost(trainee, config, masker, examples)),
        **{k: v for line in lines for k, v in line.items() if k != "step"},
    }
    if first:
        report |= _finish(
            output, trainee, masker, examples.checked, budget, config, report
        )
        try:
            draw_curve(lines, output / "curve.png")
        except ImportError as error:
            log(f"No picture: {error}.")
        with new_file(output / REPORT) as scratch:
            scratch.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def new_masker(trainee: Trainee, config: TrainConfig) -> Masker:
    """Return where masks come from, not warm-started yet."""
    if config.masker == "dense":
        return FixedMask(None)
    if config.masker == "static":
        return ScoreTable(mx.zeros(trainee.plan.shape))
    return PredictorMasker(make_predictor(trainee, config))


class Examples(NamedTuple):
    """What a run learns from.

    Attributes:
        train: the training examples.
        first: the same with one instruction each, for a predictor's warm start.
        checked: batches of some validation examples.
    """

    train: list[Record]
    first: list[Record]
    checked: list[Batch]


def read_examples(
    trainee: Trainee, config: TrainConfig, masker: Masker, log: Callable[[str], None]
) -> Examples:
    """Return the examples of a run.

    Raises:
        ValueError: if there are no training or no validation examples, or a row is bad.
        FileNotFoundError: if the data are not there.
    """
    longest = context_of(trainee.config) or config.max_length
    own = getattr(getattr(masker, "predictor", None), "tokenizer", None)
    reader = Reader(
        trainee.tokenizer,
        config.stage,
        max_length=min(config.max_length, longest),
        chunk=config.chunk,
        predictor_tokenizer=own,
        skip_bad=config.skip_bad,
        vocabulary=vocabulary_of(trainee.model),
    )
    first = reader.read(config.data, "train")
    # One mask over a whole text is what is validated, however it is trained.
    checked = reader.read(config.data, "valid")
    reader.chunk_masks = config.chunk_masks
    each = config.stage == "pretrain" and config.chunk_masks == "each"
    records = reader.read(config.data, "train") if each else first
    for name, found in (("train", records), ("valid", checked)):
        if not found:
            raise ValueError(f"{config.data} has no {name} examples; put some there.")
    for skipped in reader.skipped:
        log(f"Left out: {skipped}.")
    order = np.random.default_rng(config.seed).permutation(len(checked))
    if config.eval_batches:
        order = order[: config.eval_batches * config.batch_size]
    log(f"{len(records)} training examples, {len(order)} for validation.")
    batches = in_order([checked[i] for i in order], config.batch_size)
    return Examples(records, first, batches)


def _begin(
    masker: Masker,
    trainee: Trainee,
    records: Sequence[Record],
    config: TrainConfig,
    log: Callable[[str], None],
) -> None:
    """Set where the masker starts, from some training examples."""
    if config.masker == "dense":
        return
    if isinstance(masker, PredictorMasker):
        folder = trained_predictor(trainee, config)
        if folder is not None:
            log(f"The predictor goes on from {folder}.")
            return
    importance: warm_start.Importance = warm_start.channel_importance
    if trainee.plan.unit == "expert":
        importance = partial(warm_start.expert_importance, trainee.plan)
    order = np.random.default_rng(config.seed).permutation(len(records))
    chosen = [records[i] for i in order[: config.warm_start or 64]]
    batches = in_order(chosen, config.batch_size)
    if isinstance(masker, ScoreTable):
        used = [importance(trainee.model, b) for b in WARMING(batches)]
        prior = np.concatenate(used).mean(axis=0)
        masker.table = mx.array(prior / prior.std(axis=-1, keepdims=True))
        return
    assert isinstance(masker, PredictorMasker)
    kind, decorrelate = config.score_kind()
    how: dict[str, Any] = {"centred": kind == "centred", "decorrelate": decorrelate}
    how |= {"importance": importance, "progress": WARMING}
    if config.warm_start:
        start = _warm(masker.predictor, trainee, records, order, config, how)
        log(
            f"Warm start: the instruction explains {max(0.0, start['explained']):.0%} of what "
            f"differs in the use of {trainee.plan.unit}s, in {start['rank']} directions"
            f"{start['said']}."
        )
    if kind != "none":
        centred = kind == "centred"
        warm_start.scale_layers(masker.predictor, batches, centred=centred)
    if config.shared:
        warm_start.share_channels(
            masker.predictor, start["prior"], config.shared, config.granularity or 1
        )


def _warm(
    predictor: SparsityPredictor,
    trainee: Trainee,
    records: Sequence[Record],
    order: np.ndarray,
    config: TrainConfig,
    how: dict[str, Any],
) -> dict[str, Any]:
    """Solve a new predictor's head from some examples, in the order given. If the
    examples have groups, the predictor also learns to tell the groups apart.
    """
    groups = groups_of(records, config.groups, config.seed)
    named = list(records)
    if groups is not None:
        pairs = zip(records, groups.tolist(), strict=True)
        named = [replace(record, task=group) for record, group in pairs]
    batches = in_order(
        [named[i] for i in order[: config.warm_start]], config.batch_size
    )
    if groups is None:
        found = warm_start.warm_start(predictor, trainee.model, batches, **how)
        return found | {"said": ""}
    later = Batches(named, config.batch_size, config.seed)
    how |= {"steps": config.warm_steps, "rate": config.warm_lr}
    found = warm_start.group_start(predictor, trainee.model, batches, later, **how)
    return found | {"said": f", of {len(np.unique(groups))} groups"}


def _finish(
    output: Path,
    trainee: Trainee,
    masker: Masker,
    checked: Sequence[Batch],
    budget: Budget,
    config: TrainConfig,
    last: dict[str, Any],
) -> dict[str, Any]:
    """Write the result and compare it with the model that was trained."""
    report: dict[str, Any] = {}
    ifp = predictor = None
    if isinstance(masker, PredictorMasker):
        ifp = IFPConfig(
            target_size=budget.k,
            gates=budget.gates,
            temperature=budget.temperature,
            granularity=budget.granularity,
            shared=config.shared or 0,
        )
        predictor = masker.predictor
        for form in GATE_FORMS:
            loss = evaluate_loss(trainee.model, masker, checked, budget, form)
            report[f"loss_{form}"] = loss
    elif isinstance(masker, ScoreTable):
        selection = select(
            masker.table,
            [budget.k] * len(masker.table),
            granularity=budget.granularity,
            gates=budget.gates,
            temperature=budget.temperature,
        )
        selection = replace(selection, unit=trainee.plan.unit)
        selection.save(output / "mask.safetensors")
    card = trained_card(config, trainee.plan, trainee.path, last)
    write_checkpoint(output / RESULT, trainee, ifp, predictor, card)
    if predictor is not None:
        report["sliced_error"] = sliced_error(
            output / RESULT, trainee.model, checked[0]
        )
    return report


def run_cost(
    trainee: Trainee, config: TrainConfig, masker: Masker, examples: Examples
) -> Cost:
    """Return what a run costs; see :func:`ifp_mlx.training.cost.cost_of`."""
    predictor = getattr(masker, "predictor", None)
    fresh = trained_predictor(trainee, config) is None
    teacher = teacher_of(trainee, config)
    given = (config, trainee.model, trainee.plan, predictor, examples.train)
    grouped = fresh and predictor is not None and config.warm_start > 0
    if grouped:
        grouped = groups_of(examples.first, config.groups, config.seed) is not None
    return cost_of(*given, fresh=fresh, grouped=grouped, teacher=teacher)


def _line(report: Report) -> str:
    step = f"step {int(report['step'])}:"
    names = [
        "loss",
        "kl",
        "balance",
        "valid_loss",
        "valid_kl",
        "overlap_within",
        "overlap_between",
    ]
    names += ["overlap_chance"]
    parts = [f"{n.replace('_', ' ')} {report[n]:.3f}" for n in names if n in report]
    if "seconds_per_step" in report:
        parts.append(
            "{seconds_per_step:.3g} s a step, {tokens_per_second:.0f} tokens/s".format(
                **report
            )
        )
    return " ".join([step, ", ".join(parts)])
