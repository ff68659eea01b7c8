"""Recovery: the part that a fixed mask keeps learns to answer like the dense model.

The model is sliced first and the compact model itself is trained, so a step costs what
a small model costs. The dense parent reads the examples once, before training.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from tqdm import tqdm

from ..evaluation.rows import Row
from ..evaluation.teacher import METRICS, log_probabilities, metrics
from ..model.checkpoint import IFPModel, load
from ..model.export import MASK_FILE, check_can_write, write_plain
from ..selection.masks import Selection
from ..slicing.stock import context_of
from .batches import Batches, Record
from .maskers import FixedMask
from .mixtures import check_mixture
from .output import RESULT, claim
from .parent_cache import Form, ParentCache, fill_cache
from .recipe import TrainConfig
from .records import Reader
from .trainee import adapt
from .validation import Report

Say = Callable[[str], None]
PARENT = "parent"
SOLVED_ON = 1024  # tokens of the examples that the compensation is solved on


def recover(config: TrainConfig, train: Callable[..., Any], say: Say) -> dict[str, Any]:
    """Slice, train and write a compact model as the settings say.

    Args:
        config: of the stage ``recover``.
        train: :func:`ifp_mlx.training.run.train`.
        say: takes one line of progress.

    Returns:
        What the command reports: ``kl_before`` and ``kl_after`` in nats per answer
        token of the validation examples, before training and compensation and after.

    Raises:
        ValueError, OSError: about settings, mask or data, with a remedy.
    """
    assert config.mask_file is not None
    output, first = config.folder, mx.distributed.init().rank() == 0
    model, tokenizer = load(config.model)
    check_mixture(model.plan, model.config, config)
    selection = Selection.load(config.mask_file).plain()
    model.check_fits(selection)
    check_can_write(model, selection.sizes)
    records, rows = read(config, model, tokenizer, say)
    if first:
        claim(config, say)
        _same_mask(selection, output / MASK_FILE)
    parent = open_cache(output / PARENT, config, model, records)
    say(
        f"{len(records)} training examples, {len(rows)} for validation; the dense "
        f"model's answers take {parent.bytes_per_token} bytes a token."
    )
    validate = Closeness(model, rows)
    before = validate.measure(model.compact(selection))
    compact = start(model, selection, records, config)
    validate.model = compact
    adapt(compact, model.plan, config)
    began = time.perf_counter()
    lines = train(
        compact,
        FixedMask(None),
        Batches(records, config.batch_size, config.seed),
        config,
        parent=parent,
        plan=model.plan,
        validate=validate,
        log=lambda line: say(_line(line)),
        folder=output if first else None,
    )
    seconds = time.perf_counter() - began
    after = {name: lines[-1][f"valid_{name}"] for name in METRICS}
    if first:
        written = recovered(selection, config, records, before, after)
        plain = unwrapped(model, selection, compact)
        said = SAID.format(before=before, after=after, rows=len(rows))
        write_plain(model, plain, written, output / RESULT, said=said)
    return {
        "output": str(output / RESULT),
        "mask_id": selection.mask_id,
        "steps": config.steps,
        "tokens": trained_tokens(records, config),
        "train_seconds": seconds,
        "peak_memory_bytes": mx.get_peak_memory(),
        "parent_bytes_per_token": parent.bytes_per_token,
        **{f"{name}_before": value for name, value in before.items()},
        **{f"{name}_after": value for name, value in after.items()},
    }


SAID = """The kept channels were trained to say what the base model says (distillation).
On {rows} examples that were not trained on, the KL from the base model was
{before[kl]:.3f} nats per answer token before and is {after[kl]:.3f} now; it chose the
base model's next token {before[agreement]:.1%} of the time and does {after[agreement]:.1%} now."""


def read(
    config: TrainConfig, model: IFPModel, tokenizer: Any, say: Say
) -> tuple[list[Record], list[Row]]:
    """Return the training examples, numbered and weighted, and validation rows.

    Raises:
        ValueError: if there are none, or a row is bad.
    """
    longest = context_of(model.config) or config.max_length
    length = min(config.max_length, longest)
    how: dict[str, Any] = {"max_length": length, "skip_bad": config.skip_bad}
    reader = Reader(tokenizer, "recover", vocabulary=model.vocabulary, **how)
    found = {split: reader.read(config.data, split) for split in ("train", "valid")}
    for split, records in found.items():
        if not records:
            raise ValueError(f"{config.data} has no {split} examples; put some there.")
    for skipped in reader.skipped:
        say(f"Left out: {skipped}.")
    order = np.random.default_rng(config.seed).permutation(len(found["valid"]))
    if config.eval_batches:
        order = order[: config.eval_batches * config.batch_size]
    rows = [_row(found["valid"][i]) for i in sorted(order)]
    return [_numbered(r, n, config) for n, r in enumerate(found["train"])], rows


def _numbered(record: Record, number: int, config: TrainConfig) -> Record:
    """Return a record with weights for its tokens, and its number as ``task``."""
    weights = np.where(record.loss, 1.0, config.prompt_weight).astype(np.float32)
    return replace(record, loss=weights, task=number)


def _same_mask(selection: Selection, path: Path) -> None:
    """Keep the mask with the run, or compare it with the one that is there."""
    if not path.is_file():
        selection.save(path)
    elif (found := Selection.load(path).mask_id) != selection.mask_id:
        raise ValueError(
            f"The run in {path.parent} has the mask {found}, not {selection.mask_id}; "
            "resume it with its own mask, or choose another output folder."
        )


def _row(record: Record) -> Row:
    """Return what is compared: the last answer, or the second half of a text."""
    first = int(np.flatnonzero(~record.loss)[-1]) + 1 if not record.loss.all() else 0
    split = first or max(1, len(record.tokens) // 2)
    tokens = record.tokens.tolist()
    return Row(tokens[:split], tokens[split:])


def open_cache(
    folder: Path, config: TrainConfig, model: IFPModel, records: Sequence[Record]
) -> ParentCache:
    """Return what the dense model says about the examples, computing what is missing."""
    about = {"fingerprint": [round(float(x), 4) for x in model.fingerprint[:8]]}
    form = Form(config.parent_top, config.parent_samples)
    progress = partial(tqdm, desc="dense model reads", disable=None, leave=False)
    return fill_cache(
        folder, model.dense, records, form, about | {"name": model.name},
        progress=progress,
    )  # fmt: skip


def start(
    model: IFPModel,
    selection: Selection,
    records: Sequence[Record],
    config: TrainConfig,
) -> nn.Module:
    """Return the compact model that training begins with."""
    channels = selection.unit == "channel"  # experts cannot make up for others
    if config.compensate and channels and selection.gates is None:
        order = np.random.default_rng(config.seed).permutation(len(records))
        texts = np.concatenate([records[i].tokens for i in order])
        text = texts[:SOLVED_ON].tolist()
        selection = selection.compensated(text, "the training examples")
    compact = model.compact(selection)
    if config.dtype != "stored":
        compact.set_dtype(getattr(mx, config.dtype))
    mx.eval(compact.parameters())
    return compact


class Closeness:
    """How close a compact model is to the dense one, on the answers of some rows.

    The dense model is opened for every measurement and freed afterwards, so that it
    takes no memory while the compact one is trained.

    Args:
        parent: its dense model is the reference.
        rows: what is compared.

    Attributes:
        model: the compact model that a call measures.
    """

    def __init__(self, parent: IFPModel, rows: Sequence[Row]) -> None:
        self.parent, self.rows = parent, rows
        self.model: nn.Module | None = None

    def __call__(self) -> Report:
        """Return ``valid_kl``, ``valid_nll`` and ``valid_agreement``."""
        assert self.model is not None
        found = self.measure(self.model)
        return {f"valid_{name}": value for name, value in found.items()}

    def measure(self, compact: nn.Module) -> Report:
        """Return the means of :data:`METRICS` over the rows."""
        dense = self.parent.dense()
        compact.eval()
        found = [
            metrics(row, log_probabilities(compact, row), log_probabilities(dense, row))
            for row in tqdm(self.rows, desc="comparing", disable=None, leave=False)
        ]
        return {name: float(np.mean([f[name] for f in found])) for name in METRICS}


def unwrapped(model: IFPModel, selection: Selection, trained: nn.Module) -> nn.Module:
    """Return the trained weights in a compact model of mlx-lm's own classes."""
    fused = [(n, m.fuse()) for n, m in trained.named_modules() if hasattr(m, "fuse")]
    if fused:
        trained.update_modules(tree_unflatten(fused))
    plain = model.compact(selection)
    plain.load_weights(tree_flatten(trained.parameters()))
    mx.eval(plain.parameters())
    return plain


def recovered(
    selection: Selection,
    config: TrainConfig,
    records: Sequence[Record],
    before: Report,
    after: Report,
) -> Selection:
    """Return a selection that says how its weights were trained."""
    how = (
        f"distillation of {config.train} weights, {config.steps} steps, about "
        f"{trained_tokens(records, config)} tokens"
    )
    said = {
        "KL before": f"{before['kl']:.4g} nats per token",
        "KL after": f"{after['kl']:.4g} nats per token",
    }
    notes = selection.origin.notes | said
    # Measurements were of the mask without training.
    origin = replace(selection.origin, evaluation=None, notes=notes)
    return replace(selection, origin=origin, trained=how)


def trained_tokens(records: Sequence[Record], config: TrainConfig) -> int:
    """Return about how many tokens all steps read, padding left out."""
    mean = np.mean([len(record.tokens) for record in records])
    return round(mean * config.steps * config.batch_size * config.accumulate)


def _line(report: Report) -> str:
    names = ("loss", "balance", "valid_kl", "valid_agreement")
    found = [f"{n.replace('_', ' ')} {report[n]:.3f}" for n in names if n in report]
    parts = ", ".join(found)
    return f"step {int(report['step'])}: {parts}"
