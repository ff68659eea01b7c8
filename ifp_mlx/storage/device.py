"""How a disk is best read: what a range and a byte cost, and the plan they give."""

import json
import os
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from ..files.atomic import new_file
from ..files.caches import cache_place

SMALL, LARGE = 16 << 10, 1 << 20  # bytes of the reads that are timed
MEASURED_BYTES = 256 << 20  # a file smaller than this tells too little


@dataclass(frozen=True)
class Device:
    """What reading costs, several ranges being read at a time.

    Attributes:
        latency: seconds that one more range costs before its first byte.
        bandwidth: bytes per second within ranges.
        sweep: bytes per second when everything is read from first to last.
    """

    latency: float = 20e-6
    bandwidth: float = 1.2e9
    sweep: float = 1.2e9

    def seconds(self, ranges: int, nbytes: int) -> float:
        """Return the seconds for this many ranges of ``nbytes`` bytes in all."""
        return ranges * self.latency + nbytes / self.bandwidth


# Files in the system's cache: each range costs a call, each byte memory's bandwidth.
CACHED = Device(latency=4e-6, bandwidth=3e9, sweep=3e9)

# For reading exactly the wanted bytes, whatever a call costs.
FEWEST_BYTES = Device(latency=0.0, bandwidth=1.0, sweep=1.0)


def device_of(fd: int, read: Callable[[list[tuple[int, int]]], None]) -> Device:
    """Return what reading costs on the disk that holds an open file.

    Measured when a disk is first seen, in a few tenths of a second, and kept in the
    user's cache folder.

    Args:
        fd: the file.
        read: reads ranges, offset and bytes each, as many at a time as it ever does.
    """
    about = os.fstat(fd)
    file = cache_place("disks.json")
    try:
        known = json.loads(file.read_text())
    except (OSError, ValueError):
        known = {}
    key = f"{about.st_dev:x}"
    if key not in known:
        if about.st_size < MEASURED_BYTES or not hasattr(os, "posix_fadvise"):
            return Device()
        known[key] = asdict(_measure(fd, about.st_size, read))
        try:
            with new_file(file) as scratch:
                scratch.write_text(json.dumps(known))
        except OSError:  # then it is measured again
            pass
    return Device(**known[key])


def _measure(
    fd: int, size: int, read: Callable[[list[tuple[int, int]]], None]
) -> Device:
    def seconds(ranges: list[tuple[int, int]]) -> float:
        for offset, nbytes in ranges:  # so that nothing comes from the cache
            os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        read(ranges)
        return time.perf_counter() - start

    places = np.random.default_rng(0).permutation(size // LARGE - 1) * LARGE
    small = [(int(place), SMALL) for place in places[:192]]
    large = [(int(place), LARGE) for place in places[192:224]]
    start = size // 2 // LARGE * LARGE
    sweep = [(start + n * 4 * LARGE, 4 * LARGE) for n in range(16)]
    per_small = min(seconds(small[n::3]) for n in range(3)) / 64
    per_large = min(seconds(large[n::2]) for n in range(2)) / 16
    # Two sizes separate the cost of a range from that of a byte, so that the estimate
    # also holds for an expert's records, which are larger than both. Noise must not
    # make bytes free.
    bandwidth = (LARGE - SMALL) / max(per_large - per_small, per_large / 4)
    latency = max(per_small - SMALL / bandwidth, 1e-6)
    return Device(latency, bandwidth, 64 * LARGE / seconds(sweep))


class Range(NamedTuple):
    """Records to be read at once: ``places[first:last]`` and what lies between them."""

    first: int
    last: int


def plan(
    places: np.ndarray, record_bytes: int, units: int, device: Device
) -> list[Range]:
    """Choose how a layer's records are read: exact ranges, ranges that read over small
    gaps, or all of it in one sweep, whichever costs least.

    Reading over a gap pays when the gap's bytes cost less than another range; gaps do
    not depend on each other, so deciding each by itself is optimal.

    Args:
        places: int ``[n]``, sorted: the records wanted.
        record_bytes: of one record.
        units: records in the layer.
        device: what reading costs.
    """
    if not len(places):
        return []
    gaps = np.diff(places) - 1
    cuts = np.flatnonzero(gaps * record_bytes > device.latency * device.bandwidth) + 1
    edges = [0, *map(int, cuts), len(places)]
    ranges = [Range(a, b) for a, b in zip(edges, edges[1:], strict=False)]
    read = sum(int(places[b - 1] - places[a] + 1) for a, b in ranges)
    cost = device.seconds(len(ranges), read * record_bytes)
    if cost > device.latency + units * record_bytes / device.sweep:
        return [Range(0, len(places))]
    return ranges


def pieces(ranges: list[Range], places: np.ndarray, span: int) -> Iterator[list[Range]]:
    """Cut and group ranges so that each group is about as much as is read at a time.

    Args:
        ranges: of ``places``, sorted.
        span: records in a group at most, gaps included.
    """
    where = places.tolist()
    group: list[Range] = []
    left = span
    for first, last in ranges:
        while first < last:
            stop = last
            if where[last - 1] - where[first] >= max(1, left):
                stop = bisect_left(where, where[first] + max(1, left), first, last)
            group.append(Range(first, stop))
            left -= where[stop - 1] - where[first] + 1
            first = stop
            if first < last or left <= 0:
                yield group
                group, left = [], span
    if group:
        yield group
