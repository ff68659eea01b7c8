"""Measure recovery by distillation: bytes of the cache, its error, time of a step.

    python -m examples.benchmarks.recovery.recovery

On SmolLM2-135M with half of its channels and rows of one family of task_families.py:
(1) the error of the loss from the dense model's compressed distributions, by how much
of them is kept; (2) the time of a step beside one of masked training of the same
weights, in turns. Printed as Markdown.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from examples.fetch import MODELS, fetch
from ifp_mlx import load
from ifp_mlx.model.checkpoint import IFPModel
from ifp_mlx.slicing.plan import plan_of
from ifp_mlx.training.batches import Batch, Record, collate
from ifp_mlx.training.maskers import Budget, FixedMask
from ifp_mlx.training.parent_cache import Form, compress, fill_cache, weights_of
from ifp_mlx.training.recipe import RECOVER, TrainConfig
from ifp_mlx.training.records import Reader
from ifp_mlx.training.step import Pair, Parent, Step
from ifp_mlx.training.trainee import adapt

FAMILY, KEEP, ROWS, BATCH, TURNS = "data2text", 0.5, 24, 2, 4
FORMS = [Form(64, 0), Form(256, 0), Form(16, 16), Form(32, 32), Form(48, 16)]
FORMS += [Form(128, 32)]


def read(tokenizer: object) -> list[Record]:
    """Return numbered examples of the family; every token counts."""
    text = (MODELS / "families" / "test" / f"{FAMILY}.jsonl").read_text("utf-8")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "train.jsonl").write_text(text, encoding="utf-8")
        found = Reader(tokenizer, "recover").read(folder, "train")[:ROWS]
    return [
        Record(r.instruction, r.tokens, np.ones(len(r.tokens), np.float32), number)
        for number, r in enumerate(found)
    ]


def errors(model: IFPModel, compact: nn.Module, records: list[Record]) -> None:
    """Print the loss with every form beside the exact one, and the bytes."""
    dense = model.dense()
    sums = dict.fromkeys(FORMS, 0.0)
    exact, tokens, vocabulary = 0.0, 0, 0
    for record in records:
        read = mx.array(record.tokens[None, :-1])
        theirs, ours = (
            np.array(nn.log_softmax(m(read)[0].astype(mx.float32), axis=-1))
            for m in (dense, compact)
        )
        exact += float((np.exp(theirs) * (theirs - ours)).sum())
        tokens, vocabulary = tokens + len(theirs), theirs.shape[1]
        for form in FORMS:
            kept = compress(theirs, form, np.random.default_rng(record.task))
            logp = kept["logp"].astype(np.float32)
            said = np.take_along_axis(ours, kept["ids"].astype(np.int64), axis=1)
            sums[form] += float((weights_of(logp, form) * (logp - said)).sum())
    print(f"Exact: {exact / tokens:.4f} nats, {4 * vocabulary} bytes a token; ", end="")
    print(f"{tokens} tokens.\n")
    print("| likeliest | samples of the rest | bytes a token | loss | error |")
    print("|---|---|---|---|---|")
    for form, total in sums.items():
        size, error = form.dtype(vocabulary).itemsize, f"{total / exact - 1:+.2%}"
        loss = f"{total / tokens:.4f}"
        print(f"| {form.top} | {form.samples} | {size} | {loss} | {error} |")


def step_times(model: IFPModel, records: list[Record]) -> None:
    """Print how long steps take, in turns."""
    config = TrainConfig(**RECOVER, steps=100)
    selection = model.select(
        records[0].tokens.tolist(), keep=KEEP, allocation="uniform"
    )
    batch = collate(records[:BATCH])
    parent = model.dense()
    mx.eval(parent.parameters())
    with tempfile.TemporaryDirectory() as folder:
        cache = fill_cache(Path(folder), lambda: parent, records[:BATCH], Form(), {})
        cached = cache(batch)
        whole, compact = model.dense(), model.compact(selection)
        arms: dict[str, Callable[[], object]] = {}
        masked = _stepper(whole, FixedMask(selection.mask()), config)
        alone = _stepper(model.dense(), FixedMask(selection.mask()), config)
        small = _stepper(compact, FixedMask(None), config)
        arms["masked, dense model read in the step"] = partial(
            masked, batch, lambda b: parent(b.tokens[:, :-1])
        )
        arms["masked, dense model's answers cached"] = partial(
            alone, batch, lambda b: cached
        )
        arms["recovery"] = partial(small, batch, lambda b: cached)
        seconds = _in_turns(arms)
    tokens = float(batch.loss_mask.sum())
    print(f"\nA step of {BATCH} rows, {tokens:.0f} tokens, {TURNS} turns:\n")
    print("| step | median s | of it, recovery takes |")
    print("|---|---|---|")
    for name, times in seconds.items():
        pairs = zip(seconds["recovery"], times, strict=True)
        ratio = statistics.median(mine / other for mine, other in pairs)
        print(f"| {name} | {statistics.median(times):.2f} | {ratio:.2f} |")


def _stepper(
    model: nn.Module, masker: FixedMask, config: TrainConfig
) -> Callable[[Batch, Parent], object]:
    adapt(model, plan_of(model), config)
    step = Step(Pair(model, masker), config, compiled=False)
    return lambda batch, parent: step([batch], Budget(1, gates="binary"), parent)


def _in_turns(arms: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(TURNS + 1):  # the first one is not counted
        for name, arm in arms.items():
            start = time.perf_counter()
            arm()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    model, tokenizer = load(fetch("smollm2"))
    records = read(tokenizer)
    # The channels that some of the rows use most, as a task's mask would have them.
    text = np.concatenate([record.tokens for record in records[:8]])
    selection = model.select(text.tolist(), keep=KEEP, allocation="uniform")
    errors(model, model.compact(selection), records)
    step_times(model, records)


if __name__ == "__main__":
    main()
