"""What a run costs: multiplications, by one definition for every way of training.

A weight that a token passes is one multiplication. A pass whose weights are trained
counts three times (forward, and twice backward); a pass in which only adapters or the
masker are trained counts twice, and a pass without training once. Attention's own
products are left out: they are the same for every way of training, and small at these
lengths.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..slicing.routing import slots_of
from ..slicing.shapes import Plan
from .batches import Record
from .recipe import TrainConfig


@dataclass(frozen=True)
class Cost:
    """Multiplications of a run, by what they are for.

    Attributes:
        model: of the model's passes, forward and backward.
        predictor: of the predictor's.
        teacher: of the passes of the dense model that gives the KL.
        warm_start: of everything before step 0.
    """

    model: float
    predictor: float
    teacher: float
    warm_start: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.model + self.predictor + self.teacher + self.warm_start


def weights_per_token(model: nn.Module, plan: Plan | None = None) -> int:
    """Return how many weights of a stock model a token passes: the embedding only if it
    is the last layer too, and in a mixture the experts that a token is sent to.

    Args:
        model: dense; its weights need not be read.
        plan: the model's plan; needed for a mixture of experts.
    """
    found = 0.0
    tied = "lm_head" not in dict(model.named_modules())
    share = 1.0
    if plan is not None and plan.unit == "expert":
        share = slots_of(model, plan) / plan.units
    for name, weight in tree_flatten(model.parameters()):
        if weight.ndim < 2 or ("embed" in name and not tied):
            continue
        stacked = weight.ndim == 3 and share < 1
        found += weight.size * (share if stacked else 1.0)
    return round(found)


def cost_of(
    config: TrainConfig,
    model: nn.Module,
    plan: Plan,
    predictor: Any,
    records: Sequence[Record],
    *,
    fresh: bool,
    grouped: bool = False,
    teacher: nn.Module | None = None,
) -> Cost:
    """Return what a run costs.

    Args:
        config: the run's settings.
        model: what is trained.
        plan: the model's plan.
        predictor: the model's predictor, or ``None``.
        records: the training examples.
        fresh: whether the predictor is new, and has a warm start.
        grouped: whether the predictor learns groups of examples before step 0.
        teacher: the dense model that gives the KL, or ``None``.
    """
    read, asked = (
        float(np.mean(sizes)) for sizes in zip(*map(_sizes, records), strict=True)
    )
    examples = config.steps * config.batch_size * config.accumulate
    each = weights_per_token(model, plan)
    passes = 3 if config.train in ("full", "ffn") else 2
    small = 0 if predictor is None else _head(predictor)
    taught = 0 if teacher is None else weights_per_token(teacher)
    warm = 0.0
    if fresh and config.masker != "dense":
        # A single mask also reads some examples first.
        none = 64 if predictor is None else 0
        first = min(config.warm_start or none, len(records))
        warm = first * (read * each + asked * small)
    if grouped:
        warm += 3 * config.warm_steps * config.batch_size * asked * small
    return Cost(
        passes * examples * read * each,
        3 * examples * asked * small,
        examples * read * taught,
        warm,
    )


def _sizes(record: Record) -> tuple[int, int]:
    """Return how many tokens the model and the predictor read of an example."""
    if record.selectors is None:
        return len(record.tokens), len(record.instruction)
    return len(record.tokens), sum(map(len, record.instruction))


def _head(predictor: Any) -> int:
    """Return the weights of a predictor's backbone that a token passes, without its
    last layer, which is not used. The predictor's head is left out: it reads once for
    each instruction, not for each token.
    """
    weights = tree_flatten(predictor.backbone.parameters())
    return sum(
        w.size
        for name, w in weights
        if w.ndim > 1 and "embed" not in name and "lm_head" not in name
    )
