"""The common part of the classes that read units into a model: they fill layer after
layer, and while one is put in place, they read the next.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..slicing.shapes import Plan, at
from ..slicing.sliced import Donor
from .device import CACHED, Device, device_of
from .ranges import OpenFile

PIECE_BYTES = 2 << 20  # read at a time; small enough for the processor's cache
THREADS = 4


class Wanted(NamedTuple):
    """Which units are to be put where.

    Attributes:
        module: of the layer.
        layer: its number.
        units: int32 ``[k]``, sorted; ``None`` is all of them.
        donor: of the same layer, whose units are copied.
    """

    module: nn.Module
    layer: int
    units: mx.array | None
    donor: Donor | None = None


class UnitReader(ABC):
    """Reads chosen units from files into a model.

    Args:
        plan: of the model.
        device: assumed cost of reading; default: what is measured.

    Attributes:
        plan: of the model.
        bytes_read: bytes asked of the system so far, gaps between units included.
        bytes_wanted: bytes of the units that were needed.
        throttle: called after each read by the thread that did it, with the number of
            bytes and the time at which the read began, by ``time.perf_counter``; it may
            make the thread wait, as a slower disk would.
    """

    def __init__(self, plan: Plan, device: Device | None = None) -> None:
        self.plan = plan
        self._given = device
        self.bytes_read = self.bytes_wanted = 0
        self.throttle: Callable[[int, float], None] = lambda nbytes, began: None
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="units")
        self._own = threading.local()
        self._counting = threading.Lock()
        self._disk: Device | None = None

    @property
    def reads_all(self) -> bool:
        """Whether nothing of a layer's units has to be cut in memory."""
        return True

    def _count(self, nbytes: int) -> None:
        """Count bytes that were read, in whatever thread."""
        with self._counting:
            self.bytes_read += nbytes

    def fill(
        self, module: nn.Module, layer: int, index: mx.array | None = None
    ) -> None:
        """Put a layer's units into its module, in place, once all of them are read.

        Args:
            module: the layer's.
            layer: its number.
            index: int32 ``[k]``, sorted; ``None`` is all units.

        Raises:
            ValueError: if a record is damaged, or ``k`` channels do not make whole
                quantisation groups.
            OSError: if a file cannot be read.
        """
        for _ in self.fill_each([Wanted(module, layer, index)]):
            pass

    def fill_all(
        self,
        modules: Sequence[nn.Module],
        indices: Sequence[mx.array | None] | None = None,
        donors: Sequence[Donor] | None = None,
    ) -> Iterator[int]:
        """Fill layer after layer as :meth:`fill` does, and yield the number of each;
        while one is put in place, the next is read.

        Args:
            modules: of all layers.
            indices: for each layer, as for :meth:`fill`.
            donors: for each layer, that of another model; units that it has are copied.
        """
        none = [None] * len(modules)
        layers = range(len(modules))
        rows = zip(modules, layers, indices or none, donors or none, strict=True)
        return self.fill_each([Wanted(*row) for row in rows])

    def fill_each(self, work: Sequence[Wanted]) -> Iterator[int]:
        """Fill one item of ``work`` after the other, and yield its layer; while one is
        put in place, the next is read.
        """
        if not work:
            return
        begun = self._begin(work[0])
        try:
            for number, wanted in enumerate(work):
                current = begun
                if number + 1 < len(work):
                    begun = self._begin(work[number + 1])
                self._put(wanted, current.result())
                self._cut(wanted)
                yield wanted.layer
        finally:
            wait([begun])  # else it would go on writing after an error

    @abstractmethod
    def check_unchanged(self) -> None:
        """Raise ``OSError`` if a file that is not kept open has changed."""

    @abstractmethod
    def _begin(self, wanted: Wanted) -> Future[dict[str, mx.array]]:
        """Start reading; the result is tensors by their names in the model."""

    def _put(self, wanted: Wanted, tensors: dict[str, mx.array]) -> None:
        """Put tensors in their places, except those that the plan leaves out."""
        layer = self.plan.layers[wanted.layer]
        homes = {piece.module for piece in layer.slices}
        for name, array in tensors.items():
            path, _, tensor = name.removeprefix(f"{layer.path}.").rpartition(".")
            if path in homes:
                at(wanted.module, path)[tensor] = array

    @abstractmethod
    def _cut(self, wanted: Wanted) -> None:
        """Cut what was read whole, now that the tensors are in place."""

    def _home(self, module: nn.Module, layer: int, name: str) -> tuple[nn.Module, str]:
        """Return the submodule of a layer that has a tensor, and its name there."""
        inside = name.removeprefix(f"{self.plan.layers[layer].path}.")
        path, _, tensor = inside.rpartition(".")
        return at(module, path), tensor

    def _device(self, file: OpenFile, offsets: np.ndarray) -> Device:
        """Return the cost of reading some offsets: the disk's, or the cache's if
        cached.
        """
        if self._given is not None:
            return self._given
        if file.is_cached(offsets):
            return CACHED
        if self._disk is None:
            self._disk = device_of(file.ranges, partial(self._read_anywhere, file))
        return self._disk

    def _read_anywhere(self, file: OpenFile, ranges: list[tuple[int, int]]) -> None:
        """Read ranges, offset and bytes each, to time it."""

        def read(offset: int, nbytes: int) -> None:
            file.read(file.ranges, [np.empty(nbytes, np.uint8)], offset)

        file.announce(ranges)
        wait([self._threads.submit(read, *item) for item in ranges])

    def _buffer(self, nbytes: int) -> np.ndarray:
        """Return a buffer of the calling thread, which reuses it for its next piece."""
        if getattr(self._own, "buffer", np.empty(0)).size < nbytes:
            self._own.buffer = np.empty(nbytes, np.uint8)
        return self._own.buffer[:nbytes]
