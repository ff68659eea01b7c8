"""Safetensors files as bytes: where each tensor lies, without reading it."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

COPY_BYTES = 8 << 20
SAMPLED_BYTES = 4096


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies.

    Attributes:
        file: the safetensors file.
        dtype: in the format's words, such as ``BF16``.
        shape: of the tensor.
        offset: of its first byte in the file.
        nbytes: its size.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def mapped(self) -> np.ndarray:
        """Return the tensor's bytes, uint8 ``[nbytes]``, read from disk as they are used."""
        return np.memmap(self.file, np.uint8, "r", self.offset, (self.nbytes,))


def header_of(file: Path) -> str:
    """Return the JSON at the start of a safetensors file, its padding included."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        return stream.read(size).decode()


def tensors_of(file: Path, header: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file in the order in which they lie.

    Args:
        file: the file; it has been checked before.
        header: of the original file, instead of its own.
    """
    header = header_of(file) if header is None else header
    start = 8 + len(header.encode())
    entries = json.loads(header)
    entries.pop("__metadata__", None)
    tensors = {
        name: Tensor(
            file,
            entry["dtype"],
            tuple(entry["shape"]),
            start + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in entries.items()
    }
    return dict(sorted(tensors.items(), key=lambda item: item[1].offset))


def weights_of(folder: Path) -> dict[str, Tensor]:
    """Return all the tensors of a model folder's safetensors files."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        found |= tensors_of(file)
    return found


def write_without(source: Path, target: Path, left_out: Iterable[str]) -> None:
    """Copy a safetensors file except for some of its tensors."""
    without = set(left_out)
    kept = {n: t for n, t in tensors_of(source).items() if n not in without}
    about = json.loads(header_of(source)).get("__metadata__")
    write_tensors(target, kept, about)


def write_tensors(
    target: Path, tensors: dict[str, Tensor], about: dict[str, str] | None = None
) -> None:
    """Write a safetensors file of tensors that lie in others, byte for byte.

    Args:
        target: the file to write.
        tensors: by name, in the order in which they are to lie.
        about: the file's metadata.
    """
    header: dict[str, Any] = {} if about is None else {"__metadata__": about}
    end = 0
    for name, tensor in tensors.items():
        place = [end, end := end + tensor.nbytes]
        entry = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": place}
        header[name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            copy_bytes(tensor, stream)


def equal_tensors(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same type, shape and bytes."""
    if (one.dtype, one.shape, one.nbytes) != (other.dtype, other.shape, other.nbytes):
        return False
    pieces = zip(_pieces(one), _pieces(other), strict=True)
    return all(piece == another for piece, another in pieces)


def copy_bytes(tensor: Tensor, stream: BinaryIO) -> None:
    """Append a tensor's bytes to a file, a few megabytes at a time."""
    for piece in _pieces(tensor):
        stream.write(piece)


def _pieces(tensor: Tensor) -> Iterator[bytes]:
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.offset)
        left = tensor.nbytes
        while left:
            piece = stream.read(min(left, COPY_BYTES))
            if not piece:
                raise OSError(f"{tensor.file} ends early; fetch the model again.")
            left -= len(piece)
            yield piece


def digest_of(tensors: dict[str, Tensor]) -> str:
    """Return a digest of the names, shapes and first bytes of some tensors, which tells
    them from others of the same names and shapes.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        with tensor.file.open("rb") as stream:
            stream.seek(tensor.offset)
            digest.update(stream.read(min(tensor.nbytes, SAMPLED_BYTES)))
    return digest.hexdigest()
