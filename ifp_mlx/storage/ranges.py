"""An open file whose ranges several threads read at a time."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

MOST_BUFFERS = 1024  # that one call fills


class OpenFile:
    """A file that stays open, so that a new one under the same name does not mix with
    it.

    Args:
        path: the file.
        remedy: what to do if it ends early, for the error's sentence.

    Attributes:
        sweeps: descriptor for reading from first to last; the system reads ahead.
        ranges: descriptor for reading here and there.
    """

    def __init__(self, path: Path, remedy: str) -> None:
        self.path, self._remedy = path, remedy
        self.sweeps = os.open(path, os.O_RDONLY)
        self.ranges = os.open(path, os.O_RDONLY)
        if hasattr(os, "posix_fadvise"):  # reading ahead would read unwanted bytes
            os.posix_fadvise(self.ranges, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        for fd in (getattr(self, "sweeps", None), getattr(self, "ranges", None)):
            if fd is not None:
                os.close(fd)

    def is_cached(self, offsets: np.ndarray) -> bool:
        """Whether the system has cached the bytes at some offsets; only Linux can tell."""
        nowait = getattr(os, "RWF_NOWAIT", None)
        if nowait is None:
            return False
        byte = bytearray(1)
        try:
            for offset in offsets[:: max(1, len(offsets) // 8)]:
                os.preadv(self.ranges, [byte], int(offset), nowait)
            return True
        except OSError:  # it would have to wait for the disk
            return False

    def announce(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Have the system fetch ranges, offset and bytes each, before they are read:
        it reads many at a time, at less cost than calls that wait.
        """
        if hasattr(os, "posix_fadvise"):
            for offset, nbytes in ranges:
                os.posix_fadvise(self.ranges, offset, nbytes, os.POSIX_FADV_WILLNEED)

    def read(self, fd: int, buffers: Sequence[np.ndarray], offset: int) -> int:
        """Fill buffers, uint8, one after another; return how many bytes they have.

        Args:
            fd: :attr:`sweeps` or :attr:`ranges`.
            buffers: none of them empty.
            offset: of the first byte.

        Raises:
            OSError: if the file cannot be read, or ends before.
        """
        left, start = [buffer.data for buffer in buffers], offset
        while left:
            got = os.preadv(fd, left[:MOST_BUFFERS], offset)
            if got == 0:
                raise OSError(
                    f"{self.path} was cut short while in use; {self._remedy}."
                )
            offset += got
            while left and got >= left[0].nbytes:
                got -= left.pop(0).nbytes
            if got:
                left[0] = left[0][got:]
        return offset - start
