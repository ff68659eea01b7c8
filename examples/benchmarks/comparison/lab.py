"""One seed of the comparison: its data, its dense start, training and testing."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ifp_mlx.slicing.plan import plan_of
from ifp_mlx.training.batches import Batch
from ifp_mlx.training.maskers import Budget, FixedMask, Masker
from ifp_mlx.training.recipe import TrainConfig
from ifp_mlx.training.run import train
from ifp_mlx.training.step import Pair, target_losses

from .corpus import VOCABULARY, Corpus, describe
from .tasks import Task, all_tasks, examples, test_examples

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
    start_steps: int = 1000
    steps: int = 1000
    warm_steps: int = 300
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
        spent: multiplications of training, in units of one step of the dense model.
        extra: what else is worth keeping.
    """

    model: nn.Module
    masker: Masker
    budget: Budget
    spent: float
    extra: dict[str, Any]


class Lab:
    """Data and training for one seed.

    Args:
        scale: sizes.
        seed: of data, weights and order.
        cache: folder where models that several rows begin from are kept.
    """

    def __init__(self, scale: Scale, seed: int, cache: Path) -> None:
        self.scale, self.seed, self.cache = scale, seed, cache
        self.tasks = all_tasks(scale.mix)
        total = scale.start_steps + scale.steps
        drawn = examples(self.tasks, "train", (total + 50) * scale.batch_size, seed)
        size, mix = scale.batch_size, scale.mix
        self.data = Corpus(drawn, size, mix, descriptions=0.2, seed=seed)
        cache.mkdir(parents=True, exist_ok=True)

    def test_batches(self, *, described: bool = False) -> list[Batch]:
        """Return the test examples; ``described``: their task's description selects."""
        drawn = test_examples(self.tasks, self.scale.test_per_task, self.seed)
        corpus = Corpus(drawn, 64, self.scale.mix)
        if described:
            describe(self.tasks, corpus)
        return corpus.all()

    def new_model(self, channels: int) -> nn.Module:
        """Return a random llama of that width; the same for the same seed."""
        from mlx_lm.models import llama

        mx.random.seed(self.seed)
        model = llama.Model(llama.ModelArgs.from_dict(self.scale.config(channels)))
        mx.eval(model.parameters())
        return model

    def config(self, steps: int, **changes: Any) -> TrainConfig:
        """Return the settings of a run of ``steps`` steps."""
        common = {
            "target_size": self.scale.kept,
            "steps": steps,
            "lr": self.scale.lr,
            "warmup": 50,
            "temperature": 0.3,
            "log_every": max(1, steps // 10),
            "eval_every": 10**9,
            "compile": False,
            "seed": self.seed,
        }
        return TrainConfig(**(common | changes))

    def fit(
        self,
        model: nn.Module,
        masker: Masker,
        steps: int,
        first: int = 0,
        parent: Callable[[Batch], mx.array] | None = None,
        batches: Callable[[int], Batch] | None = None,
        **changes: Any,
    ) -> list[dict[str, float]]:
        """Train on ``steps`` batches, from batch ``first`` on, and return the log."""
        source = batches or self.data
        config = self.config(steps, **changes)
        return train(model, masker, lambda i: source(first + i), config, parent=parent)

    def dense(self, steps: int) -> nn.Module:
        """Return the dense model after ``start_steps``, and ``steps`` more."""
        model = self.new_model(self.scale.channels)
        path = self.cache / f"dense-{self.seed}-{steps}.safetensors"
        if not path.exists():
            if steps:
                model = self.dense(0)
                self.fit(model, DENSE, steps, first=self.scale.start_steps)
            else:
                self.fit(model, DENSE, self.scale.start_steps)
            weights = dict(tree_flatten(model.parameters()))
            mx.save_safetensors(str(path), weights)
            model = self.new_model(self.scale.channels)
        model.load_weights(str(path))
        return model


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
    """Return the mean accuracy over facts, skills, both, and the held-out family."""
    groups: dict[str, list[float]] = {"facts": [], "skills": [], "held_out": []}
    for task in tasks:
        group = "held_out" if task.held_out else "facts" if task.facts else "skills"
        groups[group].append(accuracy[task.name])
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


def report(lab: Lab, trained: Trained, seconds: float) -> dict[str, Any]:
    """Return everything that is kept of a finished row."""
    batches = lab.test_batches()
    found = measure(trained, batches, lab.tasks)
    found["overlap"] = overlaps(trained, batches, len(lab.tasks))
    weights = tree_flatten(trained.model.parameters())
    return found | trained.extra | {
        "parameters": sum(value.size for _, value in weights),
        "compute": trained.spent,
        "cpu_seconds": seconds,
        "seed": lab.seed,
        "scale": asdict(lab.scale),
    }  # fmt: skip


def importance(lab: Lab, model: nn.Module, batches: int = 16) -> np.ndarray:
    """Return activation × weight of every channel over training examples, ``[L, F]``."""
    from ifp_mlx.training.warm_start import channel_importance

    used = [np.exp(channel_importance(model, lab.data(i))) for i in range(batches)]
    down = [
        np.linalg.norm(np.array(inlet.weight), axis=0)
        for inlet in plan_of(model).inlets(model)
    ]
    return np.concatenate(used).mean(axis=0) * np.stack(down)


class Clock:
    """Processor seconds since it was made."""

    def __init__(self) -> None:
        self.start = time.process_time()

    def seconds(self) -> float:
        """Return them."""
        return time.process_time() - self.start
