"""Decide what a request leaves open, which depends on the model."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ..files.progress import ProgressBar
from ..selection.masks import Selection
from ..selection.prompts import Prompt
from ..selection.request import MIN_AGREEMENT, SAFE_KEEP, Request, compensates
from ..selection.scores import READING
from ..selection.widths import (
    Allocation,
    check_multiple,
    layer_sizes,
    target_size,
)
from .agreement import check_agreement
from .card import Card
from .decision import Checkpoint, Decision
from .experts import check_number, groups_of
from .fit import Limits, check_fits, fitting_size, room_beside
from .trial import tried

TRIED = (SAFE_KEEP, 0.9)  # kept shares that a model's first card measures


def decide(
    request: Request,
    model: Checkpoint,
    *,
    limits: Limits | None = None,
    lasting: bool = False,
    multiple: int = 1,
    progress: ProgressBar = iter,
) -> Decision:
    """Decide what a request leaves to the model.

    Args:
        request: what was asked for.
        model: the one that it is for.
        limits: memory to fit into; ``None`` for no limit.
        lasting: whether the compact model is written for good.
        multiple: a size that is searched for is a multiple of it; where the channels
            will be quantised, the quantisation group.
        progress: wraps the iteration over the dialogues of a model's first card.

    Raises:
        ValueError: on a choice that cannot be had, or that does not fit.
    """
    check_checkable(request, model)
    given = _given(request, model)
    if given is not None:
        return _of_given(request, model, given, limits, lasting)
    granularity = _granularity(model, request.granularity)
    block = math.lcm(granularity, *model.groups)
    # A router takes equally many experts of each of its groups.
    router = groups_of(model.config) if model.plan.unit == "expert" else 1
    step = math.lcm(block, router)
    asked, config = request.instruction, request.chat_template_config
    tokens = [] if asked is None else list(model.instruction_tokens(asked, config))

    def decided(k: int) -> Decision:
        everything = k == model.plan.units
        name = "all" if everything else _selector(model, request.selector)
        sizes, allocation = _sizes(model, k, name, request.allocation, block)
        how = {"reads": name in READING, "lasting": lasting}
        compensate = can_compensate(request, model, None, **how)
        about = (sizes, k, allocation, granularity, tokens, compensate)
        what: dict[str, Any] = {"unit": model.plan.unit, "channels": model.plan.units}
        what |= {"groups": router, "least": request.min_agreement}
        return _checked(Decision(request, name, *about, **what), model)

    wanted = _size(model, request, block, step, limits)
    if wanted is None:
        step = math.lcm(step, multiple)
        return _found(request, decided, model, limits, step, progress)
    return _fitting(decided(wanted), model, limits)


def _checked(decision: Decision, model: Checkpoint) -> Decision:
    """Return a decision, or refuse it for what the model cannot do with it."""
    least = decision.request.min_agreement
    if least is not None and decision.selector not in (*READING, "all"):
        raise ValueError(
            f"min_agreement={least} needs the dense model to read the instruction, and "
            f"the selector {decision.selector} does without; use activation or blend."
        )
    if decision.unit == "expert" and decision.selector != "all":
        check_number(model.plan, model.config, decision.size)
    return decision


def _fitting(decision: Decision, model: Checkpoint, limits: Limits | None) -> Decision:
    """Return a decision with the memory that it leaves, or refuse it if it does not
    fit.
    """
    if limits is None:
        return decision
    check_fits(model, decision, limits)
    return replace(decision, room=room_beside(model, decision, limits))


def _found(
    request: Request,
    decided: Callable[[int], Decision],
    model: Checkpoint,
    limits: Limits | None,
    step: int,
    progress: ProgressBar,
) -> Decision:
    """Decide on the smallest size for which the model's card promises enough; if there
    is no card, it is measured now.

    A card says nothing of selections for which the dense model does not read the
    instruction, and is not needed where the whole model checks the answer. In these two
    cases the size is the one that is safe for most untrained models, or, under a limit
    of memory, the largest that fits.
    """
    units = model.plan.units
    safe = target_size(units, SAFE_KEEP, step)
    first, most = decided(safe), units
    if limits is not None:
        of_layers = partial(_sizes_of, decided)
        most = fitting_size(model, first, limits, of_layers, step)
    if not first.reads or request.checks:
        limited = limits is not None and limits.memory_bytes is not None
        k = most if limited else min(most, safe)
    else:
        card = model.card or first_card(model, progress, most)
        k = _promised(model, card, request.min_agreement or MIN_AGREEMENT, most, step)
    return _fitting(replace(decided(k), least=None), model, limits)


def first_card(
    model: Checkpoint, progress: ProgressBar = iter, most: int | None = None
) -> Card | None:
    """Return the first card of a model, measured now as requests select by default;
    ``None`` if it has too few units for that.

    Args:
        model: what is measured. The card is kept with it, unless memory is too small
            for all the shares of a card.
        progress: wraps the iteration over dialogues.
        most: the most units per layer that fit into memory; default: all.
    """
    units = model.plan.units
    most = most or units

    def decided(tokens: Sequence[int], share: float) -> Decision:
        return decide(Request(instruction=tokens, keep=share), model)

    sizes = [decided([0], share).size for share in TRIED]
    shares = sorted({min(k, most) / units for k in sizes} - {1.0})
    if not shares:
        return None
    card = tried(model, shares, decided, progress=progress)
    if most >= max(sizes):  # else a user with more memory would lack the larger shares
        model.keep_card(card)
    return card


def _promised(
    model: Checkpoint, card: Card | None, least: float, most: int, step: int
) -> int:
    """Return the smallest size up to ``most`` for which a card promises enough.

    Raises:
        ValueError: if there is none.
    """
    units, unit = model.plan.units, model.plan.unit
    smallest = 1.0 if card is None else card.smallest(least)
    if (k := min(units, target_size(units, smallest, step))) <= most:
        return k
    share = most / units
    said = "" if card is None else f" {card.words(share)};"
    raise ValueError(
        f"No more than {share:.0%} of the {unit}s of {model.path} fit.{said} "
        f"min_agreement={least} is asked for, which takes {smallest:.0%}. Give more memory, "
        f"ask for less agreement, or take it as it is by keep={share:.2g}."
    )


def _sizes_of(decided: Callable[[int], Decision], k: int) -> list[int]:
    return decided(k).sizes


def _given(request: Request, model: Checkpoint) -> Selection | None:
    if request.task is not None:
        raise ValueError(
            f"The task {request.task!r} is not looked up here; give its mask file."
        )
    given = request.selection
    if request.mask_file is not None:
        given = Selection.load(request.mask_file)
    if given is not None:
        model.check_fits(given)
    return given


def _of_given(
    request: Request,
    model: Checkpoint,
    given: Selection,
    limits: Limits | None,
    lasting: bool,
) -> Decision:
    """Decide how a given selection is used."""
    compensate = can_compensate(request, model, given, reads=False, lasting=lasting)
    tokens: list[int] = []
    if given.trained is not None and request.compensate is None:
        given.check_reproducible()
    if not compensate:
        given = given.plain()
    elif given.compensates and request.compensate is None:
        given.check_reproducible()
    elif given.text is None and request.instruction is not None:
        config = request.chat_template_config
        tokens = list(model.instruction_tokens(request.instruction, config))
        given = given.compensated(tokens, "the instruction")
    elif not given.compensates:
        given = given.compensated()
    sizes, allocation = given.sizes, given.origin.allocation or "uniform"
    size = round(sum(sizes) / len(sizes))
    text = tokens or list(given.text or ()) if compensate else []
    about = (sizes, size, allocation, 1, text, compensate)
    check_agreement(given, request.min_agreement)
    unit = model.plan.unit
    what: dict[str, Any] = {"unit": unit, "channels": model.plan.units}
    decision = Decision(request, "given", *about, **what, selection=given)
    if limits is not None:
        check_fits(model, decision, limits)
        decision = replace(decision, room=room_beside(model, decision, limits))
    return decision


def can_compensate(
    request: Request, model: Checkpoint, given: Selection | None, **about: bool
) -> bool:
    """Return what :func:`compensates` says; experts never compensate.

    Raises:
        ValueError: if they are asked to.
    """
    if model.plan.unit == "channel":
        return compensates(request, given, **about)
    if request.compensate:
        raise ValueError(
            f"The experts of {model.path} cannot make up for dropped ones: the "
            "router gives a dropped expert's tokens to others; leave compensate out."
        )
    return False


def check_checkable(request: Request, model: Checkpoint) -> None:
    """Refuse to check the compact models of a mixture.

    Raises:
        ValueError: if a request asks for it.
    """
    if request.checks and model.plan.unit == "expert":
        raise ValueError(
            f"check={request.check} does not go with the experts of {model.path}: the "
            "tokens of one check together need nearly all experts, so that nothing would "
            "be saved; leave check out."
        )


def _granularity(model: Checkpoint, wanted: int | None) -> int:
    if wanted is None and model.granularity == math.lcm(*model.groups):
        # Whole quantisation groups would lose nothing, but hardly allow a choice: of 64
        # channels that happen to lie side by side some are needed and some not.
        return model.ifp.granularity
    if wanted is None:
        return model.granularity
    if wanted < 1 or model.plan.units % wanted:
        own = f", or {model.granularity} as this model has it"
        raise ValueError(
            f"granularity={wanted} does not divide the {model.plan.units} "
            f"{model.plan.unit}s of a layer; use 1{own if model.granularity > 1 else ''}."
        )
    return wanted


def _size(
    model: Checkpoint, request: Request, block: int, step: int, limits: Limits | None
) -> int | None:
    """Return ``k``; ``None`` if it is to be found."""
    k, limited = request.target_size, limits is not None and limits.memory_bytes
    if k is None and request.keep is None and not limited:
        k = model.ifp.target_size
    if k is not None:
        check_multiple(k, block, model.plan.units, model.plan.unit)
        return k
    if request.keep in (None, "auto"):
        return None
    return target_size(model.plan.units, float(request.keep), step)


def _selector(model: Checkpoint, selector: str) -> str:
    if selector == "predictor" and model.predictor is None:
        raise ValueError(
            f"{model.path} carries no trained predictor; use the selector auto."
        )
    if selector != "auto":
        return selector
    if model.predictor is not None:
        return "predictor"
    # Experts: where both were measured, blending in the calibration text was worse.
    return "activation" if model.plan.unit == "expert" else "blend"


def _sizes(
    model: Checkpoint, k: int, selector: str, allocation: Allocation | None, step: int
) -> tuple[list[int], Allocation]:
    layers, units = model.plan.shape
    shape = (k, layers, units)
    if model.plan.unit == "expert" and allocation not in (None, "uniform"):
        raise ValueError(
            f"allocation={allocation!r} gives layers different numbers of experts, and "
            "a stock model has one number for all; use uniform."
        )
    uniform = selector == "predictor" or model.plan.unit == "expert"
    if allocation is None and not uniform and k < units:
        try:
            return layer_sizes(*shape, "first-layer", step), "first-layer"
        except ValueError:  # too small a budget for a whole first layer
            pass
    allocation = allocation or "uniform"
    costs = model.sensitivity if allocation == "sensitivity" else None
    return layer_sizes(*shape, allocation, step, costs), allocation


def with_instruction(request: Request, instruction: Prompt) -> Request:
    """Return a request with this instruction, unless it has something to select by."""
    named = request.mask_file is not None or request.task is not None
    if request.instruction is not None or named:
        return request
    return replace(request, instruction=instruction)
