"""Train a small mixture of experts on the comparison's facts and skills, and write it.

Its class is mlx-lm's own and its folder an ordinary one. Selections of experts are
measured on it.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from tqdm import tqdm

from ifp_mlx.files.atomic import new_file, new_folder
from ifp_mlx.slicing.stock import build
from ifp_mlx.training.batches import Batch
from ifp_mlx.training.maskers import Budget
from ifp_mlx.training.step import schedule, target_losses

from ..comparison.corpus import Corpus, write_tokenizer
from ..comparison.lab import DENSE, Scale, Trained, measure
from ..comparison.tasks import all_tasks, examples, test_examples
from .card import card
from .routing import read, routers_in_training

CHECKPOINT = Path(__file__).parent / "checkpoint"
SAVE_EVERY = 500


@dataclass(frozen=True)
class Recipe:
    """The sizes of the mixture, and how it is trained.

    Attributes:
        scale: sizes that the mixture shares with the models of the comparison.
        experts: of each layer, ``E``.
        per_token: experts that a token chooses.
        width: channels of an expert.
        balance: weight of the load-balancing loss of a layer.
        smallest_pool: fewest experts of a document's pool; 0 leaves pools out.
        drawn: examples; when all were seen, the first come again.
        seed: of data, weights and pools.
    """

    scale: Scale
    experts: int = 16
    per_token: int = 2
    width: int = 32
    balance: float = 0.1
    smallest_pool: int = 4
    drawn: int = 200_000
    seed: int = 300

    def config(self) -> dict[str, Any]:
        """Return the config.json."""
        return self.scale.config(self.width) | {
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "head_dim": self.scale.width // self.scale.heads,
            "moe_intermediate_size": self.width,
            "num_experts": self.experts,
            "num_experts_per_tok": self.per_token,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "rope_theta": 10000.0,
            "hidden_act": "silu",
        }

    def pools(self, step: int, domains: int) -> list[int] | None:
        """Return the size of the pool of each domain at a step."""
        if not self.smallest_pool:
            return None
        rng = np.random.default_rng([self.seed, step])
        return rng.integers(self.smallest_pool, self.experts + 1, domains).tolist()


# Chosen among six recipes with pools, by other draws of questions than the card's.
RECIPE = Recipe(Scale(layers=3, heads=4, batch_size=96, steps=3000, lr=5e-3))


def fit(
    model: nn.Module, batches: Callable[[int], Batch], recipe: Recipe, state: Path
) -> None:
    """Train a stock mixture in place; a run that was stopped goes on from ``state``."""
    scale, domains = recipe.scale, len(all_tasks(recipe.scale.mix))
    routers = routers_in_training(model, recipe.per_token)
    rate = schedule(scale.lr, 200, scale.steps)
    optimizer = optim.AdamW(rate, weight_decay=0.01, bias_correction=True)
    optimizer.init(model.trainable_parameters())

    def loss(batch: Batch, pools: list[int] | None) -> tuple[mx.array, mx.array]:
        reading = read(batch, pools)
        for router in routers:
            router._reading = reading
        logits = model(batch.tokens[:, :-1]).astype(mx.float32)
        mean = target_losses(logits, batch).sum() / batch.loss_mask[:, 1:].sum()
        uneven = mx.stack([router._imbalance for router in routers])
        return mean + recipe.balance * uneven.sum(), mx.stack([mean, uneven.mean()])

    gradient = nn.value_and_grad(model, loss)
    progress = tqdm(
        range(restored(model, optimizer, recipe, state), scale.steps), disable=None
    )
    for step in progress:
        (_, found), grads = gradient(batches(step), recipe.pools(step, domains))
        grads, _ = optim.clip_grad_norm(grads, 1.0)
        optimizer.update(model, grads)
        mx.eval(model.parameters(), optimizer.state, found)
        progress.set_postfix_str(
            "loss {:.4f}, imbalance {:.3f}".format(*found.tolist())
        )
        if (step + 1) % SAVE_EVERY == 0:
            keep(model, optimizer, recipe, state, step + 1)
    for router in routers:
        router.__class__ = nn.Linear


def keep(
    model: nn.Module,
    optimizer: optim.Optimizer,
    recipe: Recipe,
    state: Path,
    steps: int,
) -> None:
    """Write the state from which :func:`restored` goes on."""
    both = {"model": model.parameters(), "optimizer": optimizer.state}
    about = {"steps": str(steps), "recipe": repr(recipe)}
    with new_file(state) as scratch:
        mx.save_safetensors(str(scratch), dict(tree_flatten(both)), about)


def restored(
    model: nn.Module, optimizer: optim.Optimizer, recipe: Recipe, state: Path
) -> int:
    """Load the state of a run that was stopped; return how many steps it has made."""
    if not state.exists():
        return 0
    kept: Any = mx.load(str(state), return_metadata=True)
    tensors, about = kept
    if about["recipe"] != repr(recipe):
        raise ValueError(f"{state} is of another recipe; delete it or choose another.")
    both: Any = tree_unflatten(list(tensors.items()))
    model.update(both["model"])
    optimizer.state = both["optimizer"]
    return int(about["steps"])


def write(folder: Path, recipe: Recipe, state: Path) -> None:
    """Train the mixture of a recipe, and write it as an ordinary model folder."""
    from mlx_lm.utils import save_config, save_model

    scale, tasks = recipe.scale, all_tasks(recipe.scale.mix)
    mx.random.seed(recipe.seed)
    model = build(recipe.config())
    mx.eval(model.parameters())
    drawn = examples(tasks, "train", recipe.drawn, recipe.seed)
    batches = Corpus(drawn, scale.batch_size, scale.mix, seed=recipe.seed)
    fit(model, batches, recipe, state)
    with new_folder(folder) as scratch:
        save_model(scratch, model)
        save_config(recipe.config(), scratch / "config.json")
        write_tokenizer(scratch)


def test(folder: Path, recipe: Recipe, per_task: int) -> dict[str, Any]:
    """Return the accuracy of each task, asked in wordings that were not trained."""
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    tasks = all_tasks(recipe.scale.mix)
    drawn = test_examples(tasks, per_task, recipe.seed)
    whole = Trained(model, DENSE, Budget(0))
    rows = Corpus(drawn, 64, recipe.scale.mix).all()
    return measure(whole, rows, tasks) | {
        "examples": {tasks[e.task].name: f"{e.prompt} → {e.answer}" for e in drawn},
        "parameters": sum(value.size for _, value in tree_flatten(model.parameters())),
    }


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=CHECKPOINT,
        help="folder of the model; one that is there is only tested",
    )  # fmt: skip
    parser.add_argument(
        "--state", type=Path, default=Path("models/experts/state.safetensors"),
        help="where a run that is stopped goes on from",
    )  # fmt: skip
    parser.add_argument(
        "--no-pools", action="store_true", help="the ordinary recipe: every expert is "
        "open to every token",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=RECIPE.seed)
    parser.add_argument("--steps", type=int, default=RECIPE.scale.steps)
    parser.add_argument("--per-task", type=int, default=100, help="test questions")
    args = parser.parse_args(arguments)
    scale = replace(RECIPE.scale, steps=args.steps)
    recipe = replace(RECIPE, scale=scale, seed=args.seed)
    if args.no_pools:
        recipe = replace(recipe, smallest_pool=0)
    if not args.output.exists():
        write(args.output, recipe, args.state)
    found = test(args.output, recipe, args.per_task)
    text = card(recipe, found, args.per_task)
    (args.output / "README.md").write_text(text, encoding="utf-8")
    print({key: round(found[key], 3) for key in ("facts", "skills", "mean")})


if __name__ == "__main__":
    main()
