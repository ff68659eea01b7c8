"""Tables of the dense model beside selections, value by value on the same examples."""

from collections.abc import Mapping, Sequence
from typing import Any

from .statistics import binomial_interval, bootstrap, mcnemar

DENSE = "dense"
Values = Sequence[float]


def compare(values: Values, dense: Values) -> dict[str, Any]:
    """Return a mean with its 95 % interval, and how it differs from the dense model's.

    Args:
        values: one an example.
        dense: the dense model's, on the same examples.

    Returns:
        ``n``, ``mean``, ``interval`` (binomial where all values are 0 or 1, else of a
        bootstrap), ``minus_dense``, its paired ``minus_dense_interval``, and, where all
        values are 0 or 1, ``mcnemar``: the probability of a split this uneven between
        equally good models.
    """
    pairs = list(zip(values, dense, strict=True))
    count, mean = len(pairs), sum(values) / len(pairs)
    binary = all(value in (0, 1) for pair in pairs for value in pair)
    interval = binomial_interval(round(sum(values)), count)
    differences = [a - b for a, b in pairs]
    return {
        "n": count,
        "mean": mean,
        "interval": interval if binary else bootstrap({"": values}),
        "minus_dense": sum(differences) / count,
        "minus_dense_interval": bootstrap({"": differences}),
        "mcnemar": mcnemar(differences.count(1), differences.count(-1))
        if binary
        else None,
    }


def table(
    found: Mapping[str, Mapping[str, dict[str, Any]]], extra: Sequence[str] = ()
) -> str:
    """Return a Markdown table.

    Args:
        found: what was asked → way to run → :func:`compare`, with the fields of
            ``extra`` beside.
        extra: shares to show in columns of their own.
    """
    names = ["", "n", "", "mean [95 %]", *extra, "minus dense [95 %, paired]"]
    names += ["McNemar p"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for what, arms in found.items():
        for arm, values in arms.items():
            cells = [what, str(values["n"]), arm]
            cells.append(_with_interval(values["mean"], values["interval"], ".1%"))
            cells += [f"{values[name]:.0%}" for name in extra]
            if arm == DENSE:
                cells += ["", ""]
            else:
                difference = values["minus_dense"], values["minus_dense_interval"]
                p = values["mcnemar"]
                cells.append(_with_interval(*difference, "+.1%"))
                cells.append("–" if p is None else f"{p:.2f}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _with_interval(mean: float, interval: Sequence[float], form: str) -> str:
    low, high = (format(value, form) for value in interval)
    return f"{mean:{form}} [{low}, {high}]"


def at_chance(what: str, dense: dict[str, Any], chance: float) -> str | None:
    """Return a warning if the dense model's answers may be guesses.

    Args:
        what: the name of the questions.
        dense: the dense model's :func:`compare`.
        chance: how often a blind guess is right.
    """
    low, _ = dense["interval"]
    if low > chance:
        return None
    level = "none" if chance == 0 else f"{chance:.0%}"
    return (
        f"**{what}: the dense model's {dense['mean']:.0%} of {dense['n']} cannot be told "
        f"from a guess ({level} right), so this says nothing of what selecting costs.**"
    )
