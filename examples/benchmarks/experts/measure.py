"""Measure what keeping few experts costs a small trained mixture.

    python -m examples.benchmarks.experts.measure --model FOLDER --name NAME

writes results/NAME.json, from which report.py makes the tables of the page.
"""

import argparse
import json
import time
from collections.abc import Sequence
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ifp_mlx import load
from ifp_mlx.evaluation.tasks import overlap
from ifp_mlx.files.atomic import new_file
from ifp_mlx.model.checkpoint import IFPModel
from ifp_mlx.selection.masks import Selection
from ifp_mlx.selection.scores import blend_scores
from ifp_mlx.slicing import reading
from ifp_mlx.slicing.masked import mask_model, set_masks
from ifp_mlx.slicing.routing import CONTRIBUTION, COUNT, slots_of

from ..comparison.corpus import Corpus, collate
from ..comparison.tasks import all_tasks, examples, test_examples
from .train import CHECKPOINT

RESULTS = Path(__file__).parent / "results"
SHARES = (0.75, 0.5, 0.25, 0.125)
SEED = 400  # of the questions; no choice was made on these
RANDOM = 5  # random masks, whose accuracies are averaged
BATCH = 256

Row = tuple[list[int], list[int], list[int], int]  # instruction, prompt, answer, domain


class Scoring(NamedTuple):
    """Scores of the experts, and which of them select for each question.

    Attributes:
        scores: ``[N, L, E]``.
        of: ints ``[S, R]``, from 0 to ``N - 1``; accuracies are the mean over ``S``.
    """

    scores: Sequence[mx.array]
    of: np.ndarray


class Lab:
    """A mixture, and the questions that it is measured on.

    Attributes:
        model: the mixture.
        dense: all of it, to read texts with.
        masked: the same, with masks.
        domains: their names.
        test: ``R`` questions, as many of each domain, in order.
        train: of each domain two lists of other questions.
    """

    def __init__(self, folder: Path, questions: int, per_task: int) -> None:
        self.model, _ = load(folder)
        self.dense, self.masked = self.model.dense(), self.model.dense()
        self.routers = mask_model(self.masked, self.model.plan)
        tasks = all_tasks()
        live = [number for number, task in enumerate(tasks) if not task.held_out]
        self.domains = [tasks[number].name for number in live]
        # Twice as many as are needed, since a few are too long.
        drawn = Corpus(test_examples(tasks, 2 * questions, SEED), BATCH).rows
        asked = [[row for row in drawn if row[3] == n] for n in live]
        self.test = [row for rows in asked for row in rows[:questions]]
        drawn = Corpus(examples(tasks, "train", 200 * per_task, SEED), BATCH).rows
        once = [{tuple(row[1]): row for row in drawn if row[3] == n} for n in live]
        taught = [list(rows.values()) for rows in once]  # or halves could share some
        self.train = [
            (rows[:per_task], rows[per_task : 2 * per_task]) for rows in taught
        ]
        self.questions = questions

    @cached_property
    def task_scores(self) -> list[list[mx.array]]:
        """Scores of each domain's experts, by its first examples and by its second."""
        pairs = [[[row[1:3] for row in half] for half in two] for two in self.train]
        by = [
            [self.model.use_scores(half, dense=self.dense) for half in two]
            for two in pairs
        ]
        return [list(halves) for halves in zip(*by, strict=True)]

    def select(self, scores: mx.array, k: int) -> Selection:
        """Return what the package keeps by some scores."""
        return self.model.select(
            [0], selector="activation", scores=scores, target_size=k
        )

    def masked_choices(self, rows: Sequence[Row], masks: mx.array) -> np.ndarray:
        """Return :func:`choices` of the masked model, a mask ``[L, E]`` for each row."""
        set_masks(self.routers, masks.transpose(1, 0, 2)[:, :, None])
        return choices(self.masked, rows)

    def right(self, rows: Sequence[Row], masks: mx.array) -> np.ndarray:
        """Return which questions are answered exactly right, bool ``[R]``."""
        found = []
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            made = self.masked_choices(part, masks[start : start + BATCH])
            tokens = np.array(collate(part).tokens[:, 1:])
            found.append(((made == tokens) | (made < 0)).all(axis=1))
        return np.concatenate(found)

    def by_domain(self, right: np.ndarray) -> list[float]:
        """Return the mean of each domain over its questions, which lie in order."""
        means = right.reshape(len(self.domains), -1).mean(axis=1)
        return [round(float(mean), 4) for mean in means]


def choices(model: nn.Module, rows: Sequence[Row]) -> np.ndarray:
    """Return a model's likeliest token at each place of an answer, after the right
    tokens before it; -1 elsewhere. Ints ``[B, T - 1]``.
    """
    batch = collate(rows)
    best = model(batch.tokens[:, :-1]).argmax(axis=-1)
    answers = batch.loss_mask[:, 1:] > 0
    return np.array(mx.where(answers, best.astype(mx.int32), -1))


def scorings(lab: Lab) -> dict[str, Scoring]:
    """Return every way to score the experts for each question."""
    model, dense = lab.model, lab.dense
    each = np.arange(len(lab.test))[None]
    domain = each // lab.questions
    count = len(lab.domains)
    # Every other domain's mask in turn.
    other = (domain + 1 + each % lab.questions % (count - 1)) % count
    local = [model.use_scores([(row[1],)], dense=dense) for row in lab.test]
    task = lab.task_scores[0]
    whole = [[(row[1] + row[2],) for row in first] for first, _ in lab.train]
    everything = [text for texts in whole for text in texts]
    # Instead of the package's calibration texts, which this model cannot read.
    prior = model.use_scores(everything, dense=dense)
    found = {
        "prompt": (local, each),
        "blend": ([blend_scores(one, prior, unit="expert") for one in local], each),
        "blend_ranks": ([blend_scores(one, prior) for one in local], each),
        "task": (task, domain),
        "task_mean": ([reap_mean(model, dense, texts) for texts in whole], domain),
        "other": (task, other),
        "prior": ([prior], 0 * each),
        "prior_mean": ([reap_mean(model, dense, everything)], 0 * each),
        "random": (
            [model.scores([0], "random", seed=seed) for seed in range(RANDOM)],
            np.arange(RANDOM)[:, None] + 0 * each,
        ),
    }
    return {name: Scoring(*about) for name, about in found.items()}


def reap_mean(
    model: IFPModel, dense: nn.Module, texts: Sequence[reading.Example]
) -> mx.array:
    """Return REAP's own score of every expert, float32 ``[L, E]``, a control.

    Source: Lasby et al. 2025 (arXiv:2510.13999) eq. 9: the mean over an expert's
    tokens, where the package takes the sum.
    """
    plan, uses = model.plan, [mx.array(0.0)] * model.layers
    modules = plan.modules(dense)

    def visit(layer: int, weights: mx.array, *args: Any, **kwargs: Any) -> Any:
        output, use = reading.read_layer(
            modules[layer], plan.layers[layer], weights, *args, **kwargs
        )
        uses[layer] = uses[layer] + use[0]
        return output

    for batch in reading.batches_of(texts):
        reading.read_text(dense, plan, batch, visit)
    use = mx.stack(uses)
    return use[:, CONTRIBUTION] / mx.maximum(use[:, COUNT], 1)


def accuracies(lab: Lab, scoring: Scoring, k: int) -> list[float]:
    """Return the accuracy of each domain when ``k`` experts of a layer are kept."""
    masks = mx.stack([lab.select(scores, k).mask() for scores in scoring.scores])
    right = [lab.right(lab.test, masks[mx.array(of)]) for of in scoring.of]
    return lab.by_domain(np.mean(right, axis=0))


def overlaps(lab: Lab, k: int) -> dict[str, Any]:
    """Return the share of experts that two masks have in common in each layer: masks
    from two sets of examples of a domain, and masks of two domains.
    """
    first, second = (
        [lab.select(scores, k) for scores in half] for half in lab.task_scores
    )
    found = {
        "within": [overlap(*two) for two in zip(first, second, strict=True)],
        "between": [overlap(*two) for two in combinations(first, 2)],
    }
    means = {name: np.mean(rows, axis=0) for name, rows in found.items()}
    layers = {name: mean[:, 0].round(4).tolist() for name, mean in means.items()}
    return layers | {"chance": k / lab.model.channels}


def foretold(lab: Lab, per_domain: int, k: int) -> dict[str, Any]:
    """Return, for the first questions of each domain, in order, what a selection by the
    prompt says of itself, and whether the answer stays right. For the very first of
    each, return whether the sliced model chooses the masked one's tokens.
    """
    starts = range(0, len(lab.test), lab.questions)
    rows = [row for start in starts for row in lab.test[start : start + per_domain]]
    made = [
        lab.model.select(row[1], selector="activation", target_size=k) for row in rows
    ]
    masks = mx.stack([selection.mask() for selection in made])
    same = 0
    for number in range(0, len(rows), per_domain):
        sliced = choices(lab.model.compact(made[number]), rows[number : number + 1])
        one = slice(number, number + 1)
        same += int((sliced == lab.masked_choices(rows[one], masks[one])).all())
    return {
        "agreement": [round(s.origin.agreement or 0, 4) for s in made],
        "router_mass": [round(s.origin.router_mass or 0, 4) for s in made],
        "right_whole": lab.right(rows, mx.ones(masks.shape)).astype(int).tolist(),
        "right": lab.right(rows, masks).astype(int).tolist(),
        "sliced_same": same,
    }


def measured(
    folder: Path, name: str, questions: int, per_task: int, told: int
) -> dict[str, Any]:
    """Return everything that is measured of a mixture.

    Args:
        folder: of the mixture.
        name: of the results.
        questions: of each domain.
        per_task: examples of a task mask.
        told: questions of each domain whose selections are asked about themselves.
    """
    start, lab = time.process_time(), Lab(folder, questions, per_task)
    E = lab.model.channels
    per_token = slots_of(lab.dense, lab.model.plan)
    sizes = [k for k in (int(share * E) for share in SHARES) if k >= per_token]
    every = mx.ones((len(lab.test), lab.model.layers, E))
    found: dict[str, Any] = {
        "name": name,
        "layers": lab.model.layers,
        "experts": E,
        "per_token": per_token,
        "questions": questions,
        "examples": per_task,
        "told": told,
        "domains": lab.domains,
        "whole": lab.by_domain(lab.right(lab.test, every)),
    }
    ways = scorings(lab)
    found["accuracy"] = {
        way: {k: accuracies(lab, scoring, k) for k in sizes}
        for way, scoring in ways.items()
    }
    found["overlap"] = {k: overlaps(lab, k) for k in sizes}
    found["foretold"] = {k: foretold(lab, told, k) for k in sizes}
    found["cpu_seconds"] = round(time.process_time() - start)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=CHECKPOINT)
    parser.add_argument("--name", default="pools", help="of the results")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--questions", type=int, default=100, help="of each domain")
    parser.add_argument("--examples", type=int, default=16, help="of a task mask")
    parser.add_argument(
        "--told", type=int, default=20, help="questions of each domain whose selections "
        "are asked about themselves",
    )  # fmt: skip
    args = parser.parse_args(arguments)
    found = measured(args.model, args.name, args.questions, args.examples, args.told)
    args.results.mkdir(parents=True, exist_ok=True)
    with new_file(args.results / f"{args.name}.json") as scratch:
        scratch.write_text(json.dumps(found) + "\n", encoding="utf-8")
    print(f"{args.name}: {found['cpu_seconds']} seconds of CPU")


if __name__ == "__main__":
    main()
