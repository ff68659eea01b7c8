"""Where the mask of a training batch comes from, and how it reaches the model."""

from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from ..selection.predictor import SparsityPredictor
from ..selection.top_k import soft_top_k
from ..slicing.masked import is_masked, mask_model, masked_inlets
from ..slicing.plan import plan_of
from .batches import Batch

Form = Literal["relaxed", "soft", "binary", "straight-through"]


@dataclass(frozen=True)
class Budget:
    """How scores become masks.

    Attributes:
        k: kept channels per layer, a multiple of the granularity.
        temperature: ε of the soft top-k, in units of the scores; a number or a scalar
            array.
        gates: whether kept channels are weighted by λ (``soft``, the paper) or by 1
            (``binary``), in training and inference alike.
        granularity: channels per selectable block; a block's score is its mean.
    """

    k: int
    temperature: Any = 1.0
    gates: Literal["soft", "binary"] = "soft"
    granularity: int = 1

    def masks(self, scores: mx.array, form: Form | None = None) -> mx.array:
        """Turn scores into the masks that :func:`ifp_mlx.slicing.masked.set_masks` takes.

        Args:
            scores: ``[B, L, F]``, or ``[L, F]`` for all rows alike.
            form: ``relaxed`` is λ on every channel; ``soft`` is λ on the kept ones,
                which a compact model has folded into its weights; ``binary`` is 1 on
                the kept ones; ``straight-through`` is binary with the gradient of λ.
                Default: what inference does, by the budget's gates.

        Returns:
            float32 ``[L, B, 1, F]``, or ``[L, F]``.

        Source: Hou et al. 2025 (arXiv:2501.02086) eq. 3, ``m = λ ⊙ Top(λ, k)``.
        """
        form = form or self.gates
        blocks = scores.astype(mx.float32)
        if self.granularity > 1:
            blocks = blocks.reshape(*scores.shape[:-1], -1, self.granularity).mean(-1)
        mask = self._block_masks(blocks, self.k // self.granularity, form)
        if self.granularity > 1:
            mask = mx.repeat(mask, self.granularity, axis=-1)
        return mask if mask.ndim == 2 else mask.transpose(1, 0, 2)[:, :, None]

    def _block_masks(self, blocks: mx.array, k: int, form: Form) -> mx.array:
        if form == "relaxed":
            return soft_top_k(blocks, k, self.temperature)
        order = mx.argsort(-mx.stop_gradient(blocks), axis=-1)
        top = (mx.argsort(order, axis=-1) < k).astype(mx.float32)
        if form == "binary":
            return top
        soft = soft_top_k(blocks, k, self.temperature)
        if form == "soft":
            return soft * top
        return top + (soft - mx.stop_gradient(soft))  # exactly 0 and 1

    @property
    def training_form(self) -> Form:
        """The form with the values of inference through which gradients flow."""
        return "soft" if self.gates == "soft" else "straight-through"


class Masker(nn.Module):
    """A source of masks. A new one needs only :meth:`scores`.

    Its trainable parameters are trained together with the model's. What it computes
    may depend on ``batch.instruction`` and ``batch.tasks``; anything else would not be
    known at inference.
    """

    def scores(self, batch: Batch) -> mx.array:
        """Return scores ``[B, L, F]``, or ``[L, F]`` for all rows alike."""
        raise NotImplementedError

    def __call__(
        self, batch: Batch, budget: Budget, form: Form | None = None
    ) -> mx.array | None:
        """Return masks ``[L, B, 1 or T - 1, F]`` or ``[L, F]``, or ``None`` for the dense
        model.

        Args:
            batch: ``B`` examples.
            budget: how scores become masks.
            form: as in :meth:`Budget.masks`; default: the hard form of inference.
        """
        if batch.selectors is None:
            return budget.masks(self.scores(batch), form)
        B, K, T = batch.instruction.shape
        rows = batch._replace(
            instruction=batch.instruction.reshape(B * K, T),
            lengths=batch.lengths.reshape(B * K),
        )
        masks = budget.masks(self.scores(rows), form)
        if masks.ndim == 2:
            return masks
        # A position predicts the next token, so it takes the mask of the instruction
        # that selects for that token.
        rows_of = batch.selectors[:, 1:] + K * mx.arange(B)[:, None]
        return masks[:, rows_of, 0]


class PredictorMasker(Masker):
    """The method itself: a predictor reads the instruction.

    Args:
        predictor: trained in place; its parameters are this module's.
    """

    def __init__(self, predictor: SparsityPredictor) -> None:
        super().__init__()
        self.predictor = predictor

    def scores(self, batch: Batch) -> mx.array:
        """Return the predictor's scores, ``[B, L, F]``."""
        return self.predictor(batch.instruction, batch.lengths)


class ScoreTable(Masker):
    """Learned scores that read no instruction: one row for all, or one for every task.

    With one row it is a learned static mask; with the true task of every example it is
    what an oracle could do.

    Args:
        scores: where learning starts, ``[L, F]``, or ``[tasks, L, F]``.
    """

    def __init__(self, scores: mx.array) -> None:
        super().__init__()
        self.table = scores.astype(mx.float32)

    def scores(self, batch: Batch) -> mx.array:
        """Return the table, or the rows of ``batch.tasks``."""
        if self.table.ndim == 2:
            return self.table
        if batch.tasks is None:
            raise ValueError("A score table per task needs the tasks of the batch.")
        return self.table[batch.tasks]


class FixedMask(Masker):
    """A mask that is given: of one selection, one for every task, or none at all.

    Args:
        mask: ``[L, F]``, ``[tasks, L, F]``, or ``None`` for the dense model.
    """

    def __init__(self, mask: mx.array | None) -> None:
        super().__init__()
        self._mask = mask  # the underscore keeps it from being trained

    def __call__(
        self, batch: Batch, budget: Budget, form: Form | None = None
    ) -> mx.array | None:
        """Return the mask, whatever the budget."""
        if self._mask is None or self._mask.ndim == 2:
            return self._mask
        if batch.tasks is None:
            raise ValueError("A mask per task needs the tasks of the batch.")
        return self._mask[batch.tasks].transpose(1, 0, 2)[:, :, None]


def masked_layers(model: nn.Module) -> list[nn.Module]:
    """Return the masked inlet of every layer; a model without masks gets them first."""
    return masked_inlets(model) or mask_model(model, plan_of(model))


def checkpoint_layers(model: nn.Module) -> None:
    """Let every layer of a masked model recompute its activations in the backward pass.

    mlx-lm's own gradient checkpointing would take the mask for a constant, and the
    predictor's gradient would silently be zero; here the mask is an input of what is
    recomputed.
    """
    for block in model.layers:
        stock = type(block)
        if not getattr(stock, "checkpointed", False):
            body = {"__call__": _checkpointed(stock), "checkpointed": True}
            block.__class__ = type(f"Checkpointed{stock.__name__}", (stock,), body)


def _checkpointed(stock: type) -> Any:
    def call(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inlets = [m for _, m in block.named_modules() if is_masked(m)]
        params, masks = block.trainable_parameters(), [inlet._mask for inlet in inlets]

        def restore(params: dict, masks: list[mx.array]) -> None:
            block.update(params)
            for inlet, mask in zip(inlets, masks, strict=True):
                inlet._mask = mask

        def forward(
            params: dict, masks: list[mx.array], *args: Any, **kwargs: Any
        ) -> Any:
            restore(params, masks)
            return stock.__call__(block, *args, **kwargs)

        result = mx.checkpoint(forward)(params, masks, *args, **kwargs)
        restore(params, masks)
        return result

    return call
