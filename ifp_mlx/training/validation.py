"""What is measured of a masked model: its loss, its masks, and the slice's error."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from ..model.checkpoint import open_model
from .batches import Batch
from .maskers import Budget, FixedMask, Form, Masker
from .step import Pair, target_losses
from .watch import mask_overlap

Report = dict[str, float]
GATE_FORMS: tuple[Form, ...] = ("relaxed", "soft", "binary")


def evaluate_loss(
    model: nn.Module,
    masker: Masker,
    batches: Iterable[Batch],
    budget: Budget,
    form: Form | None = None,
) -> float:
    """Return the mean cross-entropy of the targets, nats per token.

    Args:
        model: as in :func:`ifp_mlx.training.run.train`.
        masker: where the masks come from.
        batches: validation examples.
        budget: how scores become masks.
        form: of the masks; default: as in inference, hard masks with the budget's
            gates.
    """
    pair = Pair(model, masker)
    total = targets = 0.0
    pair.eval()
    for batch in batches:
        losses = target_losses(pair.logits(batch, budget, form), batch)
        total += float(losses.sum())
        targets += float(batch.loss_mask[:, 1:].sum())
    return total / max(targets, 1.0)


class Validation:
    """What is measured at every validation: the loss with the mask of inference, and
    how much the masks of instructions overlap.

    Args:
        model: as in :func:`ifp_mlx.training.run.train`.
        masker: where the masks come from.
        batches: validation examples.
        budget: how scores become masks, at the end of annealing.
    """

    def __init__(
        self,
        model: nn.Module,
        masker: Masker,
        batches: Sequence[Batch],
        budget: Budget,
    ) -> None:
        self.model, self.masker, self.batches = model, masker, batches
        self.budget = budget

    def __call__(self) -> Report:
        """Return ``valid_loss`` in nats per token, and the overlaps where there are
        several masks.
        """
        loss = evaluate_loss(self.model, self.masker, self.batches, self.budget)
        report = {"valid_loss": loss}
        overlap = mask_overlap(self.masker, self.batches, self.budget)
        return report if overlap is None else report | overlap.report()


def sliced_error(folder: Path, model: nn.Module, batch: Batch) -> float:
    """Return how far the compact model's logits are from the masked model's, for the
    first example of a batch and the selection that the checkpoint makes: the largest
    difference as a share of the largest logit.

    Args:
        folder: of the IFP checkpoint.
        model: the trained model.
        batch: of any examples.
    """
    checkpoint = open_model(folder)
    predictor = checkpoint.predictor
    assert predictor is not None
    own = batch.instruction[:1, : int(batch.lengths[0])]
    tokens = cast(list[int], own[0].tolist())
    selection = checkpoint.select(
        tokens, selector="predictor", scores=predictor(own)[0]
    )
    one = batch.share(0, len(batch.lengths))
    masked = Pair(model, FixedMask(selection.mask())).eval()
    expected = masked.logits(one, Budget(1), None)
    found = checkpoint.compact(selection)(one.tokens[:, :-1]).astype(mx.float32)
    return float(mx.abs(found - expected).max() / mx.abs(expected).max())
