"""Reads chosen units of a channel file, and gaps between them where that is faster."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from pathlib import Path

import mlx.core as mx
import numpy as np
from zlib_ng.zlib_ng import crc32

from ..slicing.shapes import Plan
from ..slicing.sliced import Donor, cut, follow
from .adapter import Adapter
from .arriving import ArrivingLayer
from .device import Device, Range, pieces, plan
from .layout import AGAIN, Layout, read_layout, units_of
from .ranges import OpenFile
from .units import PIECE_BYTES, UnitReader, Wanted


class ChannelReader(UnitReader):
    """An open channel file.

    The file stays open, so that a store made anew under the same name does not mix with
    it.

    Args:
        path: the channel file.
        plan: of the model whose units it holds.
        device: see :class:`UnitReader`.
        adapter: fused into the units that are read.

    Attributes:
        layout: its header.

    Raises:
        ValueError: as :func:`read_layout`.
    """

    def __init__(
        self,
        path: Path,
        plan: Plan,
        device: Device | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        super().__init__(plan, device)
        self.path, self._adapter = path, adapter
        self.layout: Layout = read_layout(path)
        if (self.layout.layers, self.layout.channels) != plan.shape:
            raise ValueError(
                f"{path} holds {self.layout.layers} layers of {self.layout.channels} "
                f"units, and the model has {plan.shape[0]} of {plan.shape[1]}; {AGAIN}."
            )
        self._file = OpenFile(path, AGAIN)
        self._spare: list[np.ndarray] = []

    def read(self, layer: int) -> dict[str, mx.array]:
        """Return a layer's dense tensors by name."""
        return self._read(layer).result()

    def fill_each(self, work: Sequence[Wanted]) -> Iterator[int]:
        """See :meth:`UnitReader.fill_each`."""
        try:
            yield from super().fill_each(work)
        finally:
            self._spare.clear()  # up to two layers' worth of memory

    def check_unchanged(self) -> None:
        """See :meth:`UnitReader.check_unchanged`; the only file stays open."""

    def _begin(self, wanted: Wanted) -> Future[dict[str, mx.array]]:
        _, layer, index, donor = wanted
        # A donor's units have the adapter in them already.
        return self._read(layer, index, None if self._adapter else donor)

    def _read(
        self, layer: int, index: mx.array | None = None, donor: Donor | None = None
    ) -> Future[dict[str, mx.array]]:
        """Start reading a layer's units."""
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
        offsets = self.layout.layer_offsets[layer] + places * size
        device = self._device(self._file, offsets)
        ranges = plan(places, size, self.layout.units, device)
        fd = self._file.sweeps if len(ranges) == 1 else self._file.ranges
        jobs = [
            self._threads.submit(
                self._move, fd, layer, group, places, numbers, arriving
            )
            for group in pieces(ranges, places, PIECE_BYTES // size)
        ]
        self.bytes_wanted += len(places) * size
        return self._threads.submit(self._complete, arriving, jobs)

    def _complete(
        self, arriving: ArrivingLayer, jobs: list[Future]
    ) -> dict[str, mx.array]:
        """Wait for all of a layer's jobs, which were given to the threads before."""
        wait(jobs)  # all of them, also after an error
        self._count(sum(job.result() for job in jobs))
        arriving.complete()
        self._spare.append(arriving.scratch)
        return arriving.tensors()

    def _held_by(
        self, donor: Donor | None, layer: int
    ) -> tuple[list[mx.array], np.ndarray] | None:
        """Return a donor's tensors, part by part, and its channels."""
        if donor is None:
            return None
        parts = self.layout.parts[layer]
        tensors = [self._home(donor.module, layer, p.name) for p in parts]
        return [home[tensor] for home, tensor in tensors], np.array(donor.units)

    def _held(self, index: mx.array) -> np.ndarray:
        """Return all channels (or experts) in the records that hold ``index``."""
        size = self.layout.unit
        found = units_of(np.array(index), size)[:, None] * size + np.arange(size)
        return found.ravel().astype(np.int32)

    def _cut(self, wanted: Wanted) -> None:
        module, layer, index, _ = wanted
        held = None if index is None else mx.array(self._held(index))
        if self._adapter is not None:
            plan = self.plan.layers[layer]
            self._adapter.fuse_units(module, plan, self.plan.units, held)
        if index is None or held is None:
            return
        channels = np.array(index)
        within = mx.array(np.searchsorted(np.array(held), channels))
        cut(wanted.module, self.plan.layers[layer], within, held.size)
        follow(wanted.module, self.plan.layers[layer], channels.size)

    def _move(
        self,
        fd: int,
        layer: int,
        group: list[Range],
        places: np.ndarray,
        numbers: np.ndarray,
        arriving: ArrivingLayer,
    ) -> int:
        """Read some ranges of places with the gaps in them, check them, and put the
        wanted records where they belong; return the bytes read.
        """
        size, start = self.layout.record_bytes[layer], self.layout.layer_offsets[layer]
        spans = [(int(places[a]), int(places[b - 1]) + 1) for a, b in group]
        buffer = self._buffer(sum(last - first for first, last in spans) * size)
        if fd == self._file.ranges:
            self._file.announce((start + a * size, (b - a) * size) for a, b in spans)
        at, wanted, began = 0, [], time.perf_counter()
        for (a, b), (first, last) in zip(group, spans, strict=True):
            part = buffer[at * size : (at + last - first) * size]
            self._file.read(fd, [part], start + first * size)
            self._check(layer, first, part)
            wanted.append(places[a:b] - first + at)
            at += last - first
        self.throttle(buffer.size, began)
        records = buffer.reshape(-1, size)
        index = slice(group[0].first, group[-1].last)
        if index.stop - index.start < at:
            records = records[np.concatenate(wanted)]
        arriving.put(numbers[index], records)
        return buffer.size

    def _check(self, layer: int, first: int, records: np.ndarray) -> None:
        """Check records that lie one after another, from the place ``first`` on."""
        sums, size = self.layout.checksums[layer], self.layout.record_bytes[layer]
        before = int(sums[first - 1]) if first else 0
        if crc32(records.data, before) == sums[first + records.size // size - 1]:
            return
        for place, record in enumerate(records.reshape(-1, size), first):
            before = crc32(record.data, before)
            if before != sums[place]:
                unit = int(self.layout.order[layer, place])
                raise ValueError(
                    f"{self.path} is damaged: the record of {self.plan.unit} "
                    f"{unit * self.layout.unit} in layer {layer} fails its checksum; "
                    f"{AGAIN}."
                )
