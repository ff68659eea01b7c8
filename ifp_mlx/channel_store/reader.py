"""Reads chosen channels of a channel file into arrays, and nothing else of it."""

import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..pruning import Donor, slice_ffn
from .device import CACHED, Device, Range, device_of, pieces, plan
from .layout import AGAIN, DTYPES, Layout, Part, read_layout

PIECE_BYTES = 4 << 20  # of one read; larger ones are split, to be read in parallel
BUFFERS = 500  # of one read; the system takes 1024
THREADS = 8
JOBS = 4 * THREADS  # of a layer at most: a job costs more than a small read


class ChannelReader:
    """An open channel file.

    The file stays open: a store that is made anew under the same name meanwhile does
    not mix with it.

    Args:
        path: the channel file.

    Attributes:
        layout: its header.
        bytes_read: bytes of records asked of the system so far, gaps included.
        bytes_wanted: bytes of the records that were needed.

    Raises:
        ValueError: as :func:`read_layout`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.layout: Layout = read_layout(path)
        self._fd = os.open(path, os.O_RDONLY)
        self._disk: Device | None = None
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="channels")
        self._scratch = self._waste = np.empty(0, np.uint8)
        self.bytes_read = self.bytes_wanted = 0
        if hasattr(os, "posix_fadvise"):  # reading ahead would read what nobody wants
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)

    def fill(
        self,
        ffn: nn.Module,
        layer: int,
        index: mx.array | None = None,
        donor: Donor | None = None,
    ) -> None:
        """Put a layer's channels into its FFN, in place, once all of them are read.

        Args:
            ffn: the layer's FFN.
            layer: its number.
            index: int32 ``[k]``, sorted; ``None`` is all channels.
            donor: the same layer filled before; the channels it has are copied.

        Raises:
            ValueError: if a record is damaged, or a quantised ``down_proj`` would be
                cut inside a group.
            OSError: if the file cannot be read.
        """
        size, units = self.layout.unit, np.arange(self.layout.units)
        channels = None if index is None else np.array(index)
        if channels is not None:
            units = np.unique(channels // size)
        arrays = self.read(layer, units, donor)
        for (projection, tensor), array in arrays.items():
            ffn[projection][tensor] = array
        if channels is not None and channels.size < units.size * size:
            held = (units[:, None] * size + np.arange(size)).ravel()
            slice_ffn(ffn, mx.array(np.searchsorted(held, channels)))

    def read(
        self,
        layer: int,
        units: np.ndarray | None = None,
        donor: Donor | None = None,
    ) -> dict[tuple[str, str], mx.array]:
        """Return a layer's tensors by projection and name.

        Args:
            layer: its number.
            units: int ``[n]``, sorted: which units they are to hold; default: all.
            donor: see :meth:`fill`.
        """
        if units is None:
            units = np.arange(self.layout.units)
        ffn, held = self._held(donor)
        given = np.isin(units, held)
        places = self.layout.places[layer][units[~given]]
        records = self._records(layer, places)
        read, copied = np.flatnonzero(~given), np.flatnonzero(given)
        arrays = {}
        for part, offset in self.layout.fields(layer):
            tensor, into = self._tensor(part, len(units))
            size = part.unit_bytes(self.layout.units)
            words = records[:, offset : offset + size].view(into.dtype)
            words = words.reshape(-1, *into.shape[1:])
            if ffn is None:
                into[...] = words
            else:
                into[read] = words
                theirs = self._view(part, ffn[part.projection][part.tensor], len(held))
                into[copied] = theirs[np.searchsorted(held, units[given])]
            arrays[part.projection, part.tensor] = tensor
        return arrays

    def _held(self, donor: Donor | None) -> tuple[nn.Module | None, np.ndarray]:
        """Return the units that a donor can give: none if it cut one."""
        if donor is not None:
            channels, size = np.array(donor.channels), self.layout.unit
            units = np.unique(channels // size)
            if channels.size == units.size * size:
                return donor.ffn, units
        return None, np.empty(0, int)

    def _view(self, part: Part, array: mx.array, units: int) -> np.ndarray:
        """View a tensor that this reader made unit by unit; see :meth:`Part.split`."""
        flat = array.reshape(-1).view(mx.uint8)
        return part.split(np.array(flat, copy=False), units, self.layout.units)

    def _tensor(self, part: Part, units: int) -> tuple[mx.array, np.ndarray]:
        """Return a tensor of some units, and a view to write them into."""
        dense = self.layout.units
        tensor = mx.zeros(units * part.unit_bytes(dense), mx.uint8)
        mx.eval(tensor)
        into = part.split(np.array(tensor, copy=False), units, dense)
        dtype = getattr(mx, DTYPES[part.dtype][0])
        return tensor.view(dtype).reshape(part.sliced_shape(units, dense)), into

    def _records(self, layer: int, places: np.ndarray) -> np.ndarray:
        """Return the records at some places, uint8 ``[len(places), record]``.

        They are in a buffer that the next call uses again, as they are asked for,
        which need not be how they lie.
        """
        size = self.layout.record_bytes[layer]
        if self._scratch.size < len(places) * size:
            self._scratch = np.empty(len(places) * size, np.uint8)
        records = self._scratch[: len(places) * size].reshape(-1, size)
        rows = np.argsort(places)
        places = places[rows]
        device = self._device(layer, places)
        ranges = plan(places, size, self.layout.units, device)
        parts = list(pieces(ranges, places, PIECE_BYTES // size, BUFFERS))
        jobs = [
            self._threads.submit(self._read_ranges, layer, share, places, rows, records)
            for share in (parts[n::JOBS] for n in range(min(JOBS, len(parts))))
        ]
        wait(jobs)  # all of them, or one that outlives an error writes on
        self.bytes_read += sum(job.result() for job in jobs)
        self.bytes_wanted += records.nbytes
        return records

    def _device(self, layer: int, places: np.ndarray) -> Device:
        """Return what reading costs: a disk, or the cache if some records are there."""
        nowait = getattr(os, "RWF_NOWAIT", None)
        if nowait is not None:
            sample = places[:: max(1, len(places) // 8)]
            start, byte = self.layout.layer_offsets[layer], bytearray(1)
            try:
                for place in sample:
                    offset = start + int(place) * self.layout.record_bytes[layer]
                    os.preadv(self._fd, [byte], offset, nowait)
                return CACHED
            except OSError:  # not without waiting for the disk
                pass
        if self._disk is None:
            self._disk = device_of(self._fd, self._read_anywhere)
        return self._disk

    def _read_anywhere(self, ranges: list[tuple[int, int]]) -> None:
        """Read ranges, offset and bytes each, for the time it takes."""

        def read(offset: int, nbytes: int) -> None:
            os.preadv(self._fd, [bytearray(nbytes)], offset)

        wait([self._threads.submit(read, *item) for item in ranges])

    def _read_ranges(
        self,
        layer: int,
        share: list[Range],
        places: np.ndarray,
        rows: np.ndarray,
        records: np.ndarray,
    ) -> int:
        total = 0
        for first, last in share:
            part = slice(first, last)
            into = [records[row] for row in rows[part]]
            total += self._read_range(layer, places[part], into)
        return total

    def _read_range(
        self, layer: int, places: np.ndarray, into: list[np.ndarray]
    ) -> int:
        """Read the range of some places, each record into its array, and check them;
        what lies between them goes nowhere.
        """
        size = self.layout.record_bytes[layer]
        buffers = [into[0].data]
        gaps = (np.diff(places) - 1).tolist()
        for gap, record in zip(gaps, into[1:], strict=True):
            if gap:
                buffers.append(self._nowhere(gap * size))
            buffers.append(record.data)
        offset = self.layout.layer_offsets[layer] + int(places[0]) * size
        self._read_exactly(buffers, offset)
        self._check(layer, places, into)
        return size * int(places[-1] - places[0] + 1)

    def _nowhere(self, nbytes: int) -> memoryview:
        """Return a buffer whose content nobody needs; all threads write into it."""
        if self._waste.size < nbytes:
            self._waste = np.empty(nbytes, np.uint8)
        return self._waste[:nbytes].data

    def _read_exactly(self, buffers: Sequence[memoryview], offset: int) -> None:
        left = list(buffers)
        while left:
            got = os.preadv(self._fd, left, offset)
            if got == 0:
                raise OSError(f"{self.path} was cut short while in use; {AGAIN}.")
            offset += got
            while left and got >= left[0].nbytes:
                got -= left.pop(0).nbytes
            if got:
                left[0] = left[0][got:]

    def _check(self, layer: int, places: np.ndarray, records: list[np.ndarray]) -> None:
        for place, record in zip(places, records, strict=True):
            if zlib.crc32(record.data) != self.layout.checksums[layer, place]:
                channel = int(self.layout.order[layer, place]) * self.layout.unit
                raise ValueError(
                    f"{self.path} is damaged: the record of channel {channel} in layer "
                    f"{layer} fails its checksum; {AGAIN}."
                )
