"""How a disk is best read: what a range and a byte cost, and a plan that follows."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Device:
    """What reading costs, several ranges being read at a time.

    Attributes:
        latency: seconds that one more range costs before its first byte.
        bandwidth: bytes per second within ranges.
        sweep: bytes per second of reading all there is from first to last.
    """

    latency: float = 60e-6
    bandwidth: float = 1.2e9
    sweep: float = 1.2e9

    def seconds(self, ranges: int, nbytes: int) -> float:
        """Return what it costs to read so many ranges, bytes in all."""
        return ranges * self.latency + nbytes / self.bandwidth


class Range(NamedTuple):
    """Records to be read at once: ``places[first:last]`` and what lies between them."""

    first: int
    last: int


def plan(
    places: np.ndarray, record_bytes: int, units: int, device: Device
) -> list[Range]:
    """Choose how a layer's records are read: exact ranges, ranges that read over small
    gaps, or all of it in one sweep, whichever costs least.

    Reading over a gap pays when the gap's bytes cost less than another range; as gaps
    do not depend on each other, deciding each for itself is the best there is.

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


def pieces(
    ranges: list[Range], places: np.ndarray, records: int, runs: int
) -> Iterator[Range]:
    """Split ranges so that each can be one call, and large ones are read in parallel.

    Args:
        ranges: of ``places``, sorted.
        records: that a piece may span at most.
        runs: of records without a gap that a piece may hold at most.
    """
    for first, last in ranges:
        start = first
        while start < last:
            stop = int(np.searchsorted(places, places[start] + max(1, records)))
            stop = min(stop, last)
            gaps = np.flatnonzero(np.diff(places[start:stop]) > 1)
            if len(gaps) >= runs:
                stop = start + int(gaps[runs - 1]) + 1
            yield Range(start, stop)
            start = stop
