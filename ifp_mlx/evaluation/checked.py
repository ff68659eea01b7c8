"""How an answer that the whole model checked compares with the whole model's own."""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.nn as nn
import numpy as np

from ..checking.loop import Checks
from .rows import Row
from .tables import markdown
from .teacher import log_probabilities, metrics

SHARES = ("same", "before", "alike")


def compare(ids: Sequence[int], dense: Sequence[int]) -> dict[str, float]:
    """Return how far an answer equals the dense model's, including its end.

    Args:
        ids: token ids of the answer.
        dense: those of the dense model's answer, at least one.

    Returns:
        ``same``: 1 if both are equal, else 0; ``before``: the share of the dense
        model's tokens that come before the first difference; ``alike``: the share of
        them that stand at the same place in the answer.
    """
    equal = [one == other for one, other in zip(ids, dense, strict=False)]
    before = equal.index(False) if False in equal else len(equal)
    return {
        "same": float(list(ids) == list(dense)),
        "before": before / len(dense),
        "alike": sum(equal) / len(dense),
    }


def nats(dense: nn.Module, prompt: Sequence[int], ids: Sequence[int]) -> float:
    """Return the mean of ``-log p`` that the dense model gives an answer's tokens, in
    nats per token: the KL to it from a model that is certain of this answer.
    """
    row = Row(list(prompt), list(ids))
    return metrics(row, log_probabilities(dense, row), None)["nll"]


def figures(check: Checks | None) -> dict[str, int]:
    """Return what checking one answer cost; nothing if it was not checked."""
    if check is None:
        return {"checks": 0, "bytes_read": 0}
    read = check.bytes_read - check.prompt_bytes_read
    return {"checks": check.checks, "bytes_read": read}


def summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return means over answers, and tokens per check and bytes per token over all.

    Args:
        lines: ``tokens`` of each answer, and the fields of the functions above.
    """
    means = {name: float(np.mean([line[name] for line in lines])) for name in SHARES}
    tokens, checks, read = (
        sum(line[name] for line in lines) for name in ("tokens", "checks", "bytes_read")
    )
    return means | {
        "nats": sum(line["nats"] * line["tokens"] for line in lines) / tokens,
        "tokens_per_check": tokens / checks if checks else None,
        "bytes_per_token": read / tokens,
    }


def table(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Return a Markdown table of what was asked → way to run → :func:`summary`."""
    head = ["", "", "the dense answer", "as far", "tokens alike", "nats a token"]
    head += ["tokens/check", "read MB/token"]
    rows = []
    for what, arms in found.items():
        for arm, values in arms.items():
            each = values["tokens_per_check"]
            cells = [what, arm, *(f"{values[name]:.0%}" for name in SHARES)]
            cells += [f"{values['nats']:.3f}", "" if each is None else f"{each:.2f}"]
            rows.append([*cells, f"{values['bytes_per_token'] / 1e6:.1f}"])
    return markdown(head, rows)
