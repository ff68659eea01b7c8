"""The weight file of a Core ML package, read where it lies.

Blobs are views of the mapped file, and quantised weights stay as they are stored:
``weight[rows]`` dequantises only those rows.
"""

import math
import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray

# MIL's type names: numpy's type, and the bits it takes in a file.
TYPES = {
    "BOOL": (np.bool_, 8),
    "FLOAT16": (np.float16, 16),
    "FLOAT32": (np.float32, 32),
    "FLOAT64": (np.float64, 64),
    "INT8": (np.int8, 8),
    "INT16": (np.int16, 16),
    "INT32": (np.int32, 32),
    "INT64": (np.int64, 64),
    "UINT8": (np.uint8, 8),
    "UINT16": (np.uint16, 16),
    "UINT32": (np.uint32, 32),
    "INT4": (np.int8, 4),
    "UINT1": (np.uint8, 1),
    "UINT2": (np.uint8, 2),
    "UINT3": (np.uint8, 3),
    "UINT4": (np.uint8, 4),
    "UINT6": (np.uint8, 6),
}
# The numbers of the types in a blob's own header, from 1 on.
BLOB_TYPES = (
    *("FLOAT16", "FLOAT32", "UINT8", "INT8", "BFLOAT16", "INT16", "UINT16", "INT4"),
    *("UINT1", "UINT2", "UINT4", "UINT3", "UINT6", "INT32", "UINT32"),
)
SENTINEL = 0xDEADBEEF
HEADER = struct.Struct("<IIQQ")  # sentinel, type, size in bytes, offset of the data


class BlobFile:
    """A weight.bin: a 64-byte header, then blobs, each after a header of 64 bytes.

    Args:
        path: the file.

    Raises:
        ValueError: if it is missing or not of this format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}.") from error
        if len(self._map) < 64 or struct.unpack_from("<I", self._map, 4) != (2,):
            raise ValueError(f"{path} is not a weight file of version 2.")

    def read(self, offset: int, kind: str, shape: tuple[int, ...]) -> Any:
        """Return the blob whose header is at ``offset``, as a view of the file.

        Args:
            offset: in bytes.
            kind: MIL's name of the type the program expects.
            shape: of the values.

        Raises:
            ValueError: if there is no such blob, or it is not of this size and type.
        """
        where = f"{self.path} at offset {offset}"
        if offset % 64 or offset + 64 > len(self._map):
            raise ValueError(
                f"{where} has no blob: the file has {len(self._map)} bytes."
            )
        sentinel, number, size, start = HEADER.unpack_from(self._map, offset)
        if sentinel != SENTINEL:
            raise ValueError(f"{where} has no blob: its header is missing.")
        found = BLOB_TYPES[number - 1] if 0 < number <= len(BLOB_TYPES) else number
        dtype, bits = TYPES[kind]
        expected = -(-math.prod(shape) * bits // 8)
        if (found, size) != (kind, expected):
            raise ValueError(
                f"{where} has {size} bytes of {found}, but the program expects "
                f"{expected} of {kind}."
            )
        if start + size > len(self._map):
            raise ValueError(
                f"{where} needs {start + size} bytes, but the file ends after "
                f"{len(self._map)}: it was cut off."
            )
        return view(np.frombuffer(self._map, np.uint8, size, start), kind, shape)

    def forget(self) -> None:
        """Let the pages that were read leave this process's memory."""
        self._map.madvise(mmap.MADV_DONTNEED)


def view(data: Array, kind: str, shape: tuple[int, ...]) -> Any:
    """Return stored bytes as an array, or as :class:`Packed` integers."""
    dtype, bits = TYPES[kind]
    if bits < 8:
        return Packed(data, shape, bits, signed=kind == "INT4")
    return data.view(dtype).reshape(shape)


def is_lazy(value: Any) -> bool:
    """Whether ``value`` is a weight that is dequantised row by row."""
    return isinstance(value, Packed | Blockwise | LookUp)


class Packed:
    """Integers of less than a byte, lowest bits first, as they lie in the file.

    Args:
        data: uint8, all bytes.
        shape: of the unpacked integers.
        bits: per integer, 1 to 6.
        signed: whether they are two's complement.
    """

    def __init__(
        self, data: Array, shape: tuple[int, ...], bits: int, *, signed: bool
    ) -> None:
        self.data, self.shape, self.bits = data, shape, bits
        self.dtype = np.dtype(np.int8 if signed else np.uint8)

    def __getitem__(self, rows: Any) -> Array:
        if math.prod(self.shape[1:]) * self.bits % 8:  # rows share bytes
            return self.__array__()[rows]
        return self._unpack(self.data.reshape(self.shape[0], -1)[rows], self.shape[1:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        whole = self._unpack(self.data[None], (math.prod(self.shape),))
        return whole.reshape(self.shape).astype(dtype or self.dtype)

    def _unpack(self, data: Array, shape: tuple[int, ...]) -> Array:
        lead, count = data.shape[:-1], math.prod(shape)
        if self.bits == 4:
            values = np.empty((*lead, data.shape[-1] * 2), np.uint8)
            values[..., 0::2], values[..., 1::2] = data & 15, data >> 4
        else:
            bits = np.unpackbits(data, axis=-1, bitorder="little")
            whole = bits.shape[-1] // self.bits
            bits = bits[..., : whole * self.bits].reshape(*lead, whole, self.bits)
            values = bits @ (1 << np.arange(self.bits, dtype=np.uint8))
        values = values[..., :count]
        if self.dtype == np.int8:
            half = 1 << (self.bits - 1)
            values = (values ^ half).astype(np.int8) - np.int8(half)
        return values.reshape(*lead, *shape)


class Blockwise:
    """``constexpr_blockwise_shift_scale``: scale * (data - offset), block by block."""

    def __init__(self, data: Any, scale: Any, offset: Any = None) -> None:
        self.data, self.scale, self.offset = data, scale, offset
        self.shape, self.dtype = data.shape, scale.dtype
        _check_blocks(data.shape, scale.shape)
        if offset is not None and offset.shape != scale.shape:
            raise ValueError(f"offset {offset.shape} is not like scale {scale.shape}")

    def __getitem__(self, rows: Any) -> Array:
        groups = np.arange(self.shape[0])[rows]
        groups = groups // (self.shape[0] // self.scale.shape[0])
        values = self.data[rows].astype(np.float32)
        scale = self.scale[groups].astype(np.float32)
        # [n, B1, b1, B2, b2, …]: one axis of blocks and one within them, per axis
        blocks = [
            size
            for whole, many in zip(values.shape[1:], scale.shape[1:], strict=True)
            for size in (many, whole // many)
        ]
        spread = [len(values), *(n for many in scale.shape[1:] for n in (many, 1))]
        blocked = values.reshape(len(values), *blocks)
        if self.offset is not None:
            blocked -= self.offset[groups].astype(np.float32).reshape(spread)
        blocked *= scale.reshape(spread)
        return values.astype(self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return self[:].astype(dtype or self.dtype)


class LookUp:
    """``constexpr_lut_to_dense`` with scalar entries: lut[block][index]."""

    def __init__(self, indices: Any, lut: Array, vector_axis: Any = None) -> None:
        *many, self.entries, vector = lut.shape
        if vector != 1:
            raise ValueError(f"look-up tables of vectors of {vector} are not supported")
        _check_blocks(indices.shape, tuple(many))
        self.indices, self.lut, self.many = indices, lut, tuple(many)
        self.shape, self.dtype = indices.shape, lut.dtype

    def __getitem__(self, rows: Any) -> Array:
        where: Any = self.indices[rows].astype(np.int64)
        stride = self.entries
        for axis in reversed(range(len(self.shape))):
            place = np.arange(self.shape[axis])
            place = (place if axis else place[rows]) // (
                self.shape[axis] // self.many[axis]
            )
            where += (place * stride).reshape(-1, *[1] * (len(self.shape) - axis - 1))
            stride *= self.many[axis]
        return np.asarray(self.lut).reshape(-1)[where]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return self[:].astype(dtype or self.dtype)


CONSTEXPR: dict[str, Callable[..., Any]] = {
    "constexpr_blockwise_shift_scale": Blockwise,
    "constexpr_lut_to_dense": LookUp,
}


def _check_blocks(shape: tuple[int, ...], many: tuple[int, ...]) -> None:
    if len(shape) != len(many) or any(s % m for s, m in zip(shape, many, strict=True)):
        raise ValueError(f"{many} blocks do not divide the shape {shape}")
