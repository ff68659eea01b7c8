"""Train the checkpoint that ships in the package, test it as it ships, write its card."""

import argparse
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from mlx.utils import tree_flatten
from tqdm import tqdm

from ifp_mlx import load
from ifp_mlx.evaluation.rows import Row
from ifp_mlx.evaluation.tasks import make
from ifp_mlx.files.atomic import new_file, new_folder
from ifp_mlx.selection.prompts import tokenize

from . import outside
from .data import write_shapes
from .lab import means, overlaps
from .rows import ROWS, Table, opened
from .run import CACHE, RESULTS, Bench, tested
from .tasks import LONGEST, Example, all_tasks, test_examples
from .tasks import examples as draw_examples

MIX, ROW = "shipped", "shipped"
SEED, RATE = 300, 3e-3
KEEPS = (0.25, 0.5, 0.75, 1.0)
PARAPHRASES = Path(__file__).with_name("paraphrases.jsonl")
FOUND = RESULTS / "checkpoint.json"

CARD = """---
license: mit
library_name: ifp-mlx
---

# A small Instruction-Following Pruning model

{parameters:,} parameters, {layers} layers of {channels} FFN channels; every question
keeps {kept} of them ({share:.0%}), chosen by the model's own predictor. It was made by
`python -m examples.benchmarks.comparison.checkpoint` to show the method, and is the
default model of `python -m ifp_mlx.generate --prompt "What is Germany called in
French?"`.

## What it can do

It answers these kinds of questions, asked in English in many wordings, in small letters
too. Each figure is the share of {per_task} questions, in wordings it was not trained on,
that the compact model, loaded and sliced as `generate` does, answers exactly right.

| task | example | accuracy |
|---|---|---|
{table}

Mean over facts {facts:.2f}, over skills {skills:.2f}; over facts in small letters
{lower:.2f}. The facts are those it was trained on; numbers and words of the skills are not.
Of {written} paraphrases by a writer who had not seen its wordings
({file}), {paraphrased:.1%} are answered right; of those
that fail most are names of languages, asked for as "the … language".

Masks of two questions of one task share {within:.0%} of their channels, of different tasks
{between:.0%}; chance is {chance:.0%}. With one mask for each task, by `ifp_mlx.tasks make`,
{described:.1%} of the facts are right if it is made from the task's description, and
{shown:.1%} if from 16 questions.

| keep | {keeps} |
|---|{rule}|
| facts | {curve} |

## What it cannot do

Everything else. It knows no other language than English questions, no country, language
or fact beyond its lists (names of at most {longest} letters, answers of at most {answer}),
sorts two numbers, adds two digits, and handles words of three letters. Asked for anything
else it should say:

> {refusal}

It does so for {outside:.0%} of {per_task} such questions. To the others its wrong answer
looks exactly like a right one, so do not rely on it for facts.

## How it was made

{start_steps} steps of the dense model, then {steps}, {more} and {more} steps of predictor and
model together, batches of {batch_size} questions, seed {seed}, rate {rate:g} and at last
{last:g}: rows `shipped_first` to `shipped` of `examples/benchmarks/comparison/rows.yaml`. In
every second step more channels are kept than a quarter, and in every fourth all. Gates are
soft, in training and here. Weights are float32: at this size neither half precision nor
quantisation saves anything worth having.

## Data and licences

Facts: names, codes and currencies of the Unicode CLDR (Unicode License v3, © Unicode,
Inc.) by way of Babel (BSD). Skills: generators and word lists of reasoning-gym
(Apache-2.0). Words around the questions: "In the Year 2889" by Jules and Michel Verne,
in the public domain. Wordings and weights: MIT, as the package.
"""


def write(folder: Path, bench: Bench, rate: float) -> None:
    """Train the row through the trainer, and copy what it wrote."""
    bench.trained(ROW, rate, SEED)
    with new_folder(folder) as scratch:
        source = bench.folder(ROW, rate, SEED) / "model"
        shutil.copytree(source, scratch, dirs_exist_ok=True)


def answered(
    model: Any, tokenizer: Any, asked: Sequence[Example], keep: float | None = None
) -> list[bool]:
    """Answer questions with the compact model of each, greedily.

    Returns:
        Whether each answer is exactly right.
    """
    compacts = (model.compact(model.select(e.prompt, keep=keep)) for e in asked)
    pairs = zip(tqdm(asked, disable=None), compacts, strict=True)
    return [_right(compact, tokenizer, example) for example, compact in pairs]


def _right(compact: Any, tokenizer: Any, example: Example) -> bool:
    from mlx_lm import generate

    prompt = tokenize(tokenizer, [{"role": "user", "content": example.prompt}])
    answer = generate(compact, tokenizer, prompt, max_tokens=24)
    return answer.strip() == example.answer


def by_task(
    model: Any, tokenizer: Any, asked: Sequence[Example], *, examples: int = 0
) -> list[bool]:
    """Answer questions with one compact model a task, as `ifp_mlx.tasks make` chooses it.

    Args:
        model, tokenizer: of the checkpoint.
        asked: the questions.
        examples: from so many questions of training; 0: from the task's description.
    """
    right, tasks = [], all_tasks(MIX)
    for number in tqdm(sorted({e.task for e in asked}), disable=None):
        texts = [tasks[number].description]
        if examples:
            shown = draw_examples([tasks[number]], "train", examples, SEED)
            texts = [e.prompt for e in shown]
        rows = [Row(model.instruction_tokens(text), []) for text in texts]
        compact = model.compact(make(model, "task", rows).selection)
        right += [_right(compact, tokenizer, e) for e in asked if e.task == number]
    return right


def paraphrases() -> list[Example]:
    """Return questions written by somebody who had not seen the trained wordings."""
    numbers = {task.name: number for number, task in enumerate(all_tasks(MIX))}
    lines = PARAPHRASES.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [Example(numbers[r["task"]], r["prompt"], r["answer"]) for r in rows]


def test(folder: Path, per_task: int, seed: int) -> dict[str, Any]:
    """Return how much the checkpoint answers right, as it ships."""
    model, tokenizer = load(folder)
    tasks = all_tasks(MIX)
    drawn = test_examples(tasks, per_task, seed)
    right = answered(model, tokenizer, drawn)
    accuracy = {
        task.name: share(
            r for e, r in zip(drawn, right, strict=True) if e.task == number
        )
        for number, task in enumerate(tasks)
    }
    facts = [e for e in drawn if tasks[e.task].facts is not None]
    lower = [replace(e, prompt=e.prompt.lower()) for e in facts]
    written = paraphrases()
    return {
        "per_task": per_task,
        "accuracy": accuracy,
        **means(accuracy, tasks),
        "lower": share(answered(model, tokenizer, lower)),
        "paraphrases": len(written),
        "paraphrased": share(answered(model, tokenizer, written)),
        "keeps": {k: share(answered(model, tokenizer, facts, k)) for k in KEEPS},
        "described": share(by_task(model, tokenizer, facts)),
        "shown": share(by_task(model, tokenizer, facts, examples=16)),
    }


def share(right: Iterable[bool]) -> float:
    """Return how many of some answers are right, of 1."""
    return float(np.mean(list(right)))


def card(bench: Bench, folder: Path, found: dict[str, Any], rate: float) -> str:
    """Return the checkpoint's README."""
    scale, steps = bench.table.scale, bench.table.steps
    trained, tasks = opened(folder, scale), all_tasks(MIX)
    examples = {e.task: e for e in test_examples(tasks, 1, SEED)}
    lines = []
    for number, task in enumerate(tasks):
        shown = f"{examples[number].prompt} → {examples[number].answer}"
        lines.append(f"| {task.name} | {shown} | {found['accuracy'][task.name]:.2f} |")
    shares = overlaps(trained, tested(scale, SEED), len(tasks))
    assert shares is not None
    numbers = {k: shares[k] for k in ("within", "between", "chance")}
    kinds = ["facts", "skills", "outside", "lower", "paraphrased", "per_task"]
    kinds += ["described", "shown"]
    sizes = {k: getattr(scale, k) for k in ("layers", "channels", "kept", "batch_size")}
    return CARD.format(
        **(sizes | numbers | {k: found[k] for k in kinds}),
        keeps=" | ".join(f"{float(keep):g}" for keep in found["keeps"]),
        curve=" | ".join(f"{value:.3f}" for value in found["keeps"].values()),
        rule="|".join(["---"] * len(found["keeps"])),
        written=found["paraphrases"],
        file=f"`examples/benchmarks/comparison/{PARAPHRASES.name}`",
        start_steps=steps["start"],
        steps=steps["second"],
        more=bench.steps(ROW, rate, SEED),
        last=bench.table.rows[ROW]["lr"],
        rate=rate,
        parameters=sum(w.size for _, w in tree_flatten(trained.model.parameters())),
        share=scale.kept / scale.channels,
        table="\n".join(lines),
        seed=SEED,
        longest=LONGEST,
        answer=LONGEST + 2,
        refusal=outside.ANSWER,
    )


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=Path, required=True, help="one that is there is only tested"
    )
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--rate", type=float, default=RATE, help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="to see that it runs")
    args = parser.parse_args(arguments)
    table = Table.read(ROWS, MIX, tiny=args.tiny)
    write_shapes(args.cache / MIX / "shapes", table.scale)
    bench = Bench(table, args.cache / MIX, args.cache / MIX / "results")
    if not args.output.exists():
        write(args.output, bench, args.rate)
    found = test(args.output, table.scale.test_per_task, SEED)
    with new_file(FOUND) as scratch:
        scratch.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = card(bench, args.output, found, args.rate)
    (args.output / "README.md").write_text(text, encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
