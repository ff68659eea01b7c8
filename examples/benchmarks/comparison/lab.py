"""Sizes that all rows share, and how a trained model is tested."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
import numpy as np

from ifp_mlx.training.batches import Batch
from ifp_mlx.training.maskers import Budget, FixedMask, Masker
from ifp_mlx.training.step import Pair, target_losses

from .corpus import VOCABULARY
from .tasks import Task

DENSE = FixedMask(None)


@dataclass(frozen=True)
class Scale:
    """The mix and the sizes that all rows share."""

    mix: str = "plain"
    width: int = 64
    layers: int = 2
    heads: int = 2
    channels: int = 256
    kept: int = 64
    batch_size: int = 32
    steps: int = 1000
    lr: float = 1e-2
    test_per_task: int = 100

    def config(self, channels: int) -> dict[str, Any]:
        """Return the config.json of a llama with that many channels."""
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "intermediate_size": channels,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,  # mixtures would have another by default
            "vocab_size": VOCABULARY,
            "tie_word_embeddings": True,
            "max_position_embeddings": 256,
            "eos_token_id": 0,
        }

    def compute(self, channels: int) -> int:
        """Return the multiplications per token of a forward pass with that width."""
        ffn = 3 * self.width * channels
        return self.layers * (4 * self.width**2 + ffn) + self.width * VOCABULARY


@dataclass
class Trained:
    """What a row ends with, ready to be tested.

    Attributes:
        model: mlx-lm's own class, or one that takes the same call.
        masker: where its masks come from.
        budget: how they are made.
    """

    model: nn.Module
    masker: Masker
    budget: Budget


def measure(
    trained: Trained, batches: Sequence[Batch], tasks: Sequence[Task]
) -> dict[str, Any]:
    """Return accuracy and loss of every task.

    An answer is right if every token of it is the model's first choice, which is what
    greedy decoding would give.
    """
    model = trained.model.eval()
    right: dict[str, list[bool]] = {task.name: [] for task in tasks}
    losses: dict[str, list[float]] = {task.name: [] for task in tasks}
    for batch in batches:
        if trained.masker is DENSE:  # also a model that could not be masked
            logits = model(batch.tokens[:, :-1])
        else:
            logits = (
                Pair(model, trained.masker).eval().logits(batch, trained.budget, None)
            )
        counts = batch.loss_mask[:, 1:] > 0
        wrong = (logits.argmax(axis=-1) != batch.tokens[:, 1:]) & counts
        loss = target_losses(logits, batch).sum(axis=1) / counts.sum(axis=1)
        found = zip(
            np.array(batch.tasks),
            np.array(wrong.any(axis=1)),
            np.array(loss),
            strict=True,
        )
        for number, failed, nats in found:
            name = tasks[number].name
            right[name].append(not failed)
            losses[name].append(float(nats))
    accuracy = {name: float(np.mean(values)) for name, values in right.items()}
    return {
        "accuracy": accuracy,
        "loss": {name: float(np.mean(values)) for name, values in losses.items()},
    } | means(accuracy, tasks)


def means(accuracy: dict[str, float], tasks: Sequence[Task]) -> dict[str, float]:
    """Return the mean accuracy over facts, skills, both, and what is beside them: the
    held-out family, and questions from outside.
    """
    groups: dict[str, list[float]] = {"facts": [], "skills": []}
    for task in tasks:
        group = "facts" if task.facts else "skills"
        if task.held_out or task.kind == "outside":
            group = "held_out" if task.held_out else "outside"
        groups.setdefault(group, []).append(accuracy[task.name])
    found = {name: float(np.mean(values)) for name, values in groups.items()}
    return found | {"mean": float(np.mean(groups["facts"] + groups["skills"]))}


def overlaps(
    trained: Trained, batches: Sequence[Batch], tasks: int
) -> dict[str, Any] | None:
    """Return how much the masks of two test instructions share, of one task and of two.

    Args:
        trained: the model.
        batches: the test examples.
        tasks: their number, ``N``.

    Returns:
        ``None`` where all have one mask; else ``within``, ``between``, ``chance``, and
        ``by_depth``, the overlap of every two tasks in every layer, ``[L, N, N]``.

    Source: Hou et al. 2025 (arXiv:2501.02086) fig. 3.
    """
    rows, numbers = [], []
    for batch in batches:
        masks = trained.masker(batch, trained.budget, "binary")
        if masks is None or masks.ndim == 2:
            return None
        rows.append(np.array(masks[:, :, 0].transpose(1, 0, 2)))
        numbers.append(np.array(batch.tasks))
    kept, task = np.concatenate(rows), np.concatenate(numbers)
    k, F = trained.budget.k, kept.shape[-1]
    names = range(tasks)
    sums = np.stack([kept[task == n].sum(axis=0) for n in names])  # [N, L, F]
    counts = np.bincount(task, minlength=len(names)).astype(float)
    shared = np.einsum("alf,blf->lab", sums, sums) / k
    pairs = counts[:, None] * counts[None]
    for n in names:  # a mask is not compared with itself
        shared[:, n, n] -= counts[n]
        pairs[n, n] -= counts[n]
    by_depth = shared / pairs
    inside = np.eye(len(names), dtype=bool)
    return {
        "within": float(by_depth[:, inside].mean()),
        "between": float(by_depth[:, ~inside].mean()),
        "chance": k / F,
        "by_depth": np.round(by_depth, 3).tolist(),
    }
