"""Reads chosen units of an ordinary folder; where they are columns, the whole tensor.

A unit's part of a tensor is a row of it, or several: one expert of a stack, one row of
``gate_proj``. A channel's part of ``down_proj`` is a column, which does not lie in one
piece: such a tensor is read whole, and its columns are taken.
"""

import os
import time
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
from ..slicing.shapes import LayerPlan, Plan, Slice, at, is_quantised
from ..slicing.sliced import Donor, cut, elements, tensors_along
from .arriving import bytes_of
from .device import Device, Range, pieces, plan
from .layout import DTYPES, lies_as
from .ranges import OpenFile
from .units import PIECE_BYTES, UnitReader, Wanted


class Filed(NamedTuple):
    """A tensor of a layer along which units lie, in a file.

    Attributes:
        name: in the model.
        piece: how they lie: along its first axis, or a matrix's second.
        tensor: where it is.
    """

    name: str
    piece: Slice
    tensor: Tensor

    @property
    def row_bytes(self) -> int:
        """Bytes of one element of the first axis."""
        return self.tensor.nbytes // self.tensor.shape[0]

    def empty(self, count: int) -> mx.array:
        """Return such a tensor with this many elements along the axis, all zero."""
        shape = list(self.tensor.shape)
        shape[self.piece.axis] = count
        return mx.zeros(shape, getattr(mx, DTYPES[self.tensor.dtype][0]))


class PlainReader(UnitReader):
    """Reads units from where they lie in the files of a folder.

    A file is open only while a layer of it is read: a folder may have more files than a
    process may have open. A tensor that is in no file as the model uses it, or whose
    quantisation groups lie across units, is cut in memory, as :func:`cut` does.

    Args:
        plan: of the model.
        model: the model; no weight of it is read.
        tensors: where the parameters are that a file holds as the model uses them, by
            their names in the model.
        device: see :class:`UnitReader`.
    """

    def __init__(
        self,
        plan: Plan,
        model: nn.Module,
        tensors: Mapping[str, Tensor],
        device: Device | None = None,
    ) -> None:
        super().__init__(plan, device)
        self._filed: list[list[Filed]] = []
        self._rest: list[LayerPlan] = []
        for layer in plan.layers:
            found = {s: _filed(model, layer, s, tensors) for s in layer.slices}
            self._filed.append([filed for some in found.values() for filed in some])
            rest = tuple(piece for piece, some in found.items() if not some)
            self._rest.append(replace(layer, slices=rest))
        files = {tensor.file for tensor in tensors.values()}
        self._states = {file: _state(file.stat()) for file in files}

    @property
    def reads_all(self) -> bool:
        """See :attr:`UnitReader.reads_all`."""
        return not any(rest.slices for rest in self._rest)

    def _begin(self, wanted: Wanted) -> Future[dict[str, mx.array]]:
        _, layer, index, donor = wanted
        filed, units = self._filed[layer], self.plan.units
        index = mx.arange(units) if index is None else index
        places = [_places(one, index, units) for one in filed]
        arrays = [one.empty(len(p)) for one, p in zip(filed, places, strict=True)]
        views, held = bytes_of(arrays), self._held(filed, layer, donor)
        files = {file: self._opened(file) for file in {f.tensor.file for f in filed}}
        jobs: list[Future] = []
        for one, wants, view, has in zip(filed, places, views, held, strict=True):
            file = files[one.tensor.file]
            if one.piece.axis == 0:
                into = view.reshape(len(wants), one.row_bytes)
                jobs += self._fill_rows(file, one, wants, into, has)
            elif len(wants):
                jobs.append(
                    self._threads.submit(self._take_columns, file, one, wants, view)
                )
        named = {one.name: array for one, array in zip(filed, arrays, strict=True)}
        return self._threads.submit(self._complete, named, jobs)

    def _fill_rows(
        self,
        file: OpenFile,
        filed: Filed,
        rows: np.ndarray,
        into: np.ndarray,
        held: tuple[np.ndarray, np.ndarray] | None,
    ) -> Iterator[Future]:
        """Start copying the rows of a tensor that a donor has, and reading the others."""
        given = np.zeros(len(rows), bool)
        if held is not None:
            has, old = held
            given = np.isin(rows, has)
            source, copied = np.searchsorted(has, rows[given]), np.flatnonzero(given)
            yield self._threads.submit(_copy, old, source, into, copied)
        yield from self._read(file, filed, rows, np.flatnonzero(~given), into)

    def _take_columns(
        self, file: OpenFile, filed: Filed, columns: np.ndarray, view: np.ndarray
    ) -> int:
        """Read a whole matrix, and put some of its columns into ``view``; return the bytes
        read. A part of its rows is in memory at a time.
        """
        rows, size = filed.tensor.shape[0], filed.row_bytes
        word = np.dtype(f"u{DTYPES[filed.tensor.dtype][1]}")
        into = view.view(word).reshape(rows, len(columns))
        step = max(1, PIECE_BYTES // size)
        for first in range(0, rows, step):
            part = self._buffer(min(step, rows - first) * size)
            began = time.perf_counter()
            file.read(file.sweeps, [part], filed.tensor.offset + first * size)
            self.throttle(part.size, began)
            some = into[first : first + step]
            # "raise" would make a copy first.
            np.take(part.view(word).reshape(len(some), -1), columns, 1, some, "clip")
        self.bytes_wanted += into.nbytes
        return filed.tensor.nbytes

    def _held(
        self, filed: list[Filed], layer: int, donor: Donor | None
    ) -> list[tuple[np.ndarray, np.ndarray] | None]:
        """Return for each tensor the rows that a donor has, and their bytes."""
        if donor is None:
            return [None] * len(filed)
        homes = [self._home(donor.module, layer, one.name) for one in filed]
        views = bytes_of([home[tensor] for home, tensor in homes])
        found: list[tuple[np.ndarray, np.ndarray] | None] = []
        for one, view in zip(filed, views, strict=True):
            rows = _places(one, donor.units, self.plan.units)
            by_row = one.piece.axis == 0
            found.append((rows, view.reshape(len(rows), -1)) if by_row else None)
        return found

    def check_unchanged(self) -> None:
        """See :meth:`UnitReader.check_unchanged`."""
        for file in self._states:
            self._check_state(file, file.stat())

    def _check_state(self, file: Path, about: os.stat_result) -> None:
        if _state(about) != self._states[file]:
            raise OSError(
                f"{file} has changed since the model was opened; open it again."
            )

    def _opened(self, file: Path) -> OpenFile:
        opened = OpenFile(file, "fetch or convert the model again")
        self._check_state(file, os.fstat(opened.ranges))
        return opened

    def _read(
        self,
        file: OpenFile,
        filed: Filed,
        rows: np.ndarray,
        missing: np.ndarray,
        into: np.ndarray,
    ) -> Iterator[Future[int]]:
        """Start reading ``rows[missing]`` of a tensor into ``into[missing]``."""
        places, size = rows[missing], filed.row_bytes
        start = filed.tensor.offset
        device = self._device(file, start + places * size)
        ranges = plan(places, size, filed.tensor.shape[0], device)
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
        """Read some ranges of places straight to ``into[numbers]``, and the gaps
        between them into an unused buffer; return the bytes read.
        """
        size = into.shape[1]
        spans = [(int(places[a]), int(places[b - 1]) + 1) for a, b in group]
        if fd == file.ranges:
            file.announce((start + a * size, (b - a) * size) for a, b in spans)
        nbytes, began = 0, time.perf_counter()
        for (a, b), (first, _) in zip(group, spans, strict=True):
            buffers, end = [], first
            for i, j in _runs(places[a:b]):
                if gap := int(places[a + i]) - end:
                    buffers.append(self._buffer(gap * size))
                to = int(numbers[a + i])
                buffers.append(into[to : to + j - i].reshape(-1))
                end = int(places[a + j - 1]) + 1
            nbytes += file.read(fd, buffers, start + first * size)
        self.throttle(nbytes, began)
        return nbytes

    def _complete(
        self, arrays: dict[str, mx.array], jobs: list[Future]
    ) -> dict[str, mx.array]:
        """Wait for all of a layer's jobs, which were given to the threads before."""
        wait(jobs)  # all of them, also after an error
        self._count(sum(job.result() or 0 for job in jobs))
        return arrays

    def _cut(self, wanted: Wanted) -> None:
        if wanted.units is not None:
            rest = self._rest[wanted.layer]
            for piece in rest.slices:  # these tensors were read whole
                home = at(wanted.module, piece.module)
                names = tensors_along(home, piece)
                nbytes = sum(home[name].nbytes for name in names)
                self._count(nbytes)
                self.throttle(nbytes, time.perf_counter())
            cut(wanted.module, rest, wanted.units, self.plan.units)


def _filed(
    model: nn.Module, layer: LayerPlan, piece: Slice, tensors: Mapping[str, Tensor]
) -> list[Filed]:
    """Return the tensors along a slice if all of them can be read from their files."""
    path = ".".join(filter(None, (layer.path, piece.module)))
    home = at(model, path)
    names = tensors_along(home, piece)
    found = [(name, tensors.get(f"{path}.{name}")) for name in names]
    matrix = piece.axis == 1 == len(found) and home[piece.tensor].ndim == 2
    readable = piece.axis == 0 or (matrix and not is_quantised(home))
    if not readable or not all(t and lies_as(t, home[n]) for n, t in found):
        return []
    return [Filed(f"{path}.{name}", piece, t) for name, t in found if t]


def _places(filed: Filed, index: mx.array, units: int) -> np.ndarray:
    """Return where some units are along their axis of the dense tensor, int64, sorted."""
    return np.array(elements(filed.piece, index, units)).astype(np.int64)


def _copy(
    old: np.ndarray, source: np.ndarray, into: np.ndarray, numbers: np.ndarray
) -> None:
    """Put ``old[source]`` into ``into[numbers]``."""
    for at_, to in zip(source.tolist(), numbers.tolist(), strict=True):
        into[to] = old[at_]


def _runs(places: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield start and end of each run of adjacent ones among sorted places."""
    edges = np.flatnonzero(np.diff(places) != 1) + 1
    yield from zip([0, *edges.tolist()], [*edges.tolist(), len(places)], strict=True)


def _state(about: os.stat_result) -> tuple[int, ...]:
    """Return what changes if a file is replaced or written into."""
    return about.st_ino, about.st_size, about.st_mtime_ns
