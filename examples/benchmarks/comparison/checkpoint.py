"""Train the checkpoint that ships in the package, test it as it ships, write its card."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from mlx.utils import tree_flatten
from tqdm import tqdm

from ifp_mlx import load
from ifp_mlx.files.atomic import new_folder
from ifp_mlx.selection.prompts import tokenize

from .data import write_shapes
from .lab import means, overlaps
from .rows import ROWS, Table, opened
from .run import CACHE, Bench, tested
from .tasks import all_tasks, test_examples

MIX, ROW = "shipped", "ifp"
SEED, RATE = 300, 3e-3

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

It answers these kinds of questions, asked in English in about these words. Each figure
is the share of {per_task} questions, in wordings it was not trained on, that the
compact model, loaded and sliced as `generate` does, answers exactly right.

| task | example | accuracy |
|---|---|---|
{table}

Mean over facts {facts:.2f}, over skills {skills:.2f}. The facts are those it was trained
on; numbers and words of the skills are not. Masks of two questions of one task share
{within:.0%} of their channels, of different tasks {between:.0%}; chance is {chance:.0%}.

## What it cannot do

Everything else. It knows no other language than English questions, no country, language
or fact beyond its lists (names of at most {longest} letters; what is called the same in
both languages is left out), sorts two numbers, adds two digits, and handles words of
three letters. Asked for anything else it answers with what looks like its tasks; asked
to sort largest first, which it never learned, it is right {held_out:.0%} of the time. A
wrong answer looks exactly like a right one: do not rely on it for facts.

## How it was made

{start_steps} steps of the dense model, then {steps} steps of predictor and model
together, batches of {batch_size} questions, rate {rate:g}, seed {seed}; the recipe of row
`ifp` in `examples/benchmarks/comparison`. Gates are soft, in training and here. Weights are
float32: at this size neither half precision nor quantisation saves anything worth having.

## Data and licences

Facts: names, codes and currencies of the Unicode CLDR (Unicode License v3, © Unicode,
Inc.) by way of Babel (BSD). Skills: generators and word lists of reasoning-gym
(Apache-2.0). Wordings and weights: MIT, as the package.
"""


def write(folder: Path, bench: Bench, rate: float) -> None:
    """Train the row through the trainer, and copy what it wrote."""
    bench.trained(ROW, rate, SEED)
    with new_folder(folder) as scratch:
        source = bench.folder(ROW, rate, SEED) / "model"
        shutil.copytree(source, scratch, dirs_exist_ok=True)


def test(folder: Path, per_task: int, seed: int) -> dict[str, Any]:
    """Answer test questions with the checkpoint's own compact models, greedily."""
    from mlx_lm import generate

    model, tokenizer = load(folder)
    tasks = all_tasks()
    right: dict[str, list[bool]] = {task.name: [] for task in tasks}
    for example in tqdm(test_examples(tasks, per_task, seed), disable=None):
        compact = model.compact(model.select(example.prompt))
        prompt = tokenize(tokenizer, [{"role": "user", "content": example.prompt}])
        answer = generate(compact, tokenizer, prompt, max_tokens=20)
        right[tasks[example.task].name].append(answer.strip() == example.answer)
    accuracy = {name: float(np.mean(values)) for name, values in right.items()}
    return {"accuracy": accuracy} | means(accuracy, tasks)


def card(bench: Bench, folder: Path, found: dict[str, Any], rate: float) -> str:
    """Return the checkpoint's README."""
    scale, steps = bench.table.scale, bench.table.steps
    trained, tasks = opened(folder, scale), all_tasks()
    examples = {e.task: e for e in test_examples(tasks, 1, SEED)}
    lines = []
    for number, task in enumerate(tasks):
        shown = f"{examples[number].prompt} → {examples[number].answer}"
        name = task.name + (" (never trained)" if task.held_out else "")
        lines.append(f"| {name} | {shown} | {found['accuracy'][task.name]:.2f} |")
    share = overlaps(trained, tested(scale, SEED), len(tasks))
    assert share is not None
    numbers = {k: share[k] for k in ("within", "between", "chance")}
    values = {k: found[k] for k in ("facts", "skills", "held_out")}
    sizes = {k: getattr(scale, k) for k in ("layers", "channels", "kept", "batch_size")}
    return CARD.format(
        **(sizes | numbers | values),
        start_steps=steps["start"],
        steps=steps["second"],
        rate=rate,
        parameters=sum(w.size for _, w in tree_flatten(trained.model.parameters())),
        share=scale.kept / scale.channels,
        per_task=scale.test_per_task,
        table="\n".join(lines),
        seed=SEED,
        longest=8,
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
    text = card(bench, args.output, found, args.rate)
    (args.output / "README.md").write_text(text, encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
