"""Reads chosen channels of a channel file into arrays, and nothing else of it."""

import os
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..slicing.shapes import Plan, at
from ..slicing.sliced import Donor, cut, follow
from .arriving import ArrivingLayer
from .device import CACHED, Device, Range, device_of, pieces, plan
from .layout import AGAIN, Layout, read_layout, units_of

PIECE_BYTES = 2 << 20  # read and checked at a time: what still stays in the cache
THREADS = 4


class ChannelReader:
    """An open channel file.

    The file stays open: a store that is made anew under the same name meanwhile does
    not mix with it.

    Args:
        path: the channel file.
        plan: of the model whose units it holds.

    Attributes:
        layout: its header.
        bytes_read: bytes of records asked of the system so far, gaps included.
        bytes_wanted: bytes of the records that were needed.

    Raises:
        ValueError: as :func:`read_layout`.
    """

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path, self.plan = path, plan
        self.layout: Layout = read_layout(path)
        if (self.layout.layers, self.layout.channels) != plan.shape:
            raise ValueError(
                f"{path} holds {self.layout.layers} layers of {self.layout.channels} "
                f"units, and the model has {plan.shape[0]} of {plan.shape[1]}; {AGAIN}."
            )
        self._sweeps = os.open(path, os.O_RDONLY)
        self._ranges = os.open(path, os.O_RDONLY)
        self._disk: Device | None = None
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="channels")
        self._own = threading.local()
        self._spare: list[np.ndarray] = []
        self.bytes_read = self.bytes_wanted = 0
        if hasattr(os, "posix_fadvise"):  # reading ahead would read what nobody wants
            os.posix_fadvise(self._ranges, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        for fd in (getattr(self, "_sweeps", None), getattr(self, "_ranges", None)):
            if fd is not None:
                os.close(fd)

    def fill(
        self, module: nn.Module, layer: int, index: mx.array | None = None
    ) -> None:
        """Put a layer's units into its module, in place, once all of them are read.

        Args:
            module: the layer's.
            layer: its number.
            index: int32 ``[k]``, sorted; ``None`` is all units.

        Raises:
            ValueError: if a record is damaged, or a quantised ``down_proj`` would be
                cut inside a group.
            OSError: if the file cannot be read.
        """
        self._finish(module, layer, index, *self._begin(layer, index))
        self._spare.clear()

    def fill_all(
        self,
        modules: Sequence[nn.Module],
        indices: Sequence[mx.array] | None = None,
        donors: Sequence[Donor] | None = None,
    ) -> Iterator[int]:
        """Fill layer after layer as :meth:`fill` does, and yield the number of each;
        while one is put in place, the next is read.

        Args:
            modules: of all layers.
            indices: for each layer, as for :meth:`fill`.
            donors: for each layer, the same one filled before; the channels it has
                are copied.
        """
        none = [None] * len(modules)
        wanted = list(zip(indices or none, donors or none, strict=True))
        begun = self._begin(0, *wanted[0])
        try:
            for layer, module in enumerate(modules):
                current = begun
                if layer + 1 < len(modules):
                    begun = self._begin(layer + 1, *wanted[layer + 1])
                self._finish(module, layer, wanted[layer][0], *current)
                yield layer
        finally:
            wait([begun[1]])  # or it would write on after an error
            self._spare.clear()  # up to two layers' worth of memory

    def read(self, layer: int) -> dict[str, mx.array]:
        """Return a layer's dense tensors by name."""
        arriving, complete = self._begin(layer)
        complete.result()
        return arriving.tensors()

    def _begin(
        self, layer: int, index: mx.array | None = None, donor: Donor | None = None
    ) -> tuple[ArrivingLayer, Future]:
        """Start reading a layer's channels; the future is done when they are there."""
        units = np.arange(self.layout.units)
        if index is not None:
            units = units_of(np.array(index), self.layout.unit)
        scratch = self._spare.pop() if self._spare else None
        arriving = ArrivingLayer(
            self.layout, layer, units, self._held_by(donor, layer), scratch
        )
        places = self.layout.places[layer][arriving.missing]
        numbers = np.argsort(places)
        places = places[numbers]
        size = self.layout.record_bytes[layer]
        ranges = plan(places, size, self.layout.units, self._device(layer, places))
        fd = self._sweeps if len(ranges) == 1 else self._ranges
        jobs = [
            self._threads.submit(
                self._move, fd, layer, group, places, numbers, arriving
            )
            for group in pieces(ranges, places, PIECE_BYTES // size)
        ]
        self.bytes_wanted += len(places) * size
        return arriving, self._threads.submit(self._complete, arriving, jobs)

    def _complete(self, arriving: ArrivingLayer, jobs: list[Future]) -> None:
        """Wait for all of a layer's jobs, which were given to the threads before."""
        wait(jobs)  # also those that outlive an error
        self.bytes_read += sum(job.result() for job in jobs)
        arriving.complete()
        self._spare.append(arriving.scratch)

    def _held_by(
        self, donor: Donor | None, layer: int
    ) -> tuple[list[mx.array], np.ndarray] | None:
        """Return a donor's tensors, part by part, and its channels."""
        if donor is None:
            return None
        parts = self.layout.parts[layer]
        tensors = [self._home(donor.module, layer, p.name) for p in parts]
        return [home[tensor] for home, tensor in tensors], np.array(donor.units)

    def _home(self, module: nn.Module, layer: int, name: str) -> tuple[nn.Module, str]:
        """Return where in a layer's module a tensor of the file is, and as what."""
        inside = name.removeprefix(f"{self.plan.layers[layer].path}.")
        path, _, tensor = inside.rpartition(".")
        return at(module, path), tensor

    def _finish(
        self,
        module: nn.Module,
        layer: int,
        index: mx.array | None,
        arriving: ArrivingLayer,
        complete: Future,
    ) -> None:
        complete.result()
        for name, array in arriving.tensors().items():
            home, tensor = self._home(module, layer, name)
            home[tensor] = array
        if index is None:
            return
        channels, size = np.array(index), self.layout.unit
        held = (units_of(channels, size)[:, None] * size + np.arange(size)).ravel()
        within = mx.array(np.searchsorted(held, channels))
        cut(module, self.plan.layers[layer], within, held.size)
        follow(module, self.plan.layers[layer], channels.size)

    def _device(self, layer: int, places: np.ndarray) -> Device:
        """Return what reading costs: a disk, or the cache if some records are there."""
        nowait = getattr(os, "RWF_NOWAIT", None)
        if nowait is not None:
            sample = places[:: max(1, len(places) // 8)]
            start, byte = self.layout.layer_offsets[layer], bytearray(1)
            try:
                for place in sample:
                    offset = start + int(place) * self.layout.record_bytes[layer]
                    os.preadv(self._ranges, [byte], offset, nowait)
                return CACHED
            except OSError:  # not without waiting for the disk
                pass
        if self._disk is None:
            self._disk = device_of(self._ranges, self._read_anywhere)
        return self._disk

    def _announce(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Have the system fetch ranges, offset and bytes each, before they are read:
        it has many under way at a time, at less cost than calls that wait.
        """
        if hasattr(os, "posix_fadvise"):
            for offset, nbytes in ranges:
                os.posix_fadvise(self._ranges, offset, nbytes, os.POSIX_FADV_WILLNEED)

    def _read_anywhere(self, ranges: list[tuple[int, int]]) -> None:
        """Read ranges, offset and bytes each, for the time it takes."""

        def read(offset: int, nbytes: int) -> None:
            os.preadv(self._ranges, [bytearray(nbytes)], offset)

        self._announce(ranges)
        wait([self._threads.submit(read, *item) for item in ranges])

    def _move(
        self,
        fd: int,
        layer: int,
        group: list[Range],
        places: np.ndarray,
        numbers: np.ndarray,
        arriving: ArrivingLayer,
    ) -> int:
        """Read some ranges of places with what lies between, check it, and put the
        wanted records where they belong; return the bytes read.
        """
        size, start = self.layout.record_bytes[layer], self.layout.layer_offsets[layer]
        spans = [(int(places[a]), int(places[b - 1]) + 1) for a, b in group]
        buffer = self._buffer(sum(last - first for first, last in spans) * size)
        if fd is self._ranges:
            self._announce((start + a * size, (b - a) * size) for a, b in spans)
        at, wanted = 0, []
        for (a, b), (first, last) in zip(group, spans, strict=True):
            part = buffer[at * size : (at + last - first) * size]
            self._read_exactly(fd, part, start + first * size)
            self._check(layer, first, part)
            wanted.append(places[a:b] - first + at)
            at += last - first
        records = buffer.reshape(-1, size)
        index = slice(group[0].first, group[-1].last)
        if index.stop - index.start < at:
            records = records[np.concatenate(wanted)]
        arriving.put(numbers[index], records)
        return buffer.size

    def _buffer(self, nbytes: int) -> np.ndarray:
        """Return a buffer that the calling thread uses again for its next piece."""
        if getattr(self._own, "buffer", np.empty(0)).size < nbytes:
            self._own.buffer = np.empty(nbytes, np.uint8)
        return self._own.buffer[:nbytes]

    def _read_exactly(self, fd: int, buffer: np.ndarray, offset: int) -> None:
        left = buffer.data
        while left:
            got = os.preadv(fd, [left], offset)
            if got == 0:
                raise OSError(f"{self.path} was cut short while in use; {AGAIN}.")
            offset, left = offset + got, left[got:]

    def _check(self, layer: int, first: int, records: np.ndarray) -> None:
        """Check records that lie one after another, from the place ``first`` on."""
        sums, size = self.layout.checksums[layer], self.layout.record_bytes[layer]
        before = int(sums[first - 1]) if first else 0
        if zlib.crc32(records.data, before) == sums[first + records.size // size - 1]:
            return
        for place, record in enumerate(records.reshape(-1, size), first):
            before = zlib.crc32(record.data, before)
            if before != sums[place]:
                unit = int(self.layout.order[layer, place])
                raise ValueError(
                    f"{self.path} is damaged: the record of channel "
                    f"{unit * self.layout.unit} in layer {layer} fails its checksum; "
                    f"{AGAIN}."
                )
