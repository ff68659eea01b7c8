"""Means, and how much of them may be chance."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

SAMPLES = 2000
Groups = Mapping[str, Sequence[float] | np.ndarray]  # values of rows, by group


def macro_mean(groups: Groups) -> float:
    """Return the mean over rows, then over groups: every group counts the same."""
    return float(np.mean([np.mean(values) for values in groups.values()]))


def bootstrap(groups: Groups) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of :func:`macro_mean`.

    Rows are drawn anew within each group. Given differences of pairs, it is a paired
    interval. It does not cover another choice of groups, or another model.
    """
    rng = np.random.default_rng(0)
    means = np.zeros(SAMPLES)
    for values in groups.values():
        array = np.asarray(values, dtype=np.float64)
        picks = rng.integers(0, len(array), (SAMPLES, len(array)))
        means += array[picks].mean(axis=1) / len(groups)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def binomial_interval(right: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share.

    Raises:
        ValueError: if ``count`` is below 1.

    Source: Wilson 1927, the score interval: it stays inside [0, 1] and has a width
    even where all or none are right.
    """
    if count < 1:
        raise ValueError(f"A share of {count} answers has no interval.")
    z = 1.959964
    share, spread = right / count, z * z / count
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    half /= 1 + spread
    low = 0.0 if right == 0 else centre - half
    return low, 1.0 if right == count else centre + half


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the probability of a split this uneven, among answers that only one of two
    models has right, if both models are equally good: the exact two-sided test.

    Source: McNemar 1947; exact binomial form.
    """
    count, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(count, n) for n in range(fewer + 1)) / 2**count
    return min(1.0, 2 * tail)
