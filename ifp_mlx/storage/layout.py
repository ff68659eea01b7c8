"""The channel file: a header that checks itself, then one record per unit of channels.

    8 bytes   magic
    4         version, little-endian as all numbers here
    8         size of what the digest covers
    32        SHA-256 of that
    ...       8 bytes size of a JSON text, the text; for each layer the order of the
              units (uint32, units in the order in which they lie) and the CRC-32 of all
              records up to and with each (uint32); zeros up to a multiple of 4096
    ...       the records, layer by layer, nothing between them

A unit is as many channels as are always selected together, mostly one, or an expert.
Its record holds every part of it, one after another: what the plan of slices names,
such as gate rows, up rows and down columns, and their scales and biases where they are
quantised. All records of a layer have one size.
"""

import hashlib
import json
import math
import os
import struct
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from ..files.tensors import Tensor

CHANNEL_FILE = "channels.bin"
MAGIC = b"IFPchan\n"
VERSION = 3  # version 2, whose parts have no repeat, can still be read
ALIGNMENT = 4096
START = struct.Struct("<8sIQ32s")
AGAIN = "make the store again with python -m ifp_mlx.channel_store"

# For safetensors' names of the dtypes of FFN weights: MLX's name, bytes.
DTYPES = {
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "U32": ("uint32", 4),
    "U8": ("uint8", 1),
}
WORDS = {4: np.uint32, 2: np.uint16, 1: np.uint8}


def lies_as(tensor: Tensor, used: mx.array) -> bool:
    """Whether a file's tensor has the type and the shape in which a model uses it."""
    name, _ = DTYPES.get(tensor.dtype, ("", 0))
    return (name, tensor.shape) == (
        str(used.dtype).removeprefix("mlx.core."),
        used.shape,
    )


@dataclass(frozen=True)
class Part:
    """One tensor of a layer along which units lie, as records hold it.

    Attributes:
        name: its name in the safetensors files and in the model.
        dtype: in safetensors' words.
        shape: of the dense tensor.
        axis: where its units lie: 0 is rows, 1 is columns.
        repeat: blocks of rows, each with a piece of every unit.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    axis: int
    repeat: int = 1

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return DTYPES[self.dtype][1]

    def unit_bytes(self, units: int) -> int:
        """Return the bytes of one unit; the dense tensor has ``units`` of them."""
        return math.prod(self.shape) * self.itemsize // units

    def split(self, tensor: np.ndarray, units: int, dense_units: int) -> np.ndarray:
        """View a contiguous tensor unit by unit.

        Args:
            tensor: its bytes, uint8; of the dense tensor or of some of its units.
            units: how many are in it.
            dense_units: how many are in the dense tensor.

        Returns:
            ``[units, a, b]``, or with several blocks ``[units, repeat, a, b]``; what is
            written into it is written into ``tensor``.
        """
        words = tensor.view(WORDS[self.itemsize])
        if self.axis == 0:
            rows = self.shape[0] // dense_units // self.repeat
            blocks = words.reshape(self.repeat, units, rows, -1)
            return blocks[0] if self.repeat == 1 else blocks.transpose(1, 0, 2, 3)
        columns = self.shape[1] // dense_units
        return words.reshape(self.shape[0], units, columns).transpose(1, 0, 2)

    def sliced_shape(self, units: int, dense_units: int) -> tuple[int, ...]:
        """Return the shape of the tensor with only this many units."""
        shape = list(self.shape)
        shape[self.axis] = shape[self.axis] // dense_units * units
        return tuple(shape)


@dataclass(frozen=True)
class Layout:
    """What the header says.

    Attributes:
        channels: ``F``, or experts ``E``.
        unit: how many of them are in a record.
        parts: for each of ``L`` layers, what a record is made of.
        files: the header of each safetensors file of the folder it was made from.
        core: :func:`tensors.digest_of` the tensors that are not in the channel file.
        order: uint32 ``[L, F / unit]``, the unit at each place on disk.
        checksums: uint32 ``[L, F / unit]``, CRC-32 of a layer's records up to and with
            each place: going on from one of them, any range is checked in one call.
        header_bytes: bytes before the first record of the file that was read; an older
            version's header has another length.
    """

    channels: int
    unit: int
    parts: tuple[tuple[Part, ...], ...]
    files: dict[str, str] = field(repr=False)
    core: str
    order: np.ndarray = field(repr=False)
    checksums: np.ndarray = field(repr=False)
    header_bytes: int | None = None

    @property
    def layers(self) -> int:
        """``L``."""
        return len(self.parts)

    @property
    def units(self) -> int:
        """Records in a layer."""
        return self.channels // self.unit

    @cached_property
    def record_bytes(self) -> list[int]:
        """Bytes of a record of each layer."""
        return [sum(p.unit_bytes(self.units) for p in layer) for layer in self.parts]

    @cached_property
    def places(self) -> np.ndarray:
        """int64 ``[L, F / unit]``: where on disk, counted in records, each unit lies."""
        return np.argsort(self.order, axis=1)

    @cached_property
    def layer_offsets(self) -> list[int]:
        """Where each layer's first record begins in the file, and where the last ends."""
        sizes = np.array(self.record_bytes, dtype=np.int64) * self.units
        ends = self.data_offset + np.cumsum(sizes)
        return [self.data_offset, *map(int, ends)]

    @cached_property
    def data_offset(self) -> int:
        """Where the first record begins."""
        return self.header_bytes or START.size + len(self._covered())

    def fields(self, layer: int) -> list[tuple[Part, int]]:
        """Return the parts of a layer's records, and where in a record each begins."""
        fields, offset = [], 0
        for part in self.parts[layer]:
            fields.append((part, offset))
            offset += part.unit_bytes(self.units)
        return fields

    def pack(self) -> bytes:
        """Return the file's first bytes, up to the first record."""
        covered = self._covered()
        digest = hashlib.sha256(covered).digest()
        return START.pack(MAGIC, VERSION, len(covered), digest) + covered

    def _covered(self) -> bytes:
        about = {
            "channels": self.channels,
            "unit": self.unit,
            "layers": [[asdict(part) for part in layer] for layer in self.parts],
            "files": self.files,
            "core": self.core,
        }
        text = json.dumps(about, separators=(",", ":")).encode()
        tables = self.order.astype("<u4"), self.checksums.astype("<u4")
        covered = len(text).to_bytes(8, "little") + text
        covered += b"".join(table.tobytes() for table in tables)
        return covered + bytes(-(START.size + len(covered)) % ALIGNMENT)


def read_layout(path: Path) -> Layout:
    """Read and check the header of a channel file; no record is read.

    Raises:
        ValueError: if the file is damaged, cut short, or of another version.
    """
    with path.open("rb") as file:
        layout = _parse(path, _covered_bytes(path, file))
        size = os.fstat(file.fileno()).st_size
    if size != layout.layer_offsets[-1]:
        raise ValueError(
            f"{path} has {size} bytes, but its header says {layout.layer_offsets[-1]}; "
            f"copy it again, or {AGAIN}."
        )
    return layout


def _covered_bytes(path: Path, file: BinaryIO) -> bytes:
    start = file.read(START.size)
    if len(start) < START.size or not start.startswith(MAGIC):
        raise ValueError(f"{path} is not a channel store, or is damaged; {AGAIN}.")
    _, version, size, digest = START.unpack(start)
    if version not in (2, VERSION):
        raise ValueError(
            f"{path} has version {version}, and this ifp_mlx reads version {VERSION}; "
            f"update ifp_mlx, or {AGAIN}."
        )
    if size <= os.fstat(file.fileno()).st_size:  # before that much is allocated
        covered = file.read(size)
        if hashlib.sha256(covered).digest() == digest:
            return covered
    raise ValueError(f"{path} is damaged: its header fails its checksum; {AGAIN}.")


def _parse(path: Path, covered: bytes) -> Layout:
    try:
        size = int.from_bytes(covered[:8], "little")
        about = json.loads(covered[8 : 8 + size])
        tables = np.frombuffer(covered[8 + size :], np.uint8)
        layout = _layout(about, tables, START.size + len(covered))
        fits = layout.data_offset % ALIGNMENT == 0
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{path} has a header of nonsense ({error!r}).") from error
    steps = np.arange(layout.units)
    if not fits or not (np.sort(layout.order, axis=1) == steps).all():
        raise ValueError(f"{path} has a header that contradicts itself; {AGAIN}.")
    return layout


def _layout(about: dict[str, Any], tables: np.ndarray, header_bytes: int) -> Layout:
    layers = tuple(tuple(_part(part) for part in layer) for layer in about["layers"])
    units = about["channels"] // about["unit"]
    count = len(layers) * units
    words = tables[: 2 * 4 * count].view("<u4").reshape(2, len(layers), units)
    return Layout(
        channels=about["channels"],
        unit=about["unit"],
        parts=layers,
        files=about["files"],
        core=about["core"],
        order=words[0],
        checksums=words[1],
        header_bytes=header_bytes,
    )


def _part(about: dict[str, Any]) -> Part:
    known = {name: about[name] for name in ("name", "dtype", "axis")}
    return Part(**known, shape=tuple(about["shape"]), repeat=about.get("repeat", 1))


def units_of(channels: np.ndarray, size: int) -> np.ndarray:
    """Return the units of ``size`` channels in which sorted channels lie."""
    units = channels // size
    return units[np.diff(units, prepend=-1) > 0]
