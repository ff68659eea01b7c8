"""Try a plan on a small random copy of each kind of layer before it is believed.

Shapes tell where channels lie. Only running the module's own class tells whether a
channel's value depends on that channel alone, and how fused matrices are laid out. The
copy has the layer's settings, a few channels, and no weight of the model.
"""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .masked import tapped
from .shapes import (
    LayerPlan,
    Plan,
    Unsliceable,
    at,
    dense_shapes,
    is_quantised,
    put_at,
)
from .sliced import cut, follow, scale_units, twin

SAMPLE = 64  # channels of the copy, at most
TOLERANCE = 1e-4  # of the largest output, float32


def probed(model: nn.Module, plan: Plan) -> Plan:
    """Return a plan completed by trying the first layer of each kind.

    Raises:
        Unsliceable: if masking and cutting the same channels do not give the same.
    """
    if any(not layer.inlet for layer in plan.layers):
        raise Unsliceable(f"its {plan.unit}s do not come in by one module")
    if plan.unit == "expert":
        return plan
    known: dict[tuple, LayerPlan] = {}
    layers = []
    for layer in plan.layers:
        kind = _kind(at(model, layer.path), layer)
        if kind not in known:
            known[kind] = _tried(at(model, layer.path), layer, plan.units)
        like = known[kind]
        layers.append(replace(layer, slices=like.slices, linear=like.linear))
    return replace(plan, layers=tuple(layers))


def _kind(module: nn.Module, layer: LayerPlan) -> tuple:
    """Return what, beside its weights, decides how a layer computes: gemma3n's class
    keeps only the largest channels in some layers, and all in others.
    """
    plain = (bool, int, float, str)
    settings = (
        (path, type(part), name, value)
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, plain)
    )
    return type(module), layer.slices, layer.inlet, tuple(settings)


def _tried(module: nn.Module, layer: LayerPlan, units: int) -> LayerPlan:
    count = min(units, SAMPLE)
    dense = _copy(module, layer, count)
    x = 2 * mx.random.normal((1, 6, _width(module, layer)), key=mx.random.key(1))
    index = mx.arange(1, count, 3).astype(mx.int32)
    values = mx.random.uniform(0.5, 2.0, (index.size,), key=mx.random.key(2))
    mask = mx.zeros(count)
    mask[index] = 1.0
    gates = mx.zeros(count)
    gates[index] = values
    whole = _run(dense, layer, x, mx.ones(count))
    expected = _run(dense, layer, x, mask)
    if not _differ(whole, expected):
        raise Unsliceable(f"the channels of {type(module).__name__} change nothing")
    for layout in _layouts(layer):
        part = _copy(module, layout, count)
        cut(part, layout, index, count)
        if not _differ(_run(part, layout, x), expected):
            gated = _run(dense, layer, x, gates)
            return replace(layout, linear=_linear(part, layout, x, values, gated))
    raise Unsliceable(f"{type(module).__name__} mixes its channels")


def _layouts(layer: LayerPlan) -> list[LayerPlan]:
    side_by_side = tuple(replace(s, interleaved=s.repeat > 1) for s in layer.slices)
    other = replace(layer, slices=side_by_side)
    return [layer] if other == layer else [layer, other]


def _linear(
    part: nn.Module, layer: LayerPlan, x: mx.array, gate: mx.array, expected: mx.array
) -> tuple[str, int] | None:
    """Return the rows that can be scaled by gates instead of the channels."""
    rows = [s for s in layer.slices if s.axis == 0 and s.tensor == "weight"]
    for piece in rows[::-1]:  # up comes after gate
        for block in range(piece.repeat)[::-1]:
            tried = replace(layer, linear=(piece.module, block))
            scaled = twin(part)
            scale_units(scaled, tried, gate)
            if not _differ(_run(scaled, tried, x), expected):
                return tried.linear
    return None


def _copy(module: nn.Module, layer: LayerPlan, count: int) -> nn.Module:
    """Return a module of the same class and settings with random float32 weights, and
    with so many channels.
    """
    sizes = {(s.module, s.tensor, s.axis): s.repeat * count for s in layer.slices}
    copy = twin(module)
    for path, part in module.named_modules():
        if is_quantised(part):
            put_at(copy, path, nn.Linear(1, 1, bias="bias" in part))
    for number, (name, shape) in enumerate(sorted(dense_shapes(module).items())):
        home, _, tensor = name.rpartition(".")
        size = [sizes.get((home, tensor, axis), n) for axis, n in enumerate(shape)]
        spread = size[-1] ** -0.5 if len(size) > 1 else 1.0
        key = mx.random.key(number)
        at(copy, home)[tensor] = spread * mx.random.normal(size, key=key)
    follow(copy, layer, count)
    return copy


def _width(module: nn.Module, layer: LayerPlan) -> int:
    """Return ``D``, what goes into a layer's module."""
    shapes = dense_shapes(module)
    for piece in layer.slices:
        name = f"{piece.module}.{piece.tensor}" if piece.module else piece.tensor
        if piece.axis == 0 and len(shapes[name]) == 2:
            return shapes[name][1]
    raise Unsliceable(f"{type(module).__name__} has no matrix that makes channels")


def _run(
    module: nn.Module, layer: LayerPlan, x: mx.array, scale: mx.array | None = None
) -> mx.array:
    """Return the output of a module, its channels multiplied with ``scale``."""

    def scaled(h: mx.array) -> mx.array:
        return h if scale is None else h * scale

    try:
        with tapped([at(module, layer.inlet)], [scaled]):
            output: Any = module(x)
    except Exception as error:  # it needs other arguments than an FFN
        raise Unsliceable(
            f"{type(module).__name__} cannot be run alone ({type(error).__name__}: "
            f"{error})"
        ) from error
    output = output[0] if isinstance(output, tuple) else output
    mx.eval(output)
    return output


def _differ(one: mx.array, other: mx.array) -> bool:
    largest = mx.maximum(mx.abs(one).max(), mx.abs(other).max())
    return not bool(mx.abs(one - other).max() <= TOLERANCE * largest)
