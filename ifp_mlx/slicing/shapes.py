"""The parts of a plan of slices, and the shapes they are found from.

A unit is what is kept or dropped as a whole: a channel of an FFN, or an expert. A plan
names the axes of parameters along which units lie; :mod:`ifp_mlx.slicing.plan` makes it.
"""

from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import mlx.nn as nn
from mlx.utils import tree_flatten

Unit = Literal["channel", "expert"]
Shapes = dict[str, tuple[int, ...]]
Key = tuple[str | int, ...]  # where in a config; "*" stands for all entries of a list


class Unsliceable(ValueError):
    """A model, or one way of reading its shapes, that cannot be cut exactly."""


@dataclass(frozen=True)
class Slice:
    """One axis along which units lie.

    Attributes:
        module: where its parameter is, from the layer's own module; may be empty.
        tensor: the parameter's name there, such as ``weight``.
        axis: the axis of the tensor, in its shape before quantisation.
        repeat: elements of that axis per unit; 2 where gate and up are fused.
        interleaved: whether a unit's elements lie side by side, or one in each of
            ``repeat`` blocks.
    """

    module: str
    tensor: str
    axis: int
    repeat: int = 1
    interleaved: bool = False


@dataclass(frozen=True)
class LayerPlan:
    """The slices of one layer.

    Attributes:
        path: of the module that holds all of them, from the model.
        slices: what is cut.
        inlet: from the path, the module whose input carries the channels; for experts,
            the router, which decides which of them get a token.
        linear: module and block of rows that a channel's value is proportional to, so
            that gates can be folded in; ``None`` where there are none.
        attributes: plain numbers that follow the number of units: module, name, and how
            much per unit.
        experts: from the path, the module that computes the experts that were chosen;
            empty where units are channels.
    """

    path: str
    slices: tuple[Slice, ...]
    inlet: str
    linear: tuple[str, int] | None = None
    attributes: tuple[tuple[str, str, int], ...] = ()
    experts: str = ""


@dataclass(frozen=True)
class Plan:
    """What is cut of a model.

    Attributes:
        unit: what is kept or dropped.
        units: how many there are in a layer, ``F`` or ``E``.
        layers: the ``L`` layers that have any.
        key: the place in config.json that sets the number of units, and nothing else,
            or ``None`` if there is none.
        per_unit: what one unit adds to the number there.
    """

    unit: Unit
    units: int
    layers: tuple[LayerPlan, ...]
    key: Key | None = None
    per_unit: float = 1.0

    @cached_property
    def shape(self) -> tuple[int, int]:
        """``(L, F)``, or ``(L, E)``."""
        return len(self.layers), self.units

    @property
    def paths(self) -> list[str]:
        """Where in a model its layers are."""
        return [layer.path for layer in self.layers]

    def modules(self, model: nn.Module) -> list[nn.Module]:
        """Return the module of every layer, in a model of this plan."""
        return [at(model, layer.path) for layer in self.layers]

    def inlets(self, model: nn.Module) -> list[nn.Module]:
        """Return the inlet of every layer, in a model of this plan."""
        return [at(at(model, layer.path), layer.inlet) for layer in self.layers]

    def resized(self, config: dict[str, Any], units: int) -> dict[str, Any]:
        """Return the config of the stock model with this many units in every layer.

        Raises:
            ValueError: if no key of the config says how many.
        """
        value = units * self.per_unit
        if self.key is None or (value != round(value) and self.per_unit >= 1):
            raise ValueError(
                f"No plain folder of the type {config['model_type']} can have {units} "
                f"{self.unit}s in a layer: no key of its config.json sets that. Use the "
                "compact model in memory, with ifp_mlx.generate."
            )
        old = self.units * self.per_unit
        return changed(config, self.key, value / old if old else 1, exact=round(value))


def dense_shapes(model: nn.Module) -> Shapes:
    """Return the shape of every parameter, as if nothing were quantised."""
    found: Shapes = {}
    packed = {path: m for path, m in model.named_modules() if is_quantised(m)}
    for name, value in tree_flatten(model.parameters()):
        home, _, tensor = name.rpartition(".")
        shape = tuple(value.shape)
        if home in packed and tensor in ("scales", "biases", "global_scale"):
            continue
        if home in packed and tensor == "weight":
            linear = packed[home]
            shape = (*shape[:-1], linear["scales"].shape[-1] * linear.group_size)
        found[name] = shape
    return found


def is_quantised(module: nn.Module) -> bool:
    """Whether a module keeps its weight in groups that share a scale."""
    return "scales" in module and hasattr(module, "group_size")


def at(model: Any, path: str) -> Any:
    """Return what is at a dotted path of a module; the path may be empty."""
    for step in path.split(".") if path else ():
        model = model[int(step)] if isinstance(model, list) else getattr(model, step)
    return model


def put_at(model: nn.Module, path: str, value: Any) -> None:
    """Put something at a dotted path of a module, in place."""
    above, _, last = path.rpartition(".")
    home = at(model, above)
    if isinstance(home, list):
        home[int(last)] = value
    else:
        setattr(home, last, value)


def changed(
    config: dict[str, Any], key: Key, factor: float, *, exact: int | None = None
) -> dict[str, Any]:
    """Return a config with one number, or all of one kind in a list, multiplied.

    Args:
        config: stays as it is.
        key: where it is.
        factor: what it is multiplied with; whole numbers stay whole.
        exact: the new value of a whole number that is not in a list.
    """

    def grown(value: Any) -> Any:
        if isinstance(value, list):
            return [grown(entry) for entry in value]
        return round(value * factor) if isinstance(value, int) else value * factor

    def put(home: Any, rest: Key) -> None:
        step, *more = rest
        if step == "*":
            for entry in home:
                put(entry, tuple(more))
        elif more:
            put(home[step], tuple(more))
        elif isinstance(home.get(step), int) and exact is not None and "*" not in key:
            home[step] = exact
        elif step in home:
            home[step] = grown(home[step])
        else:  # a default of the class
            home[step] = exact

    copy = deepcopy(config)
    put(copy, key)
    return copy
