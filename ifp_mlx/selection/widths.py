"""How many units each layer keeps."""

from typing import Literal

import mlx.core as mx
import numpy as np

Allocation = Literal["uniform", "first-layer", "sensitivity"]
ALLOCATIONS: tuple[Allocation, ...] = ("uniform", "first-layer", "sensitivity")

# The kept shares of F at which a layer's sensitivity is measured.
MEASURED_SHARES = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)
LEAST_SHARE = 0.125  # that every layer keeps under the allocation by sensitivity


def target_size(channels: int, keep: float, granularity: int = 1) -> int:
    """Return ``k`` for a kept share of ``F``, rounded to the granularity.

    Args:
        channels: ``F``.
        keep: kept share, ``0 < keep <= 1``.
        granularity: channels per selectable block.

    Raises:
        ValueError: if ``keep`` is outside ``(0, 1]``.
    """
    if not 0 < keep <= 1:
        raise ValueError(
            f"keep={keep} is not a share of the units; choose a number above 0 "
            "and up to 1 (1 keeps them all)."
        )
    return max(1, round(keep * channels / granularity)) * granularity


def layer_sizes(
    k: int,
    layers: int,
    channels: int,
    allocation: Allocation,
    granularity: int = 1,
    costs: mx.array | None = None,
) -> list[int]:
    """Return the kept channels of every layer; their total is at most ``L * k``.

    Args:
        k: kept channels per layer on average, a multiple of ``granularity``.
        layers: ``L``.
        channels: ``F``.
        allocation: ``uniform`` (the paper's rule); ``first-layer``: layer 0 is kept
            whole and the others share what is left of the same total; or
            ``sensitivity``: a layer loses the less, the higher its ``costs``.
        granularity: channels per selectable block.
        costs: ``[L, 6]``, what it costs to prune a layer alone to each of
            ``MEASURED_SHARES``, nats per token; needed by ``sensitivity``.

    Raises:
        ValueError: if ``k`` does not fit the channels, the granularity or the
            allocation.
    """
    check_multiple(k, granularity, channels)
    if allocation not in ALLOCATIONS:
        raise ValueError(
            f"allocation={allocation!r} is unknown; choose {' or '.join(ALLOCATIONS)}."
        )
    if allocation == "uniform" or layers == 1:
        return [k] * layers
    if allocation == "sensitivity":
        if costs is None:
            raise ValueError(
                "The allocation sensitivity needs a measurement of this model, minutes "
                "once: run python -m ifp_mlx.sensitivity --model with its folder."
            )
        return _sizes_by_cost(k, channels, granularity, np.array(costs))
    rest = (layers * k - channels) // (layers - 1) // granularity * granularity
    if rest < granularity:
        raise ValueError(
            f"{k} channels in each of {layers} layers are too few for a whole first "
            f"layer of {channels}; keep more, or use the allocation uniform."
        )
    return [channels] + [rest] * (layers - 1)


def _sizes_by_cost(
    k: int, channels: int, granularity: int, costs: np.ndarray
) -> list[int]:
    """Let every layer lose channels in inverse proportion to what that costs there.

    A layer's cost at this budget was measured with only that layer pruned. Taking the
    next channel wherever the measured curves are cheapest would empty some layers, and
    layers that are pruned together cost far more than each alone.
    """
    blocks, budget = channels // granularity, k // granularity
    most = blocks - max(1, min(budget, round(LEAST_SHARE * blocks)))
    cost = np.array([np.interp(k / channels, MEASURED_SHARES, row) for row in costs])
    ease = 1 / np.maximum(cost, max(1e-3 * cost.max(), 1e-9))
    wanted = len(costs) * (blocks - budget)
    full = np.zeros(len(costs), dtype=bool)  # layers that can lose no more
    while True:
        rest = wanted - most * full.sum()
        lost = np.where(full, most, ease * rest / max(ease[~full].sum(), 1e-9))
        if not (over := ~full & (lost > most)).any():
            break
        full |= over
    whole = np.floor(lost + 1e-9).astype(int)
    nearest = np.argsort(whole - lost, kind="stable")
    whole[nearest[: wanted - whole.sum()]] += 1
    return [int(size) for size in (blocks - whole) * granularity]


def check_multiple(
    k: int, granularity: int, channels: int, unit: str = "channel"
) -> None:
    """Raise ``ValueError`` naming the nearest valid ``k`` unless ``k`` fits.

    Args:
        k: kept units per layer.
        granularity: units per selectable block.
        channels: ``F``.
        unit: what they are.
    """
    if not 0 < k <= channels:
        raise ValueError(
            f"target_size={k} must be between 1 and the {channels} {unit}s of a layer."
        )
    if k % granularity:
        below = k // granularity * granularity
        valid = [v for v in (below, below + granularity) if 0 < v <= channels]
        raise ValueError(
            f"target_size={k} is not a multiple of the group of {granularity} "
            f"{unit}s; use {' or '.join(map(str, valid))}."
        )
