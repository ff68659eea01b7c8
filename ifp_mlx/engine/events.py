"""What an engine tells its callers: plain frozen data, safe on any thread."""

import threading
from dataclasses import dataclass, field
from typing import Any, Literal

Stage = Literal[
    "download",
    "load",
    "card",
    "calibrate",
    "select",
    "channels",
    "prefill",
    "decode",
]
FinishReason = Literal["stop", "length", "cancelled"]
Unit = Literal["channel", "expert"]


@dataclass(frozen=True)
class Progress:
    """How far a stage is.

    Attributes:
        stage: ``download`` (bytes), ``load`` (opening the folder), ``card`` (dialogues
            that measure the model, once), ``calibrate`` (layers that read the
            calibration text, once), ``select`` (layers that read the instruction),
            ``channels`` (layers whose channels, or experts, are read), ``prefill``
            (prompt tokens), ``decode`` (starts; then one :class:`Token` a step).
        done: units finished.
        total: units in all; 0 when unknown.
    """

    stage: Stage
    done: int
    total: int


@dataclass(frozen=True)
class TokenLogprob:
    """A token and its log probability.

    Attributes:
        id: the token's id.
        text: what it adds to the text; ``bytes:\\xf0\\x9f`` for a part of a character.
        logprob: its log probability.
        utf8: its bytes.
    """

    id: int
    text: str
    logprob: float
    utf8: bytes


@dataclass(frozen=True)
class Token:
    """One step of decoding.

    Attributes:
        text: the next piece of text; may be empty while a character or a possible
            stop string is incomplete.
        id: the token's id.
        number: 1 for the first generated token.
        logprobs: if asked for, this token's own, then those of the most probable
            tokens.
    """

    text: str
    id: int
    number: int
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Done:
    """The end of a stream.

    Attributes:
        finish_reason: ``stop`` (end of turn or a stop string), ``length`` or
            ``cancelled``.
        mask_id: of the selection used; empty if it ended before there was one.
        identity: of the weights used, which compensation decides too.
        kept_channels: of all layers together; of a mixture, experts.
        total_channels: ``L * F``.
        unit: what is kept, ``channel`` or ``expert``.
        agreement: the share of the last tokens of the text that selected at which the
            compact model chooses the dense model's next token, or ``None`` where they
            were not compared.
        promise: the same share over the tokens of answers, as the model's card
            (``evaluate --card``) has measured it for this number of units; ``None``
            without a card, or below what it has measured.
        router_mass: of a mixture, the share of all gate weights that the kept experts
            had on the text that selected, or ``None``.
        prompt_tokens: tokens in the prompt.
        cached_tokens: how many of them came from the prompt cache.
        generation_tokens: tokens generated.
        seconds: ``select``, ``load``, ``wait`` (for its turn), ``prefill``,
            ``decode`` and ``ttft`` (from the request to the first token).
        tokens_per_second: of decoding, as this request saw it.
        check: where the whole model checked, what that cost: the fields of
            :class:`ifp_mlx.checking.loop.Checks`.
    """

    finish_reason: FinishReason
    mask_id: str = ""
    identity: str = ""
    kept_channels: int = 0
    total_channels: int = 0
    unit: Unit = "channel"
    agreement: float | None = None
    promise: float | None = None
    router_mass: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    tokens_per_second: float = 0.0
    check: dict[str, Any] | None = None


Event = Progress | Token | Done


@dataclass(frozen=True)
class Task:
    """A selection under a name: an instruction, a budget, and the mask they gave.

    Attributes:
        name: what requests call it.
        mask_id: of its selection.
        identity: of its weights, which compensation decides too.
        kept_channels: of all layers together; of a mixture, experts.
        total_channels: ``L * F``.
        channels: ``F``, how many a layer has.
        widths: how many of them every layer keeps.
        bytes: of the compact model's weights in memory; everything except channels, or
            experts, is there once for all tasks.
        resident: whether that model is in memory now.
        info: how the mask was made (selector, allocation, keep, instruction).
        unit, agreement, promise, router_mass: as of :class:`Done`.
        seconds: what preparing took: ``select`` and ``load``; 0 for what was there
            already.
    """

    name: str
    mask_id: str
    identity: str
    kept_channels: int
    total_channels: int
    channels: int
    widths: tuple[int, ...]
    bytes: int
    resident: bool
    info: dict[str, str]
    unit: Unit = "channel"
    agreement: float | None = None
    promise: float | None = None
    router_mass: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)


class CancelToken:
    """Stops the work it was given to, from any thread; once cancelled, it stays so.

    Args:
        parent: cancels this one too.
    """

    def __init__(self, parent: "CancelToken | None" = None) -> None:
        self._event, self._parent = threading.Event(), parent

    def cancel(self) -> None:
        """Ask the work to stop at its next step."""
        self._event.set()

    @property
    def cancelled(self) -> bool:
        """Whether it, or its parent, was cancelled."""
        return self._event.is_set() or bool(self._parent and self._parent.cancelled)
