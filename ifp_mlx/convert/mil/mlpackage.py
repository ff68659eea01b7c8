"""A saved Core ML package as a program to run: read from disk, run in numpy.

Every value is rounded to its declared type after every operation and checked against
its declared type and shape; sums inside one operation are in float32. Values are freed
after their last use, so memory holds the states and little else.
"""

import importlib
import json
import logging
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .ops import apply
from .storage import CONSTEXPR, TYPES, BlobFile, view

Array = np.ndarray
STATE_OPS = ("read_state", "write_state", "coreml_update_state")


@dataclass(frozen=True)
class Type:
    """A declared type: MIL's name of the element type, and sizes, ``None`` if free."""

    kind: str
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        return f"{self.kind}[{', '.join('?' if n is None else str(n) for n in self.shape)}]"

    def check(self, value: Array, what: str) -> None:
        """Raise ``ValueError`` if ``value`` is not of this type."""
        free = [
            n is None or n == m for n, m in zip(self.shape, value.shape, strict=False)
        ]
        fits = len(self.shape) == value.ndim and all(free)
        if not fits or value.dtype != TYPES[self.kind][0]:
            raise ValueError(
                f"{what} is {value.dtype}{list(value.shape)}, but is declared {self}."
            )


@dataclass
class Step:
    """One operation: arguments are constants, or names of values to come."""

    kind: str
    arguments: dict[str, Any]
    outputs: list[tuple[str, Type]]
    last_used: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Name:
    """An argument that is another operation's output, or an input."""

    name: str


@dataclass
class Function:
    """A program: its interface, and its operations in order, constants resolved."""

    inputs: dict[str, Type]
    states: dict[str, Type]
    sizes: dict[str, list[tuple[int, int]]]
    outputs: list[str]
    steps: list[Step]


class Package:
    """A ``.mlpackage`` on disk.

    Args:
        path: the package folder.

    Attributes:
        functions: the names of its functions, the default one first.

    Raises:
        ValueError: if a part is missing or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        model = self._model_file()
        self._folder = model.parent
        self._files: dict[str, BlobFile] = {}
        self.spec = _proto("Model_pb2").Model()
        try:
            self.spec.ParseFromString(model.read_bytes())
        except Exception as error:  # protobuf's DecodeError is nowhere public
            raise ValueError(f"{model} is not a Core ML model: {error}.") from error
        if self.spec.WhichOneof("Type") != "mlProgram":
            raise ValueError(f"{model} is not an ML program.")
        self._described = {f.name: f for f in self.spec.description.functions}
        default = self.spec.description.defaultFunctionName or "main"
        names = sorted(self.spec.mlProgram.functions, key=lambda n: (n != default, n))
        self.functions = names

    def session(self, function: str = "main") -> "Session":
        """Return a new session of one function, its state all zero.

        Raises:
            ValueError: if there is no such function, or its weights are damaged.
        """
        if function not in self.functions:
            raise ValueError(
                f"{self.path} has no function {function!r}; it has "
                f"{', '.join(self.functions)}."
            )
        return Session(self._function(function), self._forget)

    def _model_file(self) -> Path:
        manifest = self.path / "Manifest.json"
        try:
            content = json.loads(manifest.read_text(encoding="utf-8"))
            entry = content["itemInfoEntries"][content["rootModelIdentifier"]]
            file = self.path / "Data" / entry["path"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path} is not a Core ML package: {manifest.name} is missing or "
                f"damaged ({type(error).__name__})."
            ) from error
        if not file.is_file():
            raise ValueError(f"{self.path} is incomplete: {file} is missing.")
        return file

    def _function(self, name: str) -> Function:
        function = self.spec.mlProgram.functions[name]
        block = function.block_specializations[function.opset]
        inputs, states = {}, {}
        for value in function.inputs:
            if value.type.WhichOneof("type") == "stateType":
                states[value.name] = _type(value.type.stateType.wrappedType)
            else:
                inputs[value.name] = _type(value.type)
        steps, known = [], dict[str, Any]()
        for operation in block.operations:
            step = self._step(operation, known)
            if step.kind == "const":
                known[step.outputs[0][0]] = step.arguments["val"]
            elif step.kind in CONSTEXPR:
                known[step.outputs[0][0]] = _constexpr(step)
            else:
                steps.append(step)
        outputs = list(block.outputs)
        _mark_last_uses(steps, outputs)
        described = self._described.get(name, self.spec.description)
        sizes = {feature.name: _sizes(feature) for feature in described.input}
        return Function(inputs, states, sizes, outputs, steps)

    def _step(self, operation: Any, known: dict[str, Any]) -> Step:
        arguments: dict[str, Any] = {}
        if operation.type == "const":
            arguments["val"] = self._value(operation.attributes["val"])
        for key, argument in operation.inputs.items():
            values = [
                self._value(binding.value)
                if binding.WhichOneof("binding") == "value"
                else known.get(binding.name, Name(binding.name))
                for binding in argument.arguments
            ]
            arguments[key] = values if key == "values" else values[0]
        outputs = [(output.name, _type(output.type)) for output in operation.outputs]
        return Step(operation.type, arguments, outputs)

    def _value(self, value: Any) -> Any:
        """Return a constant: a string, a scalar, an array, or packed integers."""
        declared = _type(value.type)
        shape = tuple(n or 0 for n in declared.shape)
        if value.WhichOneof("value") == "blobFileValue":
            name = value.blobFileValue.fileName
            if name not in self._files:
                inside = self._folder / name.removeprefix("@model_path/")
                if self._folder.resolve() not in inside.resolve().parents:
                    raise ValueError(f"{self.path} has weights outside of it: {name}.")
                self._files[name] = BlobFile(inside)
            return self._files[name].read(
                value.blobFileValue.offset, declared.kind, shape
            )
        tensor = value.immediateValue.tensor
        content = getattr(tensor, tensor.WhichOneof("value") or "ints").values
        if declared.kind == "STRING":
            return content[0]
        if isinstance(content, bytes):
            array = view(np.frombuffer(content, np.uint8), declared.kind, shape)
        else:
            array = np.array(content, TYPES[declared.kind][0]).reshape(shape)
        return array if shape else np.asarray(array)[()]

    def _forget(self) -> None:
        for file in self._files.values():
            file.forget()


class Session:
    """Runs a function again and again, with a state that stays between runs.

    Args:
        function: what runs.
        forget: called after a large weight was read.

    Attributes:
        state: by name; arrays are replaced, never changed.
    """

    def __init__(self, function: Function, forget: Callable[[], None]) -> None:
        self.function = function
        self._forget = forget
        self.state: dict[str, Array] = {
            name: np.zeros(tuple(n or 0 for n in kind.shape), TYPES[kind.kind][0])
            for name, kind in function.states.items()
        }

    def largest(self, name: str, axis: int) -> int:
        """Return the largest size an input may have along ``axis``."""
        return self.function.sizes[name][axis][1]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the function once.

        Args:
            inputs: by name, of the declared types.

        Returns:
            The outputs by name.

        Raises:
            ValueError: if an input does not fit, an operation is not known or fails,
                or a value is not of its declared type.
        """
        self._check(inputs)
        values: dict[str, Array] = dict(inputs)
        with np.errstate(all="ignore"):  # overflow to infinity is the result to show
            for step in self.function.steps:
                self._take(step, values)
        return {name: values[name] for name in self.function.outputs}

    def _check(self, inputs: Mapping[str, Array]) -> None:
        declared = self.function.inputs
        if set(inputs) != set(declared):
            raise ValueError(
                f"The inputs are {', '.join(sorted(inputs))}, but the function takes "
                f"{', '.join(sorted(declared))}."
            )
        for name, value in inputs.items():
            declared[name].check(value, f"The input {name}")
            limits = self.function.sizes.get(name, [])
            for axis, (size, (low, high)) in enumerate(
                zip(value.shape, limits, strict=False)
            ):
                if not low <= size <= high:
                    raise ValueError(
                        f"The input {name} has {size} along axis {axis}; it may have "
                        f"{low} to {high}."
                    )

    def _take(self, step: Step, values: dict[str, Array]) -> None:
        where = f"{step.kind} {step.outputs[0][0]!r}" if step.outputs else step.kind
        try:
            if step.kind in STATE_OPS:
                results = self._state_step(step, values)
            else:
                arguments = {k: _resolve(v, values) for k, v in step.arguments.items()}
                results = apply(step.kind, arguments)
                del arguments
        except (ValueError, IndexError, TypeError, KeyError) as error:
            raise ValueError(f"{where} failed: {error}.") from error
        for (name, declared), value in zip(step.outputs, results, strict=True):
            declared.check(value, where)
            values[name] = value
        for name in step.last_used:
            values.pop(name, None)
        if step.kind == "linear":
            self._forget()

    def _state_step(self, step: Step, values: dict[str, Array]) -> tuple[Array, ...]:
        """Read the state as it is now, or write it, or both: write, then read."""
        kind, arguments = step.kind, step.arguments
        name = arguments["input" if kind != "coreml_update_state" else "state"].name
        if kind == "read_state":
            return (self.state[name],)
        data = _resolve(arguments["data" if kind == "write_state" else "value"], values)
        self.function.states[name].check(data, f"The new state {name}")
        self.state[name] = data
        return (data,) if kind == "coreml_update_state" else ()


def _proto(module: str) -> Any:
    """Import one of coremltools' generated protobuf modules, quietly."""
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(f"coremltools.proto.{module}")
        except ImportError as error:
            raise ImportError(
                f"Reading a Core ML package needs coremltools ({error}); "
                "pip install 'ifp-mlx[coreml]'."
            ) from error


def _type(value_type: Any) -> Type:
    if value_type.WhichOneof("type") != "tensorType":
        return Type(value_type.WhichOneof("type") or "nothing", ())
    tensor = value_type.tensorType
    sizes = tuple(
        d.constant.size if d.WhichOneof("dimension") == "constant" else None
        for d in tensor.dimensions
    )
    return Type(_proto("MIL_pb2").DataType.Name(tensor.dataType), sizes)


def _sizes(feature: Any) -> list[tuple[int, int]]:
    """Return the smallest and largest size of an input along every axis."""
    array = feature.type.multiArrayType
    flexible = array.WhichOneof("ShapeFlexibility")
    if flexible == "shapeRange":
        ranges = array.shapeRange.sizeRanges
        return [
            (r.lowerBound, r.upperBound if r.upperBound >= 0 else sys.maxsize)
            for r in ranges
        ]
    shapes = [array.shape]
    if flexible == "enumeratedShapes":
        shapes = [s.shape for s in array.enumeratedShapes.shapes]
    return [(min(sizes), max(sizes)) for sizes in zip(*shapes, strict=True)]


def _constexpr(step: Step) -> Any:
    name, declared = step.outputs[0]
    try:
        weight = CONSTEXPR[step.kind](**step.arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{step.kind} {name!r} is wrong: {error}.") from error
    declared.check(np.broadcast_to(np.zeros((), weight.dtype), weight.shape), name)
    return weight


def _resolve(argument: Any, values: Mapping[str, Array]) -> Any:
    if isinstance(argument, Name):
        return values[argument.name]
    if isinstance(argument, list):
        return [_resolve(a, values) for a in argument]
    return argument


def _mark_last_uses(steps: list[Step], outputs: list[str]) -> None:
    """Note at which step each value is needed for the last time."""
    seen = set(outputs)
    for step in reversed(steps):
        used = [name for name, _ in step.outputs]
        for argument in step.arguments.values():
            parts = argument if isinstance(argument, list) else [argument]
            used += [part.name for part in parts if isinstance(part, Name)]
        step.last_used = [name for name in dict.fromkeys(used) if name not in seen]
        seen.update(used)
