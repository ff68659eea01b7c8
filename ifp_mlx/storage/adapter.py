"""An adapter that mlx_lm.lora trained on the dense model, fused into it as it is read.

The adapted model is an ordinary one: mlx-lm's own ``fuse`` adds the adapter to the
weights before anything else sees them, each weight when it is read. So the adapted
model selects, is sliced and checks, and its layers are still read one at a time.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..files.objects import read_object
from ..slicing.shapes import LayerPlan, Slice, at, put_at
from ..slicing.sliced import elements, is_column, tensors_along
from ..slicing.stock import unmoved_random_state

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
KINDS = ("lora", "dora", "full")
LEAVES = ("lora_a", "lora_b", "m")  # of a layer, in mlx-lm's words
AGAIN = "train it with mlx_lm.lora, or copy the whole folder again"


class Adapter:
    """An adapter's folder, as ``mlx_lm.lora`` writes it, checked.

    Args:
        folder: has adapter_config.json and adapters.safetensors.

    Attributes:
        folder: of it.
        kind: ``lora``, ``dora`` or ``full``.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if it is not mlx-lm's, is damaged, or has code in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._config = _read_config(folder)
        self.kind: str = self._config.get("fine_tune_type", "lora")
        if self.kind not in KINDS:
            raise ValueError(
                f"fine_tune_type={self.kind!r} in {folder / CONFIG} is unknown; use an "
                f"adapter that is one of {', '.join(KINDS)}."
            )
        if self.kind != "full":
            self._check_numbers()
        self._state = self._state_now()
        self._weights = _read_weights(folder / WEIGHTS)

    @cached_property
    def digest(self) -> str:
        """12 hex digits that tell it from other adapters: a hash of both its files."""
        found = hashlib.sha256(json.dumps(self._config, sort_keys=True).encode())
        with (self.folder / WEIGHTS).open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
        return found.hexdigest()[:12]

    def fuse(self, model: nn.Module, path: Path) -> set[str]:
        """Fuse it into a dense model, in place; no weight is read now.

        Args:
            model: mlx-lm's, its weights still on disk.
            path: of its folder, to be named.

        Returns:
            The names of the parameters that now differ from the model's files.

        Raises:
            OSError: if its files have changed.
            ValueError: if it was trained on another model.
        """
        from mlx_lm.tuner.utils import load_adapters

        self._check_unchanged()
        before = tree_flatten(model.parameters(), destination={})
        with unmoved_random_state(), self._fitting(path):
            load_adapters(model, str(self.folder))
            self._check_complete(model)
            fused = [(n, m.fuse()) for n, m in model.named_modules() if _fuses(m)]
            model.update_modules(tree_unflatten(fused))
        after = tree_flatten(model.parameters(), destination={})
        return {name for name, w in after.items() if before.get(name) is not w}

    def fuse_units(
        self,
        module: nn.Module,
        layer: LayerPlan,
        units: int,
        index: mx.array | None = None,
    ) -> None:
        """Fuse it into a layer of which some units were read, in place.

        Args:
            module: the layer's.
            layer: the plan of what was read.
            units: how many the dense layer has.
            index: int32 ``[k]``, those it holds; ``None`` is all of them.
        """
        self._check_unchanged()
        for piece in layer.slices:
            path = ".".join(filter(None, (layer.path, piece.module)))
            rows = None if index is None else elements(piece, index, units)
            if self.kind == "full":
                self._replace(module, piece, path, rows)
            elif f"{path}.lora_a" in self._weights:
                self._fuse_piece(module, piece, path, rows)

    def check_unit_by_unit(self, layer: LayerPlan, module: nn.Module) -> None:
        """Raise ``ValueError`` if units of a layer cannot be fused without the others:
        DoRA scales each row of weights by a number that depends on the whole row, and
        each row of the inlet has a weight for every channel.
        """
        path = ".".join(filter(None, (layer.path, layer.inlet)))
        columns = any(
            p.module == layer.inlet and is_column(module, p) for p in layer.slices
        )
        if self.kind == "dora" and columns and f"{path}.m" in self._weights:
            raise ValueError(
                f"The DoRA adapter {self.folder} scales each row of {path} by all "
                "channels, and not all are read from a channel store; use the plain folder "
                "of this model, or make a store of what mlx_lm.fuse writes."
            )

    def _fuse_piece(
        self, module: nn.Module, piece: Slice, path: str, rows: mx.array | None
    ) -> None:
        from mlx_lm.tuner.utils import linear_to_lora_layers

        holder = nn.Module()
        holder.layers = [module]
        numbers = self._config["lora_parameters"] | {"keys": {piece.module}}
        dora = self.kind == "dora"
        dense = at(module, piece.module)
        columns = is_column(module, piece)
        with unmoved_random_state():
            linear_to_lora_layers(holder, 1, numbers, use_dora=dora)
            lora = at(module, piece.module)
            for name in LEAVES:
                if (w := self._weights.get(f"{path}.{name}")) is not None:
                    lora[name] = _some(w, name, rows, columns)
            put_at(module, piece.module, lora.fuse())
        for name in tensors_along(dense, piece):
            mx.eval(at(module, piece.module)[name])

    def _replace(
        self, module: nn.Module, piece: Slice, path: str, rows: mx.array | None
    ) -> None:
        home = at(module, piece.module)
        for name in tensors_along(home, piece):
            if (w := self._weights.get(f"{path}.{name}")) is not None:
                home[name] = w if rows is None else mx.take(w, rows, axis=piece.axis)
                mx.eval(home[name])

    def _state_now(self) -> list[tuple[int, ...]]:
        abouts = [(self.folder / name).stat() for name in (CONFIG, WEIGHTS)]
        return [(about.st_ino, about.st_size, about.st_mtime_ns) for about in abouts]

    def _check_unchanged(self) -> None:
        """Refuse to mix two adapters: mlx-lm reads the files again for each
        ``fuse``.
        """
        if self._state_now() != self._state:
            raise OSError(
                f"The adapter {self.folder} has changed since the model was opened; open "
                "it again."
            )

    def _check_numbers(self) -> None:
        about = self._config.get("lora_parameters")
        numbers = about if isinstance(about, dict) else {}
        rank, layers = numbers.get("rank"), self._config.get("num_layers")
        floats = (numbers.get("scale"), numbers.get("dropout"))
        whole = type(rank) is int and rank > 0 and type(layers) is int
        if not (whole and all(map(_is_number, floats))):
            raise ValueError(
                f"{self.folder / CONFIG} does not say num_layers, and rank, scale and "
                f"dropout in lora_parameters, as mlx_lm.lora does; {AGAIN}."
            )

    def _check_complete(self, model: nn.Module) -> None:
        for name, _ in tree_flatten(model.parameters()):
            mine = name.rpartition(".")[2] in LEAVES
            if self.kind != "full" and mine and name not in self._weights:
                raise ValueError(f"{name} is missing in {WEIGHTS}")

    @contextmanager
    def _fitting(self, path: Path) -> Iterator[None]:
        try:
            yield
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            lines = str(error).splitlines() or [type(error).__name__]
            reason = (lines[1:2] or lines)[
                0
            ].strip()  # mlx-lm's message is a list with a title
            raise ValueError(
                f"The adapter {self.folder} does not fit the model {path} ({reason}); use "
                "one that was trained on this model."
            ) from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _fuses(module: nn.Module) -> bool:
    return hasattr(module, "fuse")


def _some(w: mx.array, name: str, rows: mx.array | None, columns: bool) -> mx.array:
    """Return the part of an adapter's tensor that belongs to some rows, or columns, of
    the weight; of a stack, to some experts, for which both tensors have rows.
    """
    if rows is None:
        return w
    if w.ndim == 3:
        return mx.take(w, rows, axis=0)
    if columns:
        return mx.take(w, rows, axis=0) if name == "lora_a" else w
    return w if name == "lora_a" else mx.take(w, rows, axis=-1)


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no adapter folder {folder}; give the one that mlx_lm.lora wrote."
        )
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} is missing, so {folder} is no adapter of mlx_lm.lora; "
                f"{AGAIN}."
            )
    config = read_object(folder / CONFIG)
    code = [
        *folder.glob("*.py"),
        *(k for k in ("model_file", "trust_remote_code") if config.get(k)),
    ]
    if code:
        raise ValueError(
            f"{code[0]} in the adapter {folder} is code, which is never run from there; "
            "use a folder with the adapter alone."
        )
    return config


def _read_weights(file: Path) -> dict[str, mx.array]:
    try:
        found: Any = mx.load(str(file))
    except RuntimeError as error:
        raise ValueError(f"{file} is damaged ({error}); {AGAIN}.") from error
    if not found:
        raise ValueError(f"{file} holds nothing; {AGAIN}.")
    for name, tensor in found.items():
        packed = tensor.dtype == mx.uint32 and name.endswith(".weight")
        if not (packed or mx.issubdtype(tensor.dtype, mx.floating)):
            raise ValueError(
                f"{name} in {file} is {tensor.dtype}, and an adapter's numbers are floats; "
                f"{AGAIN}."
            )
    return dict(found)
