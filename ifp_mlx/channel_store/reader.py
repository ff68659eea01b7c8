"""Reads chosen channels of a channel file into arrays, and nothing else of it."""

import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..pruning import slice_ffn
from .device import Device, Range, pieces, plan
from .layout import AGAIN, DTYPES, Layout, Part, read_layout

PIECE_BYTES = 4 << 20  # of one read; larger ones are split, to be read in parallel
BUFFERS = 500  # of one read; the system takes 1024
THREADS = 8


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
        self._device = Device()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="channels")
        self._scratch = np.empty(0, np.uint8)
        self.bytes_read = self.bytes_wanted = 0
        if hasattr(os, "posix_fadvise"):  # reading ahead would read what nobody wants
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)

    def fill(self, ffn: nn.Module, layer: int, index: mx.array | None = None) -> None:
        """Put a layer's channels into its FFN, in place, once all of them are read.

        Args:
            ffn: the layer's FFN.
            layer: its number.
            index: int32 ``[k]``, sorted; ``None`` is all channels.

        Raises:
            ValueError: if a record is damaged, or a quantised ``down_proj`` would be
                cut inside a group.
            OSError: if the file cannot be read.
        """
        size, units = self.layout.unit, np.arange(self.layout.units)
        channels = None if index is None else np.array(index)
        if channels is not None:
            units = np.unique(channels // size)
        arrays = self.read(layer, units)
        for (projection, tensor), array in arrays.items():
            ffn[projection][tensor] = array
        if channels is not None and channels.size < units.size * size:
            held = (units[:, None] * size + np.arange(size)).ravel()
            slice_ffn(ffn, mx.array(np.searchsorted(held, channels)))

    def read(
        self, layer: int, units: np.ndarray | None = None
    ) -> dict[tuple[str, str], mx.array]:
        """Return a layer's tensors by projection and name.

        Args:
            layer: its number.
            units: int ``[n]``, sorted: which units they are to hold; default: all.
        """
        if units is None:
            units = np.arange(self.layout.units)
        places = self.layout.places[layer][units]
        on_disk = np.sort(places)
        records = self._records(layer, on_disk)
        rows = np.searchsorted(on_disk, places)
        return {
            (part.projection, part.tensor): self._tensor(part, offset, records, rows)
            for part, offset in self.layout.fields(layer)
        }

    def _tensor(
        self, part: Part, offset: int, records: np.ndarray, rows: np.ndarray
    ) -> mx.array:
        """Gather a tensor from records ``[units, record]`` in the order ``rows``."""
        dense = self.layout.units
        size = part.unit_bytes(dense)
        tensor = mx.zeros(len(rows) * size, mx.uint8)
        mx.eval(tensor)
        into = part.split(np.array(tensor, copy=False), len(rows), dense)
        words = records[:, offset : offset + size].view(into.dtype)
        into[...] = words.reshape(into.shape)[rows]
        dtype = getattr(mx, DTYPES[part.dtype][0])
        return tensor.view(dtype).reshape(part.sliced_shape(len(rows), dense))

    def _records(self, layer: int, places: np.ndarray) -> np.ndarray:
        """Return the records at some places, uint8 ``[len(places), record]``.

        They are in a buffer that the next call uses again.
        """
        size = self.layout.record_bytes[layer]
        if self._scratch.size < len(places) * size:
            self._scratch = np.empty(len(places) * size, np.uint8)
        records = self._scratch[: len(places) * size].reshape(-1, size)
        ranges = plan(places, size, self.layout.units, self._device)
        jobs = [
            self._threads.submit(self._read_range, layer, piece, places, records)
            for piece in pieces(ranges, places, PIECE_BYTES // size, BUFFERS)
        ]
        wait(jobs)  # all of them, or one that outlives an error writes on
        self.bytes_read += sum(job.result() for job in jobs)
        self.bytes_wanted += records.nbytes
        return records

    def _read_range(
        self, layer: int, piece: Range, places: np.ndarray, records: np.ndarray
    ) -> int:
        """Read a range into its rows of ``records``, what is between them nowhere."""
        size = self.layout.record_bytes[layer]
        wanted = places[piece.first : piece.last]
        breaks = np.flatnonzero(np.diff(wanted) > 1) + 1
        starts = [0, *map(int, breaks), len(wanted)]
        buffers: list[memoryview] = []
        for start, stop in zip(starts, starts[1:], strict=False):
            if start:
                gap = int(wanted[start] - wanted[start - 1] - 1)
                buffers.append(memoryview(bytearray(gap * size)))
            rows = records[piece.first + start : piece.first + stop]
            buffers.append(rows.reshape(-1).data)
        total = sum(buffer.nbytes for buffer in buffers)
        offset = self.layout.layer_offsets[layer] + int(wanted[0]) * size
        self._read_exactly(buffers, offset)
        self._check(layer, wanted, records[piece.first : piece.last])
        return total

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

    def _check(self, layer: int, places: np.ndarray, records: np.ndarray) -> None:
        for place, record in zip(places, records, strict=True):
            if zlib.crc32(record) != self.layout.checksums[layer, place]:
                channel = int(self.layout.order[layer, place]) * self.layout.unit
                raise ValueError(
                    f"{self.path} is damaged: the record of channel {channel} in layer "
                    f"{layer} fails its checksum; {AGAIN}."
                )
