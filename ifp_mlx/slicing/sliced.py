"""Slicing by a plan: the same units as masking, the same result, a smaller model."""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ..selection.masks import Selection
from ..selection.widths import check_multiple
from .shapes import LayerPlan, Plan, Slice, at, is_quantised, put_at

COMPANIONS = ("scales", "biases")  # of a quantised weight, row by row


class Donor(NamedTuple):
    """A layer's module whose units may be copied instead of read.

    Attributes:
        module: as it was filled, without gates folded in.
        units: int32 ``[k]``, the units it holds.
    """

    module: nn.Module
    units: mx.array


def cut(
    module: nn.Module,
    layer: LayerPlan,
    index: mx.array,
    units: int,
    *,
    requantise: bool = True,
) -> None:
    """Keep the units ``index`` of one layer, in place.

    Quantised or not, this loses nothing as long as whole groups of the inlet are kept.
    Where the selection cuts its groups, the inlet is dequantised, sliced and quantised
    again, which loses a little (:func:`cuts_groups` tells beforehand). Experts never
    cut a group.

    Args:
        module: the layer's, from :meth:`Plan.modules`.
        layer: its plan.
        index: int32 ``[k]``, sorted.
        units: how many it has now.
        requantise: ``False`` leaves an inlet whose groups are cut dequantised.

    Raises:
        ValueError: if ``k`` channels do not make whole quantisation groups.
    """
    if index.size < units:
        for piece in layer.slices:
            if is_column(module, piece):
                _keep_columns(module, piece, index, requantise)
        cut_rows(module, layer, index, units)


def cut_rows(module: nn.Module, layer: LayerPlan, index: mx.array, units: int) -> None:
    """Do the part of :func:`cut` that never loses anything: all but the inlet."""
    for piece in layer.slices:
        if not is_column(module, piece):
            home = at(module, piece.module)
            rows = elements(piece, index, units)
            for name in tensors_along(home, piece):
                home[name] = gathered(home[name], rows, piece.axis)
    follow(module, layer, index.size)


def follow(module: nn.Module, layer: LayerPlan, count: int) -> None:
    """Set a layer's plain numbers that depend on its number of units, in place, as
    ``count`` units need them.
    """
    for path, name, repeat in layer.attributes:
        setattr(at(module, path), name, repeat * count)


def elements(piece: Slice, index: mx.array, units: int) -> mx.array:
    """Return which elements of an axis belong to the units ``index``, int32."""
    if piece.repeat == 1:
        return index
    blocks = mx.arange(piece.repeat, dtype=index.dtype)
    if piece.interleaved:
        return (index[:, None] * piece.repeat + blocks).flatten()
    return (blocks[:, None] * units + index).flatten()


def gathered(array: mx.array, index: mx.array, axis: int = -1) -> mx.array:
    """Return some elements of an axis, as ``mx.take`` does, quickly also along the last.

    Along the last axis, MLX's CPU build takes one element at a time;
    ``take_along_axis`` is five to ten times as fast. Along other axes ``take`` copies
    whole rows, and is quick. Both are one kernel on Metal; examples/guides/on_a_mac.md
    has a check of which is quicker.

    Args:
        array: ``[..., F, ...]``, of any type.
        index: int32 ``[k]``.
        axis: where ``F`` is.
    """
    if array.ndim == 1 or axis % array.ndim < array.ndim - 1:
        return mx.take(array, index, axis=axis)
    wide = mx.broadcast_to(index, (*array.shape[:-1], index.size))
    return mx.take_along_axis(array, wide, axis=-1)


def others_of(index: mx.array, units: int) -> mx.array:
    """Return those of ``units`` that are not among ``index``, int32, sorted."""
    dropped = np.ones(units, bool)
    dropped[np.array(index)] = False
    return mx.array(np.flatnonzero(dropped).astype(np.int32))


def tensors_along(home: nn.Module, piece: Slice) -> list[str]:
    """Return the tensors that lie along an axis: a weight, and what scales its rows."""
    if piece.tensor != "weight" or not is_quantised(home):
        return [piece.tensor]
    found = ["weight", *(name for name in COMPANIONS if name in home)]
    scale = home.get("global_scale")  # nvfp4 has it: one for each expert of a stack
    return found + (["global_scale"] if scale is not None and scale.ndim else [])


def is_column(module: nn.Module, piece: Slice) -> bool:
    """Whether units lie along the input of a matrix, where quantisation groups do."""
    return piece.axis == at(module, piece.module)[piece.tensor].ndim - 1 > 0


def count_units(module: nn.Module, layer: LayerPlan) -> int:
    """Return how many units a layer's module has now."""
    for piece in layer.slices:
        home = at(module, piece.module)
        if not is_column(module, piece):
            return home[piece.tensor].shape[piece.axis] // piece.repeat
    raise AssertionError("every plan has an axis of rows")


def fill_model(
    model: nn.Module,
    plan: Plan,
    fills: Iterable[int],
    selection: Selection,
    *,
    progress: Callable[[Iterable], Iterable] = iter,
) -> None:
    """Give every layer of ``model`` its selected units, in place, gates folded in.

    Args:
        model: a stock mlx-lm model, dense in shape; stays one.
        plan: its plan.
        fills: each item that it gives puts the units of the next layer into its module;
            see :meth:`ifp_mlx.storage.folder.Folder.fill_all`.
        selection: made for this model.
        progress: wraps the iteration over layers, for a progress bar.
    """
    layers = zip(plan.layers, plan.modules(model), strict=True)
    gates = selection.gates or (None,) * len(plan.layers)
    fills = iter(fills)
    for (layer, module), gate in progress(list(zip(layers, gates, strict=True))):
        next(fills)
        if gate is not None:
            scale_units(module, layer, gate)
        settle(module)
    note_units(model, plan)


def settle(module: nn.Module) -> None:
    """Compute a module's weights, one after another, so that the matrix one was cut
    from is freed before the next is read.
    """
    for _, weight in tree_flatten(module.parameters()):
        mx.eval(weight)


def slice_model(model: nn.Module, plan: Plan, selection: Selection) -> None:
    """Cut ``model`` down to the selected units, in place, gates folded in.

    Weights that are still lazy are read one layer at a time, so about one dense layer
    is in memory above the compact model.

    Args:
        model: a stock mlx-lm model; stays one.
        plan: its plan.
        selection: made for this model.

    Raises:
        ValueError: as :func:`cut`.
    """
    modules = plan.modules(model)

    def fills() -> Iterable[int]:
        for n, index in enumerate(selection.indices):
            cut(modules[n], plan.layers[n], index, plan.units)
            yield n

    fill_model(model, plan, fills(), selection)


def note_units(model: nn.Module, plan: Plan) -> None:
    """Set the number of units per layer in a sliced model's own settings, if all layers
    have the same number.
    """
    counts = {*map(count_units, plan.modules(model), plan.layers)}
    if len(counts) == 1:
        _say_units(model, plan, plan.units, counts.pop())


def forget_units(model: nn.Module, plan: Plan) -> None:
    """Undo :func:`note_units`: the settings have the dense number again."""
    counts = {*map(count_units, plan.modules(model), plan.layers)}
    if len(counts) == 1:
        _say_units(model, plan, counts.pop(), plan.units)


def _say_units(model: nn.Module, plan: Plan, was: int, now: int) -> None:
    if plan.key is None or "*" in plan.key:
        return
    name = str(plan.key[-1])
    for settings in {id(s): s for m in model.modules() for s in _settings(m)}.values():
        if getattr(settings, name, None) == round(was * plan.per_unit):
            setattr(settings, name, round(now * plan.per_unit))


def _settings(module: nn.Module) -> list[Any]:
    return [value for value in vars(module).values() if is_dataclass(value)]


def scale_units(module: nn.Module, layer: LayerPlan, gate: mx.array) -> None:
    """Fold gates into weights, in place.

    They scale the rows that the channels are proportional to, where the plan knows any,
    else the columns of the inlet.

    Args:
        module: the layer's, sliced already.
        layer: its plan.
        gate: float32 ``[k]``, what each channel is multiplied with.

    Raises:
        ValueError: if quantised weights cannot take them exactly.
    """
    if layer.linear is None:
        inlet = at(module, layer.inlet)
        if is_quantised(inlet):
            raise ValueError(
                f"Soft gates cannot be folded into quantised weights of "
                f"{type(module).__name__}; use binary gates, or an unquantised model."
            )
        inlet.weight = (inlet.weight.astype(mx.float32) * gate).astype(
            inlet.weight.dtype
        )
        return
    path, block = layer.linear
    for piece in layer.slices:
        if piece.module == path and not is_column(module, piece):
            _scale_rows(at(module, path), piece, block, gate)


def dequantised(linear: nn.Module) -> mx.array:
    """Return a linear's weight, ``[O, I]``, whether it is quantised or not."""
    if not is_quantised(linear):
        return linear.weight
    return mx.dequantize(
        linear.weight, linear.scales, linear.get("biases"), **_quantisation(linear)
    )


def put_down(linear: nn.Module, weight: mx.array) -> None:
    """Give an inlet other weights, in place, quantised as it is.

    Args:
        linear: any stock linear, dense in shape.
        weight: ``[D, k]``.

    Raises:
        ValueError: if ``k`` channels do not make whole quantisation groups.
    """
    if not is_quantised(linear):
        linear.weight = weight
        return
    channels = linear.scales.shape[1] * linear.group_size
    check_multiple(weight.shape[1], linear.group_size, channels)
    linear.weight, linear.scales, *biases = mx.quantize(weight, **_quantisation(linear))
    if biases:
        linear.biases = biases[0]


def group_sizes(model: nn.Module, plan: Plan) -> list[int]:
    """Return every layer's quantisation group along its units; 1 if it is not
    quantised, and for experts, which no group spans.
    """
    if plan.unit == "expert":
        return [1] * len(plan.layers)
    return [getattr(inlet, "group_size", 1) for inlet in plan.inlets(model)]


def group_size(model: nn.Module, plan: Plan) -> int:
    """Return how many units must be selected together."""
    return math.lcm(*group_sizes(model, plan))


def cuts_groups(index: mx.array, group: int, units: int) -> bool:
    """Whether keeping ``index``, int32 ``[k]``, of ``units`` cuts a quantisation group
    of the inlet, so that it must be quantised again.
    """
    return index.size < units and group > 1 and not _is_whole_blocks(index, group)


def pad(module: nn.Module, layer: LayerPlan, count: int) -> None:
    """Widen one layer to ``count`` channels, in place, without changing what it does.

    The inlet has zeros for the added channels, whatever their values.

    Args:
        module: the layer's, not quantised, not wider than that.
        layer: its plan, nothing interleaved.
        count: channels afterwards.
    """
    now = count_units(module, layer)
    for piece in layer.slices:
        home = at(module, piece.module)
        tensor = home[piece.tensor]
        blocks = mx.split(tensor, piece.repeat, axis=piece.axis)
        widths = [(0, 0)] * tensor.ndim
        widths[piece.axis] = (0, count - now)
        home[piece.tensor] = mx.concatenate(
            [mx.pad(block, widths) for block in blocks], axis=piece.axis
        )
    follow(module, layer, count)


def sliced_names(model: nn.Module, plan: Plan) -> list[list[str]]:
    """Return, for each layer, the parameters along which its units lie."""
    found = []
    for layer, module in zip(plan.layers, plan.modules(model), strict=True):
        homes = [
            (p.module, tensors_along(at(module, p.module), p)) for p in layer.slices
        ]
        paths = [(".".join(filter(None, (layer.path, home))), t) for home, t in homes]
        found.append([f"{path}.{name}" for path, names in paths for name in names])
    return found


def share_core(model: nn.Module, other: nn.Module, plan: Plan) -> None:
    """Let ``model`` share the weights of ``other``, except the sliced ones, in place.

    Args:
        model: a stock mlx-lm model.
        other: the same one, apart from what is sliced.
        plan: of both.
    """
    own = {name for names in sliced_names(model, plan) for name in names}
    theirs = tree_flatten(other.parameters())
    model.update(tree_unflatten([(n, w) for n, w in theirs if n not in own]))


def twin(model: nn.Module) -> nn.Module:
    """Return a model of the same structure that shares the arrays of this one; what is
    set in one does not change the other.
    """
    return copy.deepcopy(model, {id(leaf): leaf for _, leaf in tree_flatten(model)})


def _quantisation(linear: nn.Module) -> dict[str, Any]:
    return {"group_size": linear.group_size, "bits": linear.bits, "mode": linear.mode}


def _keep_columns(
    module: nn.Module, piece: Slice, index: mx.array, requantise: bool
) -> None:
    linear = at(module, piece.module)
    if not is_quantised(linear):
        linear.weight = gathered(linear.weight, index)
        return
    group = linear.group_size
    if not _is_whole_blocks(index, group):
        put_at(module, piece.module, _cut_groups(linear, index, requantise))
        return
    blocks, groups = index[::group] // group, linear.scales.shape[1]
    for name in ("weight", *COMPANIONS):
        if name in linear:
            words = linear[name].shape[1] // groups  # of each group
            places = blocks[:, None] * words + mx.arange(words, dtype=blocks.dtype)
            linear[name] = gathered(linear[name], places.flatten())


def _cut_groups(linear: nn.Module, index: mx.array, requantise: bool) -> nn.Module:
    """Return the columns ``index`` of a quantised inlet as another linear."""
    down = gathered(dequantised(linear), index)
    if requantise:
        put_down(linear, down)
        return linear
    whole = nn.Linear(1, 1, bias=False)
    whole.weight = down
    if "bias" in linear:
        whole.bias = linear.bias
    return whole


def _is_whole_blocks(index: mx.array, group: int) -> bool:
    if index.size % group:
        return False
    starts = index[::group] // group * group
    blocks = starts[:, None] + mx.arange(group)
    return bool(mx.array_equal(index.reshape(-1, group), blocks))


def _scale_rows(home: nn.Module, piece: Slice, block: int, gate: mx.array) -> None:
    # A row's scale multiplies its quantisation scales and biases, which is exact
    # for the affine mode; the other modes store scales as powers of two.
    names = tensors_along(home, piece)
    if len(names) > 1 or (is_quantised(home) and piece.tensor == "weight"):
        if home.mode != "affine":
            raise ValueError(
                f"Soft gates cannot be folded into {home.mode} weights; use binary "
                "gates or affine quantisation."
            )
        names = names[1:]
    factors = mx.ones((gate.size, piece.repeat))
    factors[:, block] = gate
    rows = (factors if piece.interleaved else factors.T).flatten()
    for name in names:
        array = home[name]
        scale = rows.reshape(-1, *[1] * (array.ndim - 1))
        home[name] = (array.astype(mx.float32) * scale).astype(array.dtype)
