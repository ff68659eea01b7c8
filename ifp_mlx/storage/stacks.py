"""Reads chosen experts of an ordinary folder, and nothing else of their stacks.

What a model has of all its experts is one tensor in a safetensors file, ``[E, ...]``, so
that one expert's part of it is a piece of the file.
"""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..files.tensors import Tensor
from ..slicing.shapes import LayerPlan, Plan, Slice, at
from ..slicing.sliced import Donor, cut, elements, tensors_along
from .arriving import bytes_of
from .device import Range, pieces, plan
from .layout import DTYPES, lies_as
from .ranges import OpenFile
from .units import PIECE_BYTES, UnitReader, Wanted


class Stack(NamedTuple):
    """A tensor of a layer along whose first axis experts lie.

    Attributes:
        name: in the model.
        piece: how they lie.
        tensor: where it is.
    """

    name: str
    piece: Slice
    tensor: Tensor

    @property
    def row_bytes(self) -> int:
        """Bytes of one element of the first axis."""
        return self.tensor.nbytes // self.tensor.shape[0]

    def empty(self, rows: int) -> mx.array:
        """Return such a tensor with so many rows, all zero."""
        dtype = getattr(mx, DTYPES[self.tensor.dtype][0])
        return mx.zeros((rows, *self.tensor.shape[1:]), dtype)


class StackReader(UnitReader):
    """Reads experts from where they lie in the files of a folder.

    A file is open while a layer of it is read: a folder may have more files than a
    process may have open. A tensor that is in no file as the model uses it is cut in
    memory, as :func:`cut` does.

    Args:
        plan: of the model, whose units are experts.
        model: the model; no weight of it is read.
        tensors: where those of its parameters are that a file holds as they are, by
            name.
    """

    def __init__(
        self, plan: Plan, model: nn.Module, tensors: Mapping[str, Tensor]
    ) -> None:
        super().__init__(plan)
        self._stacks: list[list[Stack]] = []
        self._rest: list[LayerPlan] = []
        for layer in plan.layers:
            found = {s: _stacks(model, layer, s, tensors) for s in layer.slices}
            self._stacks.append([stack for some in found.values() for stack in some])
            rest = tuple(piece for piece, some in found.items() if not some)
            self._rest.append(replace(layer, slices=rest))
        files = {stack.tensor.file for some in self._stacks for stack in some}
        self._states = {file: _state(file.stat()) for file in files}

    def _begin(self, wanted: Wanted) -> Future[dict[str, mx.array]]:
        _, layer, index, donor = wanted
        stacks, units = self._stacks[layer], self.plan.units
        index = mx.arange(units) if index is None else index
        rows = [_rows(stack, index, units) for stack in stacks]
        arrays = [s.empty(len(r)) for s, r in zip(stacks, rows, strict=True)]
        views, held = bytes_of(arrays), self._held(stacks, layer, donor)
        files = {file: self._opened(file) for file in {s.tensor.file for s in stacks}}
        jobs: list[Future] = []
        for stack, wants, view, (has, old) in zip(
            stacks, rows, views, held, strict=True
        ):
            into = view.reshape(len(wants), stack.row_bytes)
            given = np.isin(wants, has)
            copied, source = np.flatnonzero(given), np.searchsorted(has, wants[given])
            jobs.append(self._threads.submit(_copy, old, source, into, copied))
            file = files[stack.tensor.file]
            jobs += self._read(file, stack, wants, np.flatnonzero(~given), into)
        named = {s.name: array for s, array in zip(stacks, arrays, strict=True)}
        return self._threads.submit(self._complete, named, jobs)

    def _held(
        self, stacks: list[Stack], layer: int, donor: Donor | None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return for each stack the rows that a donor has, and their bytes."""
        if donor is None:
            return [(np.empty(0, int), np.empty(0, np.uint8))] * len(stacks)
        homes = [self._home(donor.module, layer, stack.name) for stack in stacks]
        views = bytes_of([home[tensor] for home, tensor in homes])
        found = []
        for stack, view in zip(stacks, views, strict=True):
            rows = _rows(stack, donor.units, self.plan.units)
            found.append((rows, view.reshape(len(rows), stack.row_bytes)))
        return found

    def _opened(self, file: Path) -> OpenFile:
        opened = OpenFile(file, "fetch or convert the model again")
        if _state(os.fstat(opened.ranges)) != self._states[file]:
            raise OSError(
                f"{file} has changed since the model was opened; open it again."
            )
        return opened

    def _read(
        self,
        file: OpenFile,
        stack: Stack,
        rows: np.ndarray,
        missing: np.ndarray,
        into: np.ndarray,
    ) -> Iterator[Future[int]]:
        """Start reading ``rows[missing]`` of a stack's tensor into ``into[missing]``."""
        places, size = rows[missing], stack.row_bytes
        start = stack.tensor.offset
        device = self._device(file, start + places * size)
        ranges = plan(places, size, stack.tensor.shape[0], device)
        fd = file.sweeps if len(ranges) == 1 else file.ranges
        move = partial(self._move, file, fd, start, places, missing, into)
        self.bytes_wanted += places.size * size
        for group in pieces(ranges, places, PIECE_BYTES // size):
            yield self._threads.submit(move, group)

    def _move(
        self,
        file: OpenFile,
        fd: int,
        start: int,
        places: np.ndarray,
        numbers: np.ndarray,
        into: np.ndarray,
        group: list[Range],
    ) -> int:
        """Read some ranges of places straight to ``into[numbers]``, and what lies between
        to where nobody looks; return the bytes read.
        """
        size = into.shape[1]
        spans = [(int(places[a]), int(places[b - 1]) + 1) for a, b in group]
        if fd == file.ranges:
            file.announce((start + a * size, (b - a) * size) for a, b in spans)
        nbytes = 0
        for (a, b), (first, _) in zip(group, spans, strict=True):
            buffers, end = [], first
            for i, j in _runs(places[a:b]):
                if gap := int(places[a + i]) - end:
                    buffers.append(self._buffer(gap * size))
                to = int(numbers[a + i])
                buffers.append(into[to : to + j - i].reshape(-1))
                end = int(places[a + j - 1]) + 1
            nbytes += file.read(fd, buffers, start + first * size)
        return nbytes

    def _complete(
        self, arrays: dict[str, mx.array], jobs: list[Future]
    ) -> dict[str, mx.array]:
        """Wait for all of a layer's jobs, which were given to the threads before."""
        wait(jobs)  # also those that outlive an error
        self.bytes_read += sum(job.result() or 0 for job in jobs)
        return arrays

    def _cut(self, wanted: Wanted) -> None:
        if wanted.units is not None:
            rest = self._rest[wanted.layer]
            cut(wanted.module, rest, wanted.units, self.plan.units)


def _stacks(
    model: nn.Module, layer: LayerPlan, piece: Slice, tensors: Mapping[str, Tensor]
) -> list[Stack]:
    """Return the tensors along a slice if all of them can be read piece by piece."""
    path = ".".join(filter(None, (layer.path, piece.module)))
    home = at(model, path)
    names = tensors_along(home, piece)
    found = [(name, tensors.get(f"{path}.{name}")) for name in names]
    if piece.axis != 0 or not all(t and lies_as(t, home[n]) for n, t in found):
        return []
    return [Stack(f"{path}.{name}", piece, t) for name, t in found if t]


def _rows(stack: Stack, index: mx.array, units: int) -> np.ndarray:
    """Return the rows of some experts in the dense tensor, int64, sorted."""
    return np.array(elements(stack.piece, index, units)).astype(np.int64)


def _copy(
    old: np.ndarray, source: np.ndarray, into: np.ndarray, numbers: np.ndarray
) -> None:
    """Put ``old[source]`` into ``into[numbers]``."""
    for at_, to in zip(source.tolist(), numbers.tolist(), strict=True):
        into[to] = old[at_]


def _runs(places: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield from where to where sorted places lie side by side."""
    edges = np.flatnonzero(np.diff(places) != 1) + 1
    yield from zip([0, *edges.tolist()], [*edges.tolist(), len(places)], strict=True)


def _state(about: os.stat_result) -> tuple[int, ...]:
    """Return what tells a file from one that was put in its place, or written into."""
    return about.st_ino, about.st_size, about.st_mtime_ns
