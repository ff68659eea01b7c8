"""The plan of slices: which parameters of a stock model are cut, on which axis.

A compact model is the stock class built from a smaller config. So the class is built
twice without weights, the second time with another number of units, and the parameters
whose shapes differ are those to cut, on the axis that differs. No names of matrices and
no list of families is needed; a fused gate and up matrix is one axis twice as long.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any

import mlx.nn as nn

from .probe import probed
from .shapes import (
    Key,
    LayerPlan,
    Plan,
    Shapes,
    Slice,
    Unit,
    Unsliceable,
    at,
    changed,
    dense_shapes,
)
from .stock import build, unmoved_random_state

# The second build has this many times the units; the larger if the first is rounded away.
GROWTHS = (2, 16)


def plan_of(
    model: nn.Module, config: dict[str, Any] | None = None, unit: Unit | None = None
) -> Plan:
    """Return the plan of slices of a stock model; no weight is read.

    Args:
        model: mlx-lm's, dense in shape, quantised or not, its weights read or not.
        config: its config.json; default: what the model itself says of it.
        unit: what is to be kept or dropped; default: experts where there are any.

    Raises:
        Unsliceable: if nothing can be cut exactly, saying why.
    """
    config = config or asdict(model.args)
    before = dense_shapes(model)
    reasons = {}
    for kind in (unit,) if unit else ("expert", "channel"):
        try:
            return _plan_of_unit(model, before, config, kind)
        except Unsliceable as reason:
            reasons[kind] = str(reason)
    if not _stacks(before):
        reasons = {kind: why for kind, why in reasons.items() if kind == "channel"}
    why = "; ".join(f"as {kind}s: {why}" for kind, why in reasons.items())
    raise Unsliceable(
        f"{type(model).__module__}.{type(model).__name__} (model type "
        f"{config.get('model_type')}) cannot be sliced {why}."
    )


def _plan_of_unit(
    model: nn.Module, before: Shapes, config: dict[str, Any], unit: Unit
) -> Plan:
    why = Unsliceable(f"no parameter has an axis of {unit}s that could be cut")
    if unit == "expert" and not _stacks(before):
        raise why
    for found in _candidates(model, before, config, unit):
        try:
            return probed(model, found)
        except Unsliceable as reason:
            if found.key is not None:  # later plans have fewer weights, and are no FFN
                raise
            why = reason
    raise why


def _candidates(
    model: nn.Module, before: Shapes, config: dict[str, Any], unit: Unit
) -> Iterator[Plan]:
    """Yield the plans found by changing one key of the config at a time, the likeliest
    first; plans whose key changes other things too come last.

    Raises:
        Unsliceable: if layers have different numbers of units.
    """
    rest = []
    for key, value in _keys(model, before, config, unit):
        for growth in GROWTHS[: 1 if isinstance(value, int) else None]:
            other = _grown(config, key, value, growth)
            after = dense_shapes(other) if other is not None else {}
            found = _difference(before, after, unit) if {*before} <= {*after} else None
            if found is None:
                continue
            units, parts, pure = found
            layers = (_layer_plan(model, other, part, unit, growth) for part in parts)
            plan = Plan(unit, units, tuple(layers))
            if pure:
                yield replace(plan, key=key, per_unit=value / units)
            else:
                rest.append(plan)
            break
    yield from rest


def _grown(
    config: dict[str, Any], key: Key, value: float, growth: int
) -> nn.Module | None:
    """Return the model with one number of its config grown, if it can be built."""
    exact = value * growth if isinstance(value, int) else None
    try:
        with unmoved_random_state():
            return build(changed(config, key, growth, exact=exact))
    except ValueError:  # a key that cannot have this value says nothing
        return None


def _keys(
    model: nn.Module, before: Shapes, config: dict[str, Any], unit: Unit
) -> list[tuple[Key, float]]:
    """Return the keys of a config that are numbers, those first whose value is the
    size of an axis that could be cut: the more weights have it, the earlier.
    """
    sizes: dict[int, int] = {}
    fixed = {size for n, shape in before.items() if not _layer_of(n) for size in shape}
    for name, shape in before.items():
        if _layer_of(name) and len(shape) == (3 if unit == "expert" else 2):
            size = shape[0] if unit == "expert" else shape[1]
            if unit == "expert" or size not in fixed:
                count = shape[0] * shape[1] * (shape[2] if len(shape) == 3 else 1)
                sizes[size] = sizes.get(size, 0) + count
    known = dict(_numbers(config))
    args = getattr(model, "args", None)
    if is_dataclass(args):  # defaults of the class that config.json leaves out
        known |= {
            (field.name,): value
            for field in fields(args)
            if field.name not in config
            and _is_number(value := getattr(args, field.name))
        }
    return sorted(known.items(), key=lambda item: -sizes.get(int(item[1]), 0))


def _difference(
    before: Shapes, after: Shapes, unit: Unit
) -> tuple[int, list[dict[tuple[str, int], int]], bool] | None:
    """Read the difference of two builds.

    Returns:
        How many units there are; for each layer, parameter and axis to its elements
        per unit; and whether nothing else changed. ``None`` if there are no units.

    Raises:
        Unsliceable: if layers have different numbers of them.
    """
    moved = [
        (name, axis, size, after[name][axis])
        for name, shape in before.items()
        for axis, size in enumerate(shape)
        if after[name] != shape and after[name][axis] != size
    ]
    outside = {(a, b) for name, _, a, b in moved if not _layer_of(name)}
    bases = _bases(before, moved, unit) - outside
    if not bases:
        return None
    if len(bases) > 1 and not outside:
        raise Unsliceable(
            f"its layers have the widths {sorted(a for a, _ in bases)}, and a selection "
            "is made of layers that are equally wide"
        )
    base = max(bases)
    layers: dict[str, dict[tuple[str, int], int]] = {}
    for name, axis, a, b in moved:
        if _layer_of(name) and a % base[0] == 0 and a * base[1] == b * base[0]:
            if (a, b) not in outside:
                layers.setdefault(_layer_of(name), {})[name, axis] = a // base[0]
    taken = sum(map(len, layers.values()))
    if unit == "channel" and any(
        len(before[name]) == 3 and min(before[name]) > 1
        for part in layers.values()
        for name, _ in part
    ):
        return None  # the width of experts
    return base[0], list(layers.values()), taken == len(moved)


def _bases(before: Shapes, moved: list[tuple], unit: Unit) -> set[tuple[int, int]]:
    """Return the old and new sizes of the axes by which units are recognised: inputs
    of matrices, or for experts the first axes of stacks.
    """
    inputs = {(a, b) for n, axis, a, b in moved if (len(before[n]), axis) == (2, 1)}
    if unit == "channel":
        return inputs
    stacks = {(a, b) for n, axis, a, b in moved if (len(before[n]), axis) == (3, 0)}
    inner = {(a, b) for n, axis, a, b in moved if len(before[n]) == 3 and axis > 0}
    return stacks - inputs - inner


def _stacks(before: Shapes) -> bool:
    """Whether there is anything like a stack of experts."""
    return any(len(shape) == 3 and min(shape) > 1 for shape in before.values())


def _layer_plan(
    model: nn.Module,
    other: nn.Module,
    part: dict[tuple[str, int], int],
    unit: Unit,
    growth: int,
) -> LayerPlan:
    homes = [name.split(".")[:-1] for name, _ in part]
    path = _common(homes)
    while isinstance(at(model, path), list):  # of modules
        path = path.rpartition(".")[0]
    depth = len(path.split("."))
    slices = tuple(
        Slice(".".join(name.split(".")[depth:-1]), name.split(".")[-1], axis, repeat)
        for (name, axis), repeat in part.items()
    )
    home = at(model, path)
    shapes = dense_shapes(home)
    inlet = _inlet(home, slices, shapes, unit)
    sizes = {s.repeat: shapes[_name(s)][s.axis] for s in slices}
    attributes = _attributes(home, at(other, path), sizes, growth)
    experts = _experts(slices, shapes) if unit == "expert" else ""
    return LayerPlan(path, slices, inlet, attributes=attributes, experts=experts)


def _experts(slices: Iterable[Slice], shapes: Shapes) -> str:
    """Return the module that holds all stacks of experts."""
    stacks = {s.module for s in slices if len(shapes[_name(s)]) == 3}
    return _common([stack.split(".")[:-1] for stack in stacks])


def _inlet(home: nn.Module, slices: Iterable[Slice], shapes: Shapes, unit: Unit) -> str:
    """Return the module whose input carries the channels, or the router."""
    if unit == "channel":
        ways = [s for s in slices if s.axis == 1 and len(shapes[_name(s)]) == 2]
        return ways[0].module if len(ways) == 1 and ways[0].repeat == 1 else ""
    stacked = {s.module for s in slices if len(shapes[_name(s)]) == 3}
    flat = [s for s in slices if len(shapes[_name(s)]) == 2 and s.repeat == 1]
    routers = [s.module for s in flat if s.module not in stacked]
    return routers[0] if routers else ""


def _attributes(
    home: nn.Module, other: nn.Module, sizes: dict[int, int], growth: int
) -> tuple[tuple[str, str, int], ...]:
    """Return the plain numbers in a module and below that grew with its units."""
    found = []
    others = dict(other.named_modules())
    for path, module in home.named_modules():
        for name, value in vars(module).items():
            grown = vars(others[path]).get(name) if path in others else None
            if _is_number(value) and grown == growth * value != value:
                repeats = [r for r, size in sizes.items() if size == value]
                if repeats:
                    found.append((path, name, repeats[0]))
    return tuple(found)


def _numbers(config: Any, path: Key = ()) -> Iterator[tuple[Key, float]]:
    """Yield each number in a config with its place; for a list, the largest."""
    if isinstance(config, dict):
        for name, value in config.items():
            yield from _numbers(value, (*path, name))
    elif isinstance(config, list) and config and all(map(_is_number, config)):
        yield path, max(config)
    elif isinstance(config, list) and config and isinstance(config[0], dict):
        for name, value in config[0].items():
            for key, number in _numbers(value, (name,)):
                yield (*path, "*", *key), number
    elif _is_number(config):
        yield path, config


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _layer_of(name: str) -> str:
    """Return the part of a parameter's name that tells its layer; may be empty."""
    steps = name.split(".")
    number = next((n for n, step in enumerate(steps) if step.isdigit()), -1)
    return ".".join(steps[: number + 1])


def _common(paths: list[list[str]]) -> str:
    first, last = min(paths), max(paths)
    same = 0
    while same < min(len(first), len(last)) and first[same] == last[same]:
        same += 1
    return ".".join(first[:same])


def _name(part: Slice) -> str:
    return f"{part.module}.{part.tensor}" if part.module else part.tensor
