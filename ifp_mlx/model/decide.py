"""Decide on a request what only the model can say."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

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
from .decision import Checkpoint, Decision
from .experts import check_number, groups_of
from .fit import Limits, check_fits, fitting_size, room_beside

LADDER = (SAFE_KEEP, 0.9, 1.0)  # shares that are tried in turn where none is asked for


def decide(
    request: Request,
    model: Checkpoint,
    *,
    limits: Limits | None = None,
    lasting: bool = False,
    multiple: int = 1,
) -> Decision:
    """Decide what a request leaves to the model.

    Args:
        request: what was asked for.
        model: that it is asked of.
        limits: memory to fit into; ``None`` does not look at it.
        lasting: whether the compact model is written for good.
        multiple: of which sizes that are to be found are multiples: of channels that
            will be quantised, their group.

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
    asked = request.instruction
    tokens = [] if asked is None else list(model.instruction_tokens(asked))

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
        least = request.min_agreement or MIN_AGREEMENT
        return _found(decided, model, limits, math.lcm(step, multiple), least)
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
    """Return a decision with the room that it leaves, or refuse it if it does not fit."""
    if limits is None:
        return decision
    check_fits(model, decision, limits)
    return replace(decision, room=room_beside(model, decision, limits))


def _found(
    decided: Callable[[int], Decision],
    model: Checkpoint,
    limits: Limits | None,
    step: int,
    least: float,
) -> Decision:
    """Return the sizes that are tried until one agrees enough, smallest first: those for
    which the model's card promises enough, else a few that untrained models bear.

    Where the dense model does not read what selects, nothing can be tried, and where it
    checks the answer, nothing need be: then it is the first of them, or as much as fits
    into a limit of memory.
    """
    units = model.plan.units
    ladder = sorted(
        {target_size(units, share, step) for share in _shares(model, least)}
    )
    first, most = decided(ladder[0]), units
    if limits is not None:
        sizes = partial(_sizes_of, decided)
        most = fitting_size(model, first, limits, sizes, step)
    if not first.reads or first.request.checks:
        limited = limits is not None and limits.memory_bytes is not None
        return _fitting(
            decided(most if limited else min(most, ladder[0])), model, limits
        )
    found: Decision | None = None
    for k in sorted({min(k, most) for k in ladder}, reverse=True):
        rung = replace(decided(k), least=least, larger=found)
        found = _fitting(rung, model, limits)
    assert found is not None
    return found


def _shares(model: Checkpoint, least: float) -> list[float]:
    if model.card is None:
        return list(LADDER)
    first = model.card.smallest(least)
    return [*(keep for keep in model.card.keeps() if keep >= first), 1.0]


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
        tokens = list(model.instruction_tokens(request.instruction))
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
    """Return :func:`compensates`, which experts never do.

    Raises:
        ValueError: if they are asked to.
    """
    if model.plan.unit == "channel":
        return compensates(request, given, **about)
    if request.compensate:
        raise ValueError(
            f"The experts of {model.path} cannot make up for dropped ones: what a "
            "dropped expert did is the router's to give to another; leave compensate "
            "out."
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
        # Whole quantisation groups would lose nothing, and choose next to nothing:
        # 64 channels that happen to lie side by side are wanted and unwanted alike.
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
    # Experts: where both were measured, the calibration text made the choice worse.
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
    """Return a request that has something to select by, if it has nothing yet."""
    named = request.mask_file is not None or request.task is not None
    if request.instruction is not None or named:
        return request
    return replace(request, instruction=instruction)
