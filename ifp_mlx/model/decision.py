"""What a selection was asked for, with everything decided: widths and selector."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import mlx.core as mx

from ..selection import scores, top_k, widths
from ..selection.config import IFPConfig
from ..selection.widths import Allocation

DEFAULT_KEEP = 0.5


@dataclass(frozen=True)
class Choice:
    """How many channels each layer keeps, and what chooses them.

    Attributes:
        size: ``k``, kept channels per layer on average.
        selector: its name; ``all`` where every channel is kept.
        sizes: kept channels of every layer.
        allocation: what they follow.
        granularity: channels that are selected together.
    """

    size: int
    selector: str
    sizes: list[int]
    allocation: Allocation
    granularity: int

    @property
    def reads(self) -> bool:
        """Whether the dense model reads the instruction for it."""
        return self.selector in scores.READING

    def channels_of(self, layer: int, scores: mx.array) -> mx.array:
        """Return what one layer keeps for its scores ``[1, F]``: int32 ``[k_l]``."""
        sizes = [self.sizes[layer]]
        return top_k.select(scores, sizes, granularity=self.granularity).indices[0]


class Chooser(Protocol):
    """What is asked of an :class:`ifp_mlx.model.IFPModel`; see its attributes."""

    path: Path
    ifp: IFPConfig
    layers: int
    channels: int
    groups: list[int]
    granularity: int

    @property
    def predictor(self) -> object | None:
        """The checkpoint's trained predictor."""

    @property
    def prior(self) -> mx.array | None:
        """``[L, F]``."""

    @property
    def sensitivity(self) -> mx.array | None:
        """``[L, 6]``."""


def decide(
    model: Chooser,
    keep: float | None = None,
    target_size: int | None = None,
    selector: str = "auto",
    allocation: Allocation | None = None,
    granularity: int | None = None,
    seed: int = 0,
) -> Choice:
    """Decide what :meth:`ifp_mlx.model.IFPModel.select` leaves to the model.

    It takes all its options; the seed decides nothing here.

    Raises:
        ValueError: on a keep, selector, allocation or granularity that cannot be had.
    """
    granularity = _granularity(model, granularity)
    step = math.lcm(granularity, *model.groups)
    k = _target_size(model, keep, target_size, step)
    selector = _resolve(model, selector)
    sizes, allocation = _sizes(model, k, selector, allocation, step)
    selector = "all" if k == model.channels else selector
    return Choice(k, selector, sizes, allocation, granularity)


def _granularity(model: Chooser, wanted: int | None) -> int:
    if wanted is None and model.granularity == math.lcm(*model.groups):
        # Whole quantisation groups would lose nothing, and choose next to nothing:
        # 64 channels that happen to lie side by side are wanted and unwanted alike.
        return model.ifp.granularity
    if wanted is None:
        return model.granularity
    if wanted < 1 or model.channels % wanted:
        raise ValueError(
            f"granularity={wanted} does not divide the {model.channels} channels of a "
            f"layer; use 1, or {model.granularity} as this model has it."
        )
    return wanted


def _target_size(model: Chooser, keep: float | None, k: int | None, step: int) -> int:
    if keep is not None and k is not None:
        raise ValueError(
            f"keep={keep} and target_size={k} say the same thing; give one of them."
        )
    if k is None and keep is None:
        k = model.ifp.target_size
    if k is None:
        share = DEFAULT_KEEP if keep is None else keep
        return widths.target_size(model.channels, share, step)
    widths.check_multiple(k, step, model.channels)
    return k


def _resolve(model: Chooser, selector: str) -> str:
    if selector not in scores.SELECTORS:
        raise ValueError(
            f"selector={selector!r} is unknown; choose one of "
            f"{', '.join(scores.SELECTORS)}."
        )
    if selector == "predictor" and model.predictor is None:
        raise ValueError(
            f"{model.path} carries no trained predictor; use the selector auto."
        )
    if selector != "auto":
        return selector
    if model.predictor is not None:
        return "predictor"
    return "activation" if model.prior is None else "blend"


def _sizes(
    model: Chooser, k: int, selector: str, allocation: Allocation | None, step: int
) -> tuple[list[int], Allocation]:
    shape = (k, model.layers, model.channels)
    if allocation is None and selector != "predictor" and k < model.channels:
        try:
            return widths.layer_sizes(*shape, "first-layer", step), "first-layer"
        except ValueError:  # too small a budget for a whole first layer
            pass
    allocation = allocation or "uniform"
    costs = model.sensitivity if allocation == "sensitivity" else None
    return widths.layer_sizes(*shape, allocation, step, costs), allocation
