"""Which selections of experts a stock mixture model can run with."""

from typing import Any

import mlx.core as mx
import numpy as np

from ..selection.masks import Selection
from ..slicing.shapes import Plan
from ..slicing.stock import build, unmoved_random_state

# A router that first chooses groups of experts states their number under one of these
# keys; no weight's shape tells it.
GROUP_KEYS = ("n_group", "num_expert_group")


def groups_of(config: dict[str, Any]) -> int:
    """Return into how many groups a router sorts the experts before it chooses."""
    homes = (config, config.get("text_config") or {})
    found = (home.get(key) for home in homes for key in GROUP_KEYS)
    return int(next((value for value in found if value), 1))


def check_number(plan: Plan, config: dict[str, Any], count: int) -> None:
    """Raise ``ValueError`` unless the stock class runs with this many experts a layer.

    Args:
        plan: the model's; its units are experts.
        config: its config.json.
        count: ``E'``, experts kept in every layer.
    """
    groups = groups_of(config)
    if count % groups:
        raise ValueError(
            f"{count} experts a layer are no multiple of the {groups} groups that this "
            f"model's router chooses among; use {max(1, count // groups) * groups}."
        )
    if not _runs(plan, config, count):
        raise ValueError(
            f"A layer with {count} of its {plan.units} experts has too few for this model's "
            f"router; keep at least {fewest(plan, config, count)}."
        )


def _runs(plan: Plan, config: dict[str, Any], count: int) -> bool:
    with unmoved_random_state():
        small = build(plan.resized(config, count))
    try:
        small(mx.array([[0, 0]]))  # shapes are enough: nothing is computed
    except (ValueError, IndexError, RuntimeError):
        return False
    return True


def fewest(plan: Plan, config: dict[str, Any], start: int) -> int:
    """Return the fewest experts a layer that the stock class runs with; all of them
    where its config cannot say how many there are.

    Args:
        plan: the model's; its units are experts.
        config: its config.json.
        start: the least number to try, such as the experts that a token is sent to.
    """
    if plan.key is None:
        return plan.units
    step = groups_of(config)
    counts = range(-(-start // step) * step, plan.units, step)
    return next((n for n in counts if _runs(plan, config, n)), plan.units)


def check_selection(selection: Selection, plan: Plan, config: dict[str, Any]) -> None:
    """Raise ``ValueError`` unless a stock model can have exactly these experts."""
    if selection.gates is not None:
        raise ValueError(
            f"The mask {selection.mask_id} has gates, which a router cannot take; make a "
            "mask of experts without."
        )
    if selection.target_size is None:
        raise ValueError(
            f"The mask {selection.mask_id} keeps different numbers of experts in its "
            f"layers ({', '.join(map(str, selection.sizes))}), and a stock model has one "
            "number for all; make one that keeps equally many in each."
        )
    check_number(plan, config, selection.target_size)
    groups = groups_of(config)
    for layer, index in enumerate(selection.indices):
        counts = np.bincount(np.array(index) * groups // plan.units, minlength=groups)
        if len({*counts.tolist()}) > 1:
            raise ValueError(
                f"The mask {selection.mask_id} keeps {counts.tolist()} experts of the "
                f"{groups} groups of layer {layer}, and the router expects equally many "
                "of each; make another."
            )
