"""The README of the trained mixture."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..comparison.tasks import all_tasks

if TYPE_CHECKING:
    from .train import Recipe

CARD = """---
license: mit
library_name: mlx
---

# A small mixture of experts

{parameters:,} parameters of mlx-lm's `qwen3_moe`: {layers} layers of {experts} experts with
{width} channels each, of which every token uses {per_token}. It was made by `python -m
examples.benchmarks.experts.train` to measure selections of experts on it, since no registry
has a trained mixture that is small enough. Any program that loads mlx-lm's folders loads
it.

## What it can do

It answers these kinds of questions, asked in English in words like these. Each figure is
the share of {per_task} questions, in wordings that it was not trained on, that the whole
model answers exactly right.

| task | example | accuracy |
|---|---|---|
{table}

Mean over facts {facts:.2f}, over skills {skills:.2f}. The facts are those it was trained
on; the numbers and words of the skills are new to it. `sum` is hardly learned because of
how its questions are split: the sums 3, 8, 13 and 18 are only ever tested.

## What it cannot do

Everything else; see the card of the checkpoint in `ifp_mlx/checkpoint`, which learned the
same. A wrong answer looks exactly like a right one: do not rely on it for facts.

## How it was made

It was trained in {steps} steps of {batch_size} questions with AdamW, highest learning rate
{lr}, gradients clipped at 1, seed {seed}; only answers count in the loss. The
load-balancing loss is that of the Switch Transformer, {balance} times for each layer, over
a whole batch.
{pools}
Weights are float32.

## Data and licences

Facts: names, codes and currencies of the Unicode CLDR (Unicode License v3, © Unicode,
Inc.) by way of Babel (BSD). Skills: generators and word lists of reasoning-gym
(Apache-2.0). Wordings and weights: MIT, as the package.
"""

POOLS = """
In training, a batch's questions of one domain were one document, and all tokens of a
document chose their experts from one pool: in each layer the experts that the document's
prompts found likeliest. The size of the pool was drawn for every document and step, from
{smallest} to all {experts}. So training knew which questions are of one domain. This is the
recipe of EMO (Ai2, arXiv:2605.06663), where each document is one of the web; its purpose is
that experts serve domains, and an ordinary mixture is not trained like this. Pools are not
part of the model: in use every token chooses among all experts.
"""

NO_POOLS = """
Every token chose among all experts, as in an ordinary mixture.
"""


def card(recipe: "Recipe", found: dict[str, Any], per_task: int) -> str:
    """Return the README of a folder.

    Args:
        recipe: by which it was trained.
        found: what was measured: accuracies, their means, examples, parameters.
        per_task: questions of each task.
    """
    lines = []
    for task in all_tasks(recipe.scale.mix):
        name = task.name + (" (never trained)" if task.held_out else "")
        shown, right = found["examples"][task.name], found["accuracy"][task.name]
        lines.append(f"| {name} | {shown} | {right:.2f} |")
    how = POOLS.format(smallest=recipe.smallest_pool, experts=recipe.experts)
    values = asdict(recipe.scale) | asdict(recipe) | found
    return CARD.format(
        **values,
        per_task=per_task,
        table="\n".join(lines),
        pools=how if recipe.smallest_pool else NO_POOLS,
    )
