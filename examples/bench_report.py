"""Turn the rows that selectors_bench.py measured into a page."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ifp_mlx.evaluation.statistics import macro_mean

PAGES = Path(__file__).parent
SAMPLES = 2000
DEFAULT = "blend, first-layer"
STATIC_UNSEEN = "others, first-layer"
ONE_TOKEN = ("boolq",)  # answers of one token say too little for a mean

HEAD = """Made by `python examples/selectors_bench.py`, whose first lines say where each
mask comes from; {minutes:.0f} minutes of one processor core. KL from the dense model's
next-token distribution in nats, and NLL: means over the answer tokens of a family, then
over families; "KL per row" takes the mean over rows first. Families with answers of one
token (boolq) are left out of both. The intervals are 95 % of a paired bootstrap over
prompts: they do not cover another model or other families. The default is `blend,
first-layer`, the unseen static mask `others, first-layer`."""

# way → family → row → metrics
Rows = dict[str, dict[str, dict[int, dict[str, float]]]]


def by_way(lines: Iterable[dict]) -> Rows:
    """Return the results by way, family and row, for rows that every way has."""
    found: Rows = {}
    for line in lines:
        families = found.setdefault(line["way"], {})
        families.setdefault(line["family"], {})[line["row"]] = line
    for family in {name for families in found.values() for name in families}:
        common = set.intersection(*(set(s.get(family, {})) for s in found.values()))
        for families in found.values():
            families[family] = {n: families[family][n] for n in sorted(common)}
    return found


def family_mean(rows: dict[int, dict[str, float]], metric: str) -> float:
    """Return the mean over all answer tokens of a family."""
    tokens = [row["tokens"] for row in rows.values()]
    return float(np.average([row[metric] for row in rows.values()], weights=tokens))


def per_token(families: dict[str, dict[int, dict[str, float]]], metric: str) -> float:
    """Return the mean over all answer tokens of a family, then over families."""
    means = [
        family_mean(rows, metric)
        for name, rows in families.items()
        if name not in ONE_TOKEN
    ]
    return float(np.mean(means))


def per_row(families: dict[str, dict[int, dict[str, float]]], metric: str) -> float:
    """Return the mean over rows, then over families."""
    return macro_mean(
        {
            name: [row[metric] for row in rows.values()]
            for name, rows in families.items()
            if name not in ONE_TOKEN
        }
    )


def interval(a: dict, b: dict) -> tuple[float, float]:
    """Return the 95 % paired bootstrap interval of the KL per token of ``a`` minus
    that of ``b``: prompts are drawn anew within each family.
    """
    rng = np.random.default_rng(0)
    means = np.zeros(SAMPLES)
    names = [name for name in a if name not in ONE_TOKEN]
    for name in names:
        pairs = [(a[name][n], b[name][n]) for n in a[name]]
        difference = np.array([one["kl"] - other["kl"] for one, other in pairs])
        tokens = np.array([one["tokens"] for one, _ in pairs])
        picks = rng.integers(0, len(pairs), (SAMPLES, len(pairs)))
        total = (difference * tokens)[picks].sum(axis=1)
        means += total / tokens[picks].sum(axis=1) / len(names)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def table(ways: Rows) -> list[str]:
    """Return the lines of the table of one keep, best first."""
    lines = [
        "| scores, allocation | KL per token | KL per row | NLL | agreement | KL − default | KL − unseen static |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in sorted(ways, key=lambda name: per_token(ways[name], "kl")):
        found = ways[name]
        cells = [
            f"{per_token(found, 'kl'):.3f}",
            f"{per_row(found, 'kl'):.3f}",
            f"{per_token(found, 'nll'):.3f}",
            f"{per_token(found, 'agreement'):.1%}",
        ]
        cells += [
            ""
            if name == to
            else "[{:+.2f}, {:+.2f}]".format(*interval(found, ways[to]))
            for to in (DEFAULT, STATIC_UNSEEN)
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def family_table(ways: Rows) -> list[str]:
    """Return the lines of a table of the KL per token in each family."""
    families = sorted(ways[DEFAULT])
    lines = ["| | " + " | ".join(families) + " |", "|---" * (len(families) + 1) + "|"]
    for name in sorted(ways, key=lambda name: per_token(ways[name], "kl")):
        metric, label = ("nll", "dense: NLL") if name == "dense" else ("kl", name)
        means = [f"{family_mean(ways[name][f], metric):.2f}" for f in families]
        lines.append(f"| {label} | " + " | ".join(means) + " |")
    return lines


def write_report(model: str, lines: Sequence[dict]) -> Path:
    """Write examples/selectors-MODEL.md and return it."""
    found = [line for line in lines if line["family"] != "all"]
    seconds = sum(line["seconds"] for line in lines if line["family"] == "all")
    keeps = sorted({line["keep"] for line in found}, reverse=True)
    text = [f"# Ways of selecting, {model}", "", HEAD.format(minutes=seconds / 60)]
    for keep in keeps:
        ways = by_way(line for line in found if line["keep"] == keep)
        counts = {name: len(rows) for name, rows in sorted(ways[DEFAULT].items())}
        shown = ", ".join(f"{name} {count}" for name, count in counts.items())
        text += ["", f"## Keep {keep:.3g}", "", f"Rows: {shown}.", "", *table(ways)]
        text += ["", "KL per token by family:", "", *family_table(ways)]
    page = PAGES / f"selectors-{model}.md"
    page.write_text("\n".join(text) + "\n", encoding="utf-8")
    return page
