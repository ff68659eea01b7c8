"""What was decided on a request: made once, and handed on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from ..selection.config import IFPConfig
from ..selection.masks import Selection
from ..selection.prompts import Prompt
from ..selection.request import Request
from ..selection.scores import READING
from ..selection.top_k import select
from ..slicing.shapes import Plan, Unit
from .card import Card


class Checkpoint(Protocol):
    """What is asked of an :class:`ifp_mlx.model.checkpoint.IFPModel`."""

    path: Path
    config: dict[str, Any]
    ifp: IFPConfig
    source: Any
    plan: Plan
    groups: list[int]
    granularity: int
    fingerprint: mx.array

    @property
    def predictor(self) -> object | None:
        """The checkpoint's trained predictor."""

    @property
    def prior(self) -> mx.array | None:
        """The prior kept with the checkpoint, ``[L, F]``, or ``None``."""

    @property
    def card(self) -> Card | None:
        """What was measured of its quality."""

    def keep_card(self, card: Card) -> None:
        """Use a card from now on, and keep it with the model."""

    @property
    def sensitivity(self) -> mx.array | None:
        """What pruning each layer alone costs, ``[L, 6]``, or ``None``."""

    def check_fits(self, selection: Selection) -> None:
        """Raise ``ValueError`` unless a selection was made for this model."""

    def instruction_tokens(
        self, instruction: Prompt, config: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Return the token ids that select."""


@dataclass(frozen=True)
class Decision:
    """How many units each layer keeps, and what chooses them.

    Attributes:
        request: what was asked for.
        selector: its name; ``all`` where every unit is kept, ``given`` where the
            request gives the selection.
        sizes: kept units of every layer.
        size: ``k``, kept units per layer on average.
        allocation: how the units are shared out among the layers, by name.
        granularity: units that are selected together.
        tokens: of the text that selects, or from which compensation learns; none if
            nothing reads it.
        compensate: whether kept channels make up for dropped ones.
        unit: what is kept.
        channels: how many units a layer has.
        groups: equal parts of a layer, each of which keeps equally many units.
        selection: the one that was given, compensated as decided.
        room: bytes left for dropped channels that checks need, so that they can stay in
            memory.
        least: the share of the instruction's last tokens at which compact and dense model
            must choose alike; ``None`` asks for nothing.
    """

    request: Request
    selector: str
    sizes: list[int]
    size: int
    allocation: str
    granularity: int
    tokens: list[int] = field(default_factory=list)
    compensate: bool = False
    unit: Unit = "channel"
    channels: int = 0
    groups: int = 1
    selection: Selection | None = None
    room: int = 0
    least: float | None = None

    @property
    def reads(self) -> bool:
        """Whether the dense model reads the instruction to select."""
        return self.selector in READING

    @property
    def compares(self) -> bool:
        """Whether the compact model is compared with the dense one on the instruction,
        which is possible where the dense one reads it to select.
        """
        return self.reads

    @property
    def checks(self) -> bool:
        """Whether the whole model checks what the compact one drafts; where every unit is
        kept there is nothing to check.
        """
        return self.request.checks and any(k < self.channels for k in self.sizes)

    def units_of(self, layer: int, scores: mx.array) -> mx.array:
        """Return what one layer keeps for its scores ``[1, F]``: int32 ``[k_l]``."""
        kept = select(
            scores,
            [self.sizes[layer]],
            granularity=self.granularity,
            groups=self.groups,
        )
        return kept.indices[0]
