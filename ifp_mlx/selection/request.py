"""What a user asks of a selection: one type for all commands and calls."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

from .masks import Selection
from .prompts import Prompt, ids_of
from .scores import SELECTORS
from .widths import ALLOCATIONS, Allocation

Prefill = Literal["auto", "compact", "dense"]
Check = Literal["off", "exact"] | float
Reselect = Literal["off", "drift"]
Keep = float | Literal["auto"]
RESELECTS: tuple[Reselect, ...] = ("off", "drift")
# The kept share that is safe for most untrained models: examples/guides/keep.md has the
# figures.
SAFE_KEEP = 0.75
WITHOUT_CARD = (
    "without a card of this model (python -m ifp_mlx.evaluate --card) keep no less than "
    f"{SAFE_KEEP:.0%} for maths and code, unless the whole model checks (--check) or the "
    "mask's weights are recovered by training"
)
# The agreement that auto asks of a model's card. On everyday questions, answers at 84 %
# name one dish three times where three are asked for; answers at 74 % go round in
# circles (examples/benchmarks/auto).
MIN_AGREEMENT = 0.9
MOST_DRAFTED = 16  # tokens per check, unless a request says otherwise
PREFILLS: tuple[Prefill, ...] = ("auto", "compact", "dense")
SOURCES = ("instruction", "selection", "mask_file", "task")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be selected, and how; checked as it is made.

    Attributes:
        instruction: what selects: a text, which goes through the chat template as in
            :func:`ifp_mlx.generate`; messages, of which those up to the first user
            message count; or token ids, taken as they are. The model does not see it.
        selection: use this one and select nothing.
        mask_file: use the selection in this file.
        task: use the selection of the task of this name; a caller that knows where
            tasks are kept has to replace it by a selection or a mask file.
        keep: kept share of the units (channels, or experts), rounded to the
            granularity; or ``auto``: the smallest for which the model's card promises
            ``min_agreement``. Default: the checkpoint's own target size, or ``auto`` if it
            has none or ``memory_bytes`` is given.
        target_size: ``k``, kept units per layer, instead of ``keep``.
        selector: ``predictor``, ``activation``, ``prior``, ``blend``, ``random``, or
            ``auto``: the predictor if the checkpoint has one, else blend, or for
            experts activation. ``prior`` and ``blend`` compute the prior once if it is
            missing.
        allocation: ``uniform``, ``first-layer`` or, once measured, ``sensitivity``.
            Default: uniform for a trained predictor and for experts, else first-layer
            where the budget pays for it.
        granularity: units that are selected together. Default: as the checkpoint
            says, else 1. With 1, a quantised ``down_proj`` is quantised again; whole
            quantisation groups avoid that loss, but are a worse choice of channels.
        compensate: let kept channels make up for dropped ones, learned from the
            selection's own text, else from the instruction. Default: see
            :func:`compensates`.
        seed: of the selector ``random``.
        prefill: which model reads the prompt: ``compact``, the whole ``dense`` one, or
            ``auto``: dense where that has read it to select, else compact.
        min_agreement: share of tokens after which the compact model must choose the
            same next token as the dense model. ``auto`` asks that of the model's card,
            by default ``MIN_AGREEMENT``. If a size is given, it is asked on the
            instruction's last tokens, and a selection that falls short is refused; by
            default nothing is asked.
        check: whether the whole model checks what the compact one drafts
            (:mod:`ifp_mlx.checking`): ``off``; ``exact``: every token is the whole
            model's; or a tolerance above 0 and below 1: a drafted token stands if its
            probability in the whole model is at least this share of the best token's.
        draft_tokens: the most tokens drafted for one check; how many are drafted
            depends on how many stood before.
        reselect: ``drift`` chooses other channels in a check when those that are kept
            fit the latest tokens much less than others would; or ``off``.
        chat_template_config: options of the chat template for prompt and instruction,
            such as ``{"enable_thinking": False}``.
        memory_bytes: bytes that compact model, KV cache and predictor may take;
            ``auto`` keeps no more than fits, and a ``keep`` that does not is refused.

    Raises:
        ValueError: on a choice that nothing could satisfy.
    """

    instruction: Prompt | None = None
    selection: Selection | None = None
    mask_file: str | None = None
    task: str | None = None
    keep: Keep | None = None
    target_size: int | None = None
    selector: str = "auto"
    allocation: Allocation | None = None
    granularity: int | None = None
    compensate: bool | None = None
    seed: int = 0
    prefill: Prefill = "auto"
    min_agreement: float | None = None
    check: Check = "off"
    draft_tokens: int = MOST_DRAFTED
    reselect: Reselect = "off"
    chat_template_config: Mapping[str, Any] | None = None
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        if hasattr(self.instruction, "tolist"):  # an array, which has no truth value
            object.__setattr__(self, "instruction", ids_of(self.instruction))
        self._check_sizes()
        self._check_names()
        self._check_sources()
        if self.min_agreement is not None and not 0 < self.min_agreement <= 1:
            raise ValueError(
                f"min_agreement={self.min_agreement} is not a share of tokens; choose a "
                "number above 0 and up to 1."
            )
        self._check_checks()
        check_seed(self.seed)
        if self.memory_bytes is not None and self.memory_bytes <= 0:
            raise ValueError(
                f"memory_bytes={self.memory_bytes} must be more than 0; leave it out "
                "for no limit."
            )
        if self.prefill == "dense" and self.memory_bytes is not None:
            raise ValueError(
                "A dense prefill has the whole model in memory, and a memory limit is "
                "there to avoid that; leave one of them out."
            )

    def _check_checks(self) -> None:
        share = self.check if isinstance(self.check, int | float) else 0
        if self.check not in ("off", "exact") and not 0 < share < 1:
            raise ValueError(
                f"check={self.check!r} is not a way of checking; choose exact, off, or a "
                "tolerance above 0 and below 1."
            )
        if self.draft_tokens < 1:
            raise ValueError(
                f"draft_tokens={self.draft_tokens} must be 1 or more, for there to be "
                "anything to check."
            )
        if self.checks and self.prefill == "compact":
            raise ValueError(
                f"check={self.check} has the whole model read the prompt, and prefill="
                "compact the compact one; leave one of them out."
            )
        if self.reselect != "off" and not self.checks:
            raise ValueError(
                f"reselect={self.reselect} chooses by what a check has computed; it goes "
                "with check=exact or a tolerance."
            )

    @property
    def checks(self) -> bool:
        """Whether the whole model checks what the compact one drafts."""
        return self.check != "off"

    @property
    def auto(self) -> bool:
        """Whether nothing says how much is kept."""
        sized = self.target_size is not None or self.keep not in (None, "auto")
        return not (sized or self.given)

    @property
    def given(self) -> bool:
        """Whether it names a selection instead of asking for one."""
        return any(getattr(self, name) is not None for name in SOURCES[1:])

    @classmethod
    def split(cls, options: Mapping[str, Any]) -> tuple[Self, dict[str, Any]]:
        """Return the request in some options, and the other options."""
        names = {field.name for field in fields(cls)}
        own = {name: options[name] for name in options.keys() & names}
        return cls(**own), {n: o for n, o in options.items() if n not in names}

    def _check_sizes(self) -> None:
        if self.keep is not None and self.target_size is not None:
            raise ValueError(
                f"keep={self.keep} and target_size={self.target_size} say the same "
                "thing; give one of them."
            )
        share = self.keep if isinstance(self.keep, int | float) else 0
        if self.keep not in (None, "auto") and not 0 < share <= 1:
            raise ValueError(
                f"keep={self.keep!r} is not a share of the units; choose a number "
                "above 0 and up to 1 (1 keeps them all), or auto."
            )

    def _check_names(self) -> None:
        choices: dict[str, tuple[Any, ...]] = {"selector": SELECTORS}
        choices |= {"allocation": (None, *ALLOCATIONS), "prefill": PREFILLS}
        choices["reselect"] = RESELECTS
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                raise ValueError(
                    f"{name}={value!r} is unknown; choose one of "
                    f"{', '.join(choice for choice in known if choice)}."
                )

    def _check_sources(self) -> None:
        named = [name for name in SOURCES[1:] if getattr(self, name) is not None]
        if len(named) > 1 or (named and named != ["selection"] and self.instruction):
            both = [*named, "instruction"][:2]
            raise ValueError(
                f"{' and '.join(both)} each say what selects; give one of them."
            )
        made = (self.keep, self.target_size, self.allocation, self.granularity)
        asks = any(value is not None for value in made) or self.selector != "auto"
        if named and asks:
            value = getattr(self, named[0])
            which = value.mask_id if isinstance(value, Selection) else value
            raise ValueError(
                f"The {named[0].replace('_', ' ')} {which} says which units are "
                "kept; leave out keep, target_size, selector, allocation and "
                "granularity."
            )


def check_seed(seed: int) -> None:
    """Raise ``ValueError`` on a seed that MLX and NumPy do not both take."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed} must be 0 to 2^64 - 1; choose another.")


def compensates(
    request: Request, selection: Selection | None, *, reads: bool, lasting: bool
) -> bool:
    """Return whether kept channels are to make up for dropped ones.

    The request decides. If it says nothing, a new selection is compensated where the
    dense model reads the instruction anyway, in order to select. A given selection is
    compensated where it says so itself, and in a model that is written for good also
    where it has a text to learn from.

    Args:
        request: what was asked for.
        selection: the one that was given, or ``None``.
        reads: whether the dense model reads what selects.
        lasting: whether the compact model is written for good.
    """
    if request.compensate is not None:
        return request.compensate
    if selection is None:
        return reads
    return selection.compensates or (lasting and selection.text is not None)
