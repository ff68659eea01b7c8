"""What a sweep found, as tables and as plain data."""

import math
from collections.abc import Sequence
from typing import Any

from .measurement import Arm
from .statistics import bootstrap, macro_mean
from .teacher import Prefill

MEGA = 1e6


def summary(arm: Arm, first: Arm) -> dict[str, Any]:
    """Return an arm's means, its sizes, and intervals of its difference from another.

    Args:
        arm: measured.
        first: the arm whose rows it is paired with.
    """
    found: dict[str, Any] = {
        "name": arm.name,
        "setting": None if arm.setting is None else arm.setting.__dict__,
        "bytes": arm.bytes,
        "tokens_per_second": arm.tokens_per_second,
    }
    for metric in ("nll", "nll_per_byte", "kl", "agreement"):
        values = arm.values(metric)
        found[metric] = None if values is None else macro_mean(values)
    found["perplexity"] = math.exp(found["nll"])
    found["perplexity_per_byte"] = math.exp(found["nll_per_byte"])
    for metric in ("kl", "nll_per_byte"):
        found[f"{metric}_minus_first"] = _difference(arm, first, metric)
    return found


def _difference(arm: Arm, first: Arm, metric: str) -> list[float] | None:
    """Return the 95 % paired bootstrap interval of an arm minus the first setting."""
    ours, theirs = arm.values(metric), first.values(metric)
    if arm is first or ours is None or theirs is None:
        return None
    return [
        *bootstrap(
            {
                file: [a - b for a, b in zip(ours[file], theirs[file], strict=True)]
                for file in ours
            }
        )
    ]


def first_setting(arms: Sequence[Arm]) -> Arm:
    """Return the setting that the others are compared with."""
    return next((arm for arm in arms if arm.setting is not None), arms[0])


def report(arms: Sequence[Arm], about: dict[str, Any]) -> str:
    """Return the Markdown page of a sweep: a table for each way to read the prompt.

    Args:
        arms: measured; the first is the dense model.
        about: ``model``, ``rows`` (file → count), ``tokens`` (decoded for the speed).
    """
    first = first_setting(arms)
    foreign = any(arm.values("kl") is None for arm in arms)
    counts = ", ".join(f"{name} {count}" for name, count in about["rows"].items())
    parts = [f"{about['model']}; rows: {counts}"]
    prefills = {arm.setting.prefill: None for arm in arms if arm.setting is not None}
    for prefill in prefills:
        rows = [a for a in arms if a.setting is None or a.setting.prefill == prefill]
        parts += [_title(prefill), _table(rows, first, foreign)]
    parts.append(_notes(arms, first, about, foreign))
    return "\n\n".join(parts)


def _title(prefill: Prefill) -> str:
    if prefill == "compact":
        return "**The prompt is read by the compact model**:"
    return "**The prompt is read by the dense model**, the answer by the compact one:"


def _table(arms: Sequence[Arm], first: Arm, foreign: bool) -> str:
    names = ["", "MB", "tokens/s", "NLL", "perplexity", "KL to dense", "agreement"]
    names += ["KL − first, 95 %", *(["NLL per byte"] if foreign else [])]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for arm in arms:
        found = summary(arm, first)
        same = found["kl"] is not None
        cells = [
            _label(arm),
            f"{found['bytes'] / MEGA:.3g}",
            _or_dash(found["tokens_per_second"], ".1f"),
            f"{found['nll']:.3f}" if same else "–",
            f"{found['perplexity']:.3g}" if same else "–",
            _or_dash(found["kl"], ".3f"),
            _or_dash(found["agreement"], ".1%"),
            "first" if arm is first else _interval(found["kl_minus_first"]),
        ]
        if foreign:
            cells.append(f"{found['nll_per_byte']:.4f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _label(arm: Arm) -> str:
    return f"**{arm.name}**" if arm.setting is None else arm.setting.label


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _interval(pair: list[float] | None) -> str:
    return "–" if pair is None else "[{:+.2f}, {:+.2f}]".format(*pair)


def _notes(
    arms: Sequence[Arm], first: Arm, about: dict[str, Any], foreign: bool
) -> str:
    notes = (
        "NLL in nats per answer token; KL from the dense model's next-token "
        "distribution, in nats; agreement: how often both would choose the same "
        "token. Means over rows, then over files; perplexity is e to the mean NLL. "
        f"Intervals: paired bootstrap over rows against {first.name}; they cover no "
        "other data or model. MB: the weights, embeddings included, a number that is "
        "not quantised at 2 bytes."
    )
    if about["tokens"]:
        notes += (
            f" tokens/s: measured here on {about['device']}, {about['tokens']} tokens "
            "at batch 1, median of turns in which the models alternate; whole models "
            "and compact ones alike."
        )
    if foreign:
        notes += (
            " A model with another tokenizer has no KL to the dense one, and its NLL "
            "per token is no comparison: read the NLL per byte of the answers."
        )
    return notes + "\n\n" + _verdict(arms)


def _verdict(arms: Sequence[Arm]) -> str:
    """Say how many selections are further from the dense model than a whole model of at
    most their size.
    """
    compact = [arm for arm in arms if arm.setting is not None]
    whole = [arm for arm in arms[1:] if arm.setting is None and arm.values("kl")]
    best = {
        arm.name: min(macro_mean(r.values("kl") or {}) for r in rivals)
        for arm in compact
        if (rivals := [rival for rival in whole if rival.bytes <= arm.bytes])
    }
    if not best:
        return "No whole model that is no larger was measured beside a selection."
    worse = sum(
        best[arm.name] < macro_mean(arm.values("kl") or {})
        for arm in compact
        if arm.name in best
    )
    return (
        f"Whole models of no more bytes were measured beside {len(best)} selections; the "
        f"best of them is nearer to the dense model than {worse} of these selections."
    )
