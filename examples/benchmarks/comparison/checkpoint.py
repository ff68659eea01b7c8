"""Train the checkpoint that ships in the package, test it as it ships, write its card."""

import argparse
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from ifp_mlx import load
from ifp_mlx.files.atomic import new_folder
from ifp_mlx.model.checkpoint import PREDICTOR_FOLDER, IFPConfig
from ifp_mlx.selection.predictor import SparsityPredictor
from ifp_mlx.selection.prompts import tokenize
from ifp_mlx.training.maskers import Budget, PredictorMasker

from .corpus import write_tokenizer
from .lab import Lab, Scale, Trained, means, overlaps
from .rows import ifp
from .tasks import all_tasks, test_examples

SCALE = Scale(channels=512, kept=128, start_steps=2000, steps=3000, lr=8e-3)
SEED = 300

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
together, batches of {batch_size} questions, seed {seed}; the recipe of row `ifp` in
`examples/benchmarks/comparison`. Gates are soft, in training and here. Weights are
float32: at this size neither half precision nor quantisation saves anything worth having.

## Data and licences

Facts: names, codes and currencies of the Unicode CLDR (Unicode License v3, © Unicode,
Inc.) by way of Babel (BSD). Skills: generators and word lists of reasoning-gym
(Apache-2.0). Wordings and weights: MIT, as the package.
"""


def write(folder: Path, lab: Lab, trained: Trained) -> None:
    """Write the trained model as an IFP checkpoint folder."""
    from mlx_lm.models import llama
    from mlx_lm.utils import save_config, save_model

    scale, predictor = lab.scale, trained.masker["predictor"]
    assert isinstance(predictor, SparsityPredictor)
    stock = llama.Model(llama.ModelArgs.from_dict(scale.config(scale.channels)))
    _copy(trained.model, stock)
    with new_folder(folder) as scratch:
        save_model(scratch, stock)
        save_config(scale.config(scale.channels), scratch / "config.json")
        write_tokenizer(scratch)
        budget = trained.budget
        IFPConfig(
            target_size=budget.k, gates=budget.gates, temperature=budget.temperature
        ).save(scratch)
        predictor.write(scratch / PREDICTOR_FOLDER)


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


def opened(folder: Path) -> Trained:
    """Return the checkpoint as it ships, for the comparison's measurements."""
    model, _ = load(folder)
    assert model.predictor is not None and model.ifp.target_size is not None
    budget = Budget(model.ifp.target_size, model.ifp.temperature, model.ifp.gates)
    return Trained(model.dense(), PredictorMasker(model.predictor), budget, 0.0, {})


def card(lab: Lab, folder: Path, found: dict[str, Any], per_task: int) -> str:
    """Return the checkpoint's README."""
    from mlx.utils import tree_flatten

    scale, trained = lab.scale, opened(folder)
    examples = {e.task: e for e in test_examples(lab.tasks, 1, lab.seed)}
    lines = []
    for number, task in enumerate(all_tasks()):
        shown = f"{examples[number].prompt} → {examples[number].answer}"
        name = task.name + (" (never trained)" if task.held_out else "")
        lines.append(f"| {name} | {shown} | {found['accuracy'][task.name]:.2f} |")
    share = overlaps(trained, lab.test_batches(), len(lab.tasks))
    assert share is not None
    numbers = {k: share[k] for k in ("within", "between", "chance")}
    values = {k: found[k] for k in ("facts", "skills", "held_out")}
    sizes = {k: getattr(scale, k) for k in scale.__dataclass_fields__}
    weights = tree_flatten(trained.model.parameters())
    return CARD.format(
        **(sizes | numbers | values),
        parameters=sum(value.size for _, value in weights),
        share=scale.kept / scale.channels,
        per_task=per_task,
        table="\n".join(lines),
        seed=lab.seed,
        longest=8,
    )


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=Path, required=True, help="one that is there is only tested"
    )
    parser.add_argument("--cache", type=Path, default=Path("models/comparison/shipped"))
    parser.add_argument("--per-task", type=int, default=50)
    args = parser.parse_args(arguments)
    lab = Lab(SCALE, SEED, args.cache)
    if not args.output.exists():
        write(args.output, lab, ifp(lab))
    found = test(args.output, args.per_task, SEED)
    text = card(lab, args.output, found, args.per_task)
    (args.output / "README.md").write_text(text, encoding="utf-8")
    print(json.dumps(found))


def _copy(source: nn.Module, target: nn.Module) -> None:
    from mlx.utils import tree_flatten

    target.load_weights(tree_flatten(source.parameters()))
    mx.eval(target.parameters())


if __name__ == "__main__":
    main()
