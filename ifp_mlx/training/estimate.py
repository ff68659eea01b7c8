"""What a run will need, before it is made: multiplications and memory."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from mlx.utils import tree_flatten

from .cost import Cost
from .recipe import TrainConfig
from .run import new_masker, read_examples, run_cost
from .trainee import adapt, open_trainee

FLOATS = 4  # bytes of a float32, in which losses and moments are computed
# About how many arrays [T, D] and [T, F] a layer keeps for the backward pass.
HIDDEN, CHANNELS = 14, 6
LOGITS = 4  # arrays [T, V]


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Attributes:
        cost: its multiplications.
        examples: in its training data.
        trained: parameters that are trained, of model and masker.
        parameters: of both, in all.
        weight_bytes: of both in memory.
        training_bytes: gradients, and what the optimiser keeps.
        activation_bytes: of one micro-batch of the longest examples, about.
    """

    cost: Cost
    examples: int
    trained: int
    parameters: int
    weight_bytes: int
    training_bytes: int
    activation_bytes: int

    @property
    def checkpoint_bytes(self) -> int:
        """What is kept on disk for a run to go on: trained weights, and two moments."""
        return 3 * FLOATS * self.trained

    @property
    def memory_bytes(self) -> int:
        """All of it at once, about."""
        return self.weight_bytes + self.training_bytes + self.activation_bytes


def estimate(config: TrainConfig) -> Estimate:
    """Return what a run of these settings will take; nothing is written.

    Raises:
        ValueError, OSError: as the run itself, about settings, model or data.
    """
    if config.stage == "recover":
        raise ValueError("The stage recover is not planned; use sft or pretrain.")
    trainee = open_trainee(config)
    config = config.of(trainee.plan.unit, trainee.own)
    masker = new_masker(trainee, config)
    examples = read_examples(trainee, config, masker, lambda line: None)
    cost = run_cost(trainee, config, masker, examples)
    adapt(trainee.model, trainee.plan, config)
    modules = (trainee.model, masker)
    trained = [w for m in modules for _, w in tree_flatten(m.trainable_parameters())]
    weights = [w for m in modules for _, w in tree_flatten(m.parameters())]
    # A gradient and two moments; a second gradient where gradients are added up.
    copies = 3 + (config.accumulate > 1)
    lengths = sorted(len(record.tokens) for record in examples.train)
    longest = float(np.mean(lengths[-config.batch_size :]))
    return Estimate(
        cost,
        len(examples.train),
        sum(w.size for w in trained),
        sum(w.size for w in weights),
        sum(w.nbytes for w in weights),
        copies * sum(w.nbytes for w in trained),
        round(
            config.batch_size
            * longest
            * _per_token(trainee.model, trainee.plan, config)
        ),
    )


def _per_token(model: Any, plan: Any, config: TrainConfig) -> int:
    """Return about how many bytes a token of a batch takes until the backward pass."""
    found = {name: w for name, w in tree_flatten(model.parameters())}
    vocabulary, width = max(
        (w.shape for name, w in found.items() if "embed" in name and w.ndim == 2),
        default=(0, 0),
    )
    layers, units = plan.shape
    layer = HIDDEN * width + CHANNELS * units
    layers = 2 if config.grad_checkpoint else layers
    return FLOATS * (layers * layer + LOGITS * vocabulary)
