"""The two forms that a selection's compact model has in memory.

Unchecked answers come from the plain form, an ordinary model. Checks use the other
form, whose parts are apart (:mod:`ifp_mlx.slicing.apart`), beside the whole model.
Where the weights of both forms are equal, they share arrays; without compensation
either can be made from the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..checking.whole import Whole
from ..model.checkpoint import IFPModel
from ..model.decide import decide
from ..model.decision import Decision
from ..model.fit import in_checks
from ..model.footprint import Footprint
from ..selection.masks import Selection
from ..selection.request import Request
from ..slicing.apart import Apart, put_together, set_apart, stays_whole
from ..slicing.shapes import Plan, Slice, at
from ..slicing.sliced import (
    cut,
    cut_rows,
    note_units,
    scale_units,
    settle,
    sliced_names,
    tensors_along,
    twin,
)
from ..storage.units import Wanted


@dataclass(frozen=True)
class Use:
    """What has to be in memory for a request: a compact model in one of its forms.

    Attributes:
        selection: what it keeps.
        checked: whether the whole model checks what it drafts.
        shared: bytes of its channels that are the same arrays in both forms.
        own: bytes that only this form has.
        passing: bytes above all that while the whole model is computed.
        promise: from :func:`promised`.
    """

    selection: Selection
    checked: bool = False
    shared: int = 0
    own: int = 0
    passing: int = 0
    promise: float | None = None

    @property
    def key(self) -> tuple[str, bool]:
        """What distinguishes it from other uses."""
        return self.selection.identity, self.checked


class Held(NamedTuple):
    """A compact model in memory.

    Attributes:
        use: what it is for.
        model: the compact model, in the form of its use.
        whole: the whole model beside it, where that checks.
    """

    use: Use
    model: nn.Module
    whole: Whole | None = None


def use_of(model: IFPModel, selection: Selection, checked: bool) -> Use:
    """Return a selection's use; where it drops nothing, there is nothing to check."""
    checked = checked and any(k < model.channels for k in selection.sizes)
    if not checked:
        bytes_, passing = model.footprint.channel_bytes(selection), 0
    else:
        decision = decide(Request(selection=selection, check="exact"), model)
        bytes_, passing = weigh(model, decision)
    shared = _shared_bytes(model, selection)
    promise = promised(model, selection)
    return Use(selection, checked, shared, bytes_ - shared, passing, promise)


def promised(model: IFPModel, selection: Selection) -> float | None:
    """Return what the model's card promises for this number of units,
    :meth:`ifp_mlx.model.card.Card.promise`; ``None`` without a card.
    """
    return None if model.card is None else model.card.promise(selection.share)


def weigh(model: IFPModel, decision: Decision) -> tuple[int, int]:
    """Return the bytes of a compact model beside the core, in the form that was decided
    on, and those that pass through while the whole model checks.
    """
    footprint: Footprint = model.footprint
    if not decision.checks:
        return footprint.channel_bytes(decision.sizes), 0
    checked = in_checks(model, decision, footprint)
    more = checked.compact_bytes(decision.sizes) - footprint.core_bytes
    return more, checked.passing_bytes


def moving_bytes(model: IFPModel, selection: Selection) -> int:
    """Return the bytes of a compact model's channels if one answer exchanges them, so
    that no array is shared, and of what is remembered to choose new ones.
    """
    request = Request(selection=selection, check="exact", reselect="drift")
    return weigh(model, decide(request, model))[0]


def apart_of(
    model: IFPModel, selection: Selection, plain: nn.Module, *, progress: Any = iter
) -> nn.Module:
    """Return a selection's compact model with its parts apart, beside the plain one.

    Args:
        model: the large model.
        selection: what is kept.
        plain: its plain compact model.
        progress: wraps the iteration over layers.
    """
    if selection.compensates:  # its text has to be read again
        made = model.apart(selection, progress=progress)
        share(model, made, plain, selection)
        return made
    made, plan = twin(plain), model.plan
    own = _own_slices(model, selection)
    pairs = zip(plan.inlets(model.source.skeleton), selection.indices, strict=True)
    whole = [stays_whole(inlet, index, plan.units) for inlet, index in pairs]
    _read_own(model, made, selection, own, whole)
    gates = selection.gates or (None,) * model.layers
    modules = plan.modules(made)
    for n in progress(range(model.layers)):
        how: dict[str, Any] = {"whole": whole[n], "gate": gates[n]}
        parts = Apart(selection.indices[n], plan.units, **how)
        set_apart(modules[n], plan.layers[n], parts)
    return made


def plain_of(
    model: IFPModel, selection: Selection, apart: nn.Module, *, progress: Any = iter
) -> nn.Module:
    """Return a selection's plain compact model, beside the one with its parts apart.

    Args:
        model: the large model.
        selection: what is kept.
        apart: its compact model with its parts apart.
        progress: wraps the iteration over layers.
    """
    if selection.compensates:
        made = model.compact(selection, progress=progress)
        share(model, made, apart, selection)
        return made
    made, plan = twin(apart), model.plan
    modules = plan.modules(made)
    for layer, module in progress(list(zip(plan.layers, modules, strict=True))):
        parts = put_together(at(module, layer.inlet))
        if parts.whole:
            inlet = tuple(s for s in layer.slices if s.module == layer.inlet)
            cut(module, replace(layer, slices=inlet), parts.index, plan.units)
        if parts.gate is not None:
            scale_units(module, layer, parts.gate)
        settle(module)
    note_units(made, plan)
    return made


def share(
    model: IFPModel, made: nn.Module, other: nn.Module, selection: Selection
) -> None:
    """Let one form of a selection's compact model use the arrays of the other, in place.

    Args:
        model: the large model.
        made: gets them.
        other: has them.
        selection: of both.
    """
    plan = _part(model.plan, _own_slices(model, selection))
    own = {name for names in sliced_names(made, plan) for name in names}
    theirs = tree_flatten(other.parameters())
    made.update(tree_unflatten([(n, w) for n, w in theirs if n not in own]))


def _own_slices(model: IFPModel, selection: Selection) -> list[tuple[Slice, ...]]:
    """Return, for each layer, the slices whose weights differ in the two forms: an
    inlet that makes up for dropped channels or was quantised again, and weights with
    gates folded in.
    """
    again, found = model.cut_layers(selection), []
    for n, layer in enumerate(model.plan.layers):
        drops = selection.indices[n].size < model.channels
        homes = set()
        if (drops and selection.compensates) or n in again:
            homes.add(layer.inlet)
        if selection.gates is not None:
            homes.add(layer.inlet if layer.linear is None else layer.linear[0])
        found.append(tuple(piece for piece in layer.slices if piece.module in homes))
    return found


def _shared_bytes(model: IFPModel, selection: Selection) -> int:
    """Return the bytes of the channels' weights that both forms have."""
    own = 0.0
    modules = model.plan.modules(model.source.skeleton)
    rows = zip(modules, _own_slices(model, selection), selection.sizes, strict=True)
    for module, pieces, size in rows:
        for piece in pieces:
            home = at(module, piece.module)
            dense = sum(home[name].nbytes for name in tensors_along(home, piece))
            own += dense * size / model.channels
    return model.footprint.channel_bytes(selection) - round(own)


def _read_own(
    model: IFPModel,
    made: nn.Module,
    selection: Selection,
    own: Sequence[tuple[Slice, ...]],
    whole: Sequence[bool],
) -> None:
    """Give a twin of the plain model its own weights as they are in the files, in place."""
    if not any(own):
        return
    plan, source, indices = _part(model.plan, own), model.source, selection.indices
    read, modules = plan.modules(source.open()), plan.modules(made)
    names = sliced_names(source.skeleton, plan)
    layers = [n for n, pieces in enumerate(own) if pieces]
    work = [Wanted(read[n], n, None if whole[n] else indices[n]) for n in layers]
    for n in source.reader_of(plan).fill_each(work):
        if whole[n]:
            cut_rows(read[n], plan.layers[n], indices[n], plan.units)
        for name in names[n]:
            path, _, tensor = name.removeprefix(f"{plan.paths[n]}.").rpartition(".")
            array = at(read[n], path)[tensor]
            mx.eval(array)
            at(modules[n], path)[tensor] = array
        read[n].clear()  # else its dense weights would stay in memory


def _part(plan: Plan, slices: Sequence[tuple[Slice, ...]]) -> Plan:
    """Return the plan of some slices only."""
    pairs = zip(plan.layers, slices, strict=True)
    return replace(plan, layers=tuple(replace(p, slices=some) for p, some in pairs))
