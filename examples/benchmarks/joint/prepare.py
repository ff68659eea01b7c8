"""Prepare joint training on SmolLM2: its data, and where masks and predictors begin.

    python -m examples.benchmarks.joint.prepare

Writes into models/joint, in minutes on a CPU: the data (rows.npz), where masks and
predictors begin (start.npz), and the data for the package's own trainer (examples).
Everything that belongs to the method is computed by the package; a GPU without MLX goes
on from there.
"""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from examples.benchmarks.joint.data import (
    FAMILIES,
    Rows,
    fact_rows,
    fact_tasks,
    family_rows,
    instruction_rows,
    load,
    save,
    write_jsonl,
)
from examples.benchmarks.selectors.task_families import TASKS, fetch_packages
from examples.benchmarks.selectors.task_families import write as write_families
from examples.fetch import MODELS, fetch
from ifp_mlx.files.atomic import new_file, new_folder
from ifp_mlx.selection.predictor import SparsityPredictor
from ifp_mlx.training import warm_start
from ifp_mlx.training.batches import Batch
from ifp_mlx.training.recipe import TrainConfig
from ifp_mlx.training.trainee import make_predictor, open_trainee

FOLDER = MODELS / "joint"
RANK = 96
MEASURED = 8  # examples of every task whose channels are measured
READ = 100  # of every task whose instructions the predictor of tasks is solved from
BATCH = 16


def write_rows(path: Path) -> None:
    """Write the data."""
    tokenizer = Tokenizer.from_file(str(fetch("smollm2") / "tokenizer.json"))
    tasks = fact_tasks()
    facts, fact_test, count = fact_rows(tokenizer, tasks)
    folder = fetch_packages() / f"{TASKS}natural_instructions"
    instructions = instruction_rows(tokenizer, folder, len(tasks))
    train, seen, unseen, names = instructions
    first = len(tasks) + len(names)
    families = family_rows(tokenizer, write_families() / "test", first)
    sets = {
        "facts": facts,
        "instructions": train,
        "test facts": fact_test,
        "test seen": seen,
        "test unseen": unseen,
        "test families": families,
    }
    every = [task.name for task in tasks] + names + list(FAMILIES)
    save(path, sets, {"tasks": every, "facts": count})


def write_examples(folder: Path, rows: Path) -> None:
    """Write train.jsonl and valid.jsonl for the package's own trainer: two epochs of
    facts and a sixteenth as many instructions, as in the steps on a GPU.
    """
    sets, about = load(rows)
    tokenizer = Tokenizer.from_file(str(fetch("smollm2") / "tokenizer.json"))
    facts, other = sets["facts"], sets["instructions"]
    order = np.random.default_rng(0).permutation(len(other))
    count = 2 * about["facts"]
    train = [facts.pick(slice(count)), other.pick(order[: count // 16])]
    valid = [sets["test facts"].pick(slice(None, None, 20)), sets["test seen"]]
    for name, parts in (("train", train), ("valid", valid)):
        write_jsonl(folder / f"{name}.jsonl", tokenizer, parts, about["tasks"])


def some_of_each(rows: Rows, count: int, seed: int) -> Rows:
    """Return up to ``count`` rows of every task."""
    order = np.random.default_rng(seed).permutation(len(rows))
    chosen = [order[rows.task[order] == task][:count] for task in np.unique(rows.task)]
    return rows.pick(np.concatenate(chosen))


def batches(rows: Rows) -> list[Batch]:
    """Return rows as batches of MLX, shorter ones first."""
    order = np.argsort(rows.length, kind="stable")
    found = []
    for start in range(0, len(rows), BATCH):
        part = rows.pick(order[start : start + BATCH])
        width = int(part.length.max())
        place = np.arange(width)
        answer = (place >= part.prompt[:, None]) & (place < part.length[:, None])
        tokens = mx.array(part.tokens[:, :width].astype(np.int32))
        prompt = mx.array(part.prompt.astype(np.int32))
        tasks = mx.array(part.task.astype(np.int32))
        loss = mx.array(answer.astype(np.float32))
        found.append(Batch(tokens, prompt, tokens, loss, tasks))
    return found


class Measured:
    """What the dense model and the predictor's backbone show on some examples.

    Args:
        model: dense.
        predictor: its backbone is read.
        parts: rows of facts and rows of instructions.

    Attributes:
        batches: of all parts.
        features: ``[N, D]``.
        tasks: ``[N]``.
        used: importance of the channels, ``[N, L, F]``.
        prior: its mean, ``[L, F]``; every part counts the same.
    """

    def __init__(
        self, model: nn.Module, predictor: SparsityPredictor, parts: list[Rows]
    ) -> None:
        self.batches, used = [], []
        for part in parts:
            some = batches(part)
            own = [
                warm_start.channel_importance(model, batch)
                for batch in tqdm(some, "importance", disable=None)
            ]
            used.append(np.concatenate(own))
            self.batches += some
        self.used = np.concatenate(used)
        self.prior = sum(part.mean(axis=0) for part in used) / len(used)
        self.features, self.tasks = read_features(predictor, self.batches)


def read_features(
    predictor: SparsityPredictor, some: list[Batch]
) -> tuple[np.ndarray, np.ndarray]:
    """Return what the head reads of every row, ``[N, D]``, and the rows' tasks."""
    found = [
        np.array(predictor.features(batch.instruction, batch.lengths))
        for batch in tqdm(some, "features", disable=None)
    ]
    return np.concatenate(found), np.concatenate([np.array(b.tasks) for b in some])


def solve_apart(
    predictor: SparsityPredictor, features: np.ndarray, tasks: np.ndarray, count: int
) -> tuple[np.ndarray, float]:
    """Solve a head that gives every task channels of its own, drawn at random.

    Args:
        predictor: its head is set.
        features: ``[N, D]``.
        tasks: of the examples, ``[N]``.
        count: of all tasks.

    Returns:
        The tasks' codes, ``[count, r]``, 0 where a task has no examples; and the share
        of them that the head reads off instructions it was not solved from.
    """
    rng = np.random.default_rng(0)
    rank, outputs = RANK, predictor.layers * predictor.channels
    codes = rng.normal(size=(count, rank)) * np.isin(np.arange(count), tasks)[:, None]
    order = rng.permutation(len(features))
    train, test = order[len(order) // 10 :], order[: len(order) // 10]
    middle, wanted = features[train].mean(axis=0), codes[tasks]
    x = features.astype(np.float64) - middle
    mean = wanted[train].mean(axis=0)
    fit = ridge(x[train], wanted[train] - mean)
    left = ((wanted[test] - mean - x[test] @ fit) ** 2).sum()
    channels = rng.normal(size=(outputs, rank)) / np.sqrt(rank)
    weights = fit.T, mean - middle @ fit, channels, np.zeros(outputs)
    values = [mx.array(np.ascontiguousarray(w).astype(np.float32)) for w in weights]
    predictor.reduce.weight, predictor.reduce.bias = values[:2]
    predictor.expand.weight, predictor.expand.bias = values[2:]
    return codes, 1 - float(left / ((wanted[test] - mean) ** 2).sum())


def head(predictor: SparsityPredictor, name: str) -> dict[str, np.ndarray]:
    """Return the head's weights, their names beginning with ``name``."""
    return {
        f"{name}.{part}.{kind}": np.array(getattr(predictor, part)[kind])
        for part in ("reduce", "expand")
        for kind in ("weight", "bias")
    }


def write_start(path: Path, rows: Path) -> None:
    """Write where masks and predictors begin, measured on training examples.

    ``prior``: mean importance, ``[L, F]``. ``added``: the package's own warm start of a
    pretrained model: the prior and what the instruction adds to it. ``apart``: a head
    that gives every task channels of its own. ``codes``: of the tasks, ``[tasks, r]``,
    which ``apart`` is to read off the instruction.
    """
    sets, about = load(rows)
    trained = sets["facts"], sets["instructions"]
    config = TrainConfig(model=str(fetch("smollm2")), predictor_rank=RANK)
    trainee = open_trainee(config)
    predictor = make_predictor(trainee, config)
    some = [some_of_each(part, MEASURED, 0) for part in trained]
    seen = Measured(trainee.model, predictor, some)
    added = warm_start.solve_head(
        predictor, seen.features, seen.used, centred=False, decorrelate=False
    )
    warm_start.scale_layers(predictor, seen.batches, centred=False)
    arrays = {"prior": seen.prior, **head(predictor, "added")}
    more = [batch for part in trained for batch in batches(some_of_each(part, READ, 1))]
    features, tasks = read_features(predictor, more)
    codes, read = solve_apart(predictor, features, tasks, len(about["tasks"]))
    warm_start.scale_layers(predictor, seen.batches, centred=False)
    arrays |= {"codes": codes, **head(predictor, "apart")}
    # float16 is near enough for a start, and half the size.
    small = {name: array.astype(np.float16) for name, array in arrays.items()}
    with open(path, "wb") as file:
        np.savez_compressed(file, **small)
    print(f"Explained: importance {added['explained']:.3f}, tasks {read:.3f}.")


def main() -> None:
    """Write the files that are missing."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    rows, start = FOLDER / "rows.npz", FOLDER / "start.npz"
    if not rows.exists():
        with new_file(rows) as scratch:
            write_rows(scratch)
    if not start.exists():
        with new_file(start) as scratch:
            write_start(scratch, rows)
    if not (examples := FOLDER / "examples").exists():
        with new_folder(examples) as scratch:
            write_examples(scratch, rows)
    print(FOLDER)


def ridge(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the weights that predict ``y`` from ``x``, by ridge regression."""
    square = x.T @ x
    strength = 1e-3 * np.trace(square) / len(square) * np.eye(len(square))
    return np.linalg.solve(square + strength, x.T @ y)


if __name__ == "__main__":
    main()
