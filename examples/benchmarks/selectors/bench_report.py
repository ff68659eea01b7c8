"""Turn the rows that selectors_bench.py measured into a page.

    python -m examples.benchmarks.selectors.bench_report smollm2

Reads selectors-smollm2.csv and writes selectors-smollm2.md, both beside this file.
"""

import csv
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from .bench_ways import DEFAULT, STAGES, STATIC, Stage

PAGES = Path(__file__).parent
FIELDS = ("family", "row", "way", "keep", "tokens", "nll", "kl", "agreement", "seconds")
DENSE = "dense"
CALIBRATION = "calibration"  # the line that says how long preparing took
ALL = "all"  # its family
SAMPLES = 2000
ONE_TOKEN = ("boolq",)  # answers of one token say too little for a mean

HEAD = """Made by `python -m examples.benchmarks.selectors.selectors_bench {model}
--rows {rows} --answer-tokens {tokens}`,
whose first lines say where each mask comes from; from the rows in
[selectors-{model}.csv](selectors-{model}.csv); float32 on a Linux CPU, not run on a Mac.
{spent} of one processor core.

KL is from the dense model's next-token distribution to the pruned one's at the tokens of
the reference answer, in nats. *Per token*: mean over all answer tokens of a family, then
over families; NLL and agreement likewise. *Per row*: mean over a row's tokens,
over a family's rows, then over families. Families with answers of one token (boolq) are
left out of all means. Intervals are 95 % of a bootstrap that draws the rows of each
family anew; those of differences are paired. They cover no other families and no other
model, and from four rows of a family or fewer they are too narrow. The default is
`{default}`; its fair opponent, `{static}`,
is one mask for all prompts of a family that it has not seen."""

Row = Mapping[str, float]
Ways = dict[str, dict[str, dict[int, Row]]]  # way → family → row → metrics


def ways_of(lines: Iterable[Mapping], stage: Stage) -> Ways:
    """Return the results of a stage's ways, for rows that every one of them has; one
    that was not measured at all is left out.
    """
    names = (DENSE, *(way.name for way in stage.ways))
    found: Ways = {name: {} for name in names}
    for line in lines:
        if line["way"] in found and line["keep"] == round(stage.keep, 3):
            rows = found[line["way"]].setdefault(line["family"], {})
            rows[line["row"]] = line
    found = {name: ways for name, ways in found.items() if ways or name == DENSE}
    for family, rows in list(found[DENSE].items()):
        common = set.intersection(*(set(w.get(family, {})) for w in found.values()))
        tokens = {n: rows[n]["tokens"] for n in sorted(common)}
        for ways in found.values():
            measured = ways.pop(family, {})
            if common:
                ways[family] = {
                    n: {**measured[n], "tokens": t} for n, t in tokens.items()
                }
    return found


def values(
    rows: Mapping[int, Row], metric: str, *, per_token: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Return a family's values and how much each weighs."""
    weights = [row["tokens"] if per_token else 1.0 for row in rows.values()]
    return np.array([row[metric] for row in rows.values()]), np.array(weights)


def macro(
    families: Mapping[str, Mapping[int, Row]], metric: str, *, per_token: bool = True
) -> float:
    """Return the mean over a family's tokens or rows, then over families."""
    means = [
        np.average(found, weights=weights)
        for name, rows in families.items()
        if name not in ONE_TOKEN
        for found, weights in [values(rows, metric, per_token=per_token)]
    ]
    return float(np.mean(means))


def interval(
    one: Mapping[str, Mapping[int, Row]],
    other: Mapping[str, Mapping[int, Row]] | None = None,
    *,
    per_token: bool = True,
) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a way's mean KL, or of the difference of
    two ways' on the same rows.
    """
    rng = np.random.default_rng(0)
    means = np.zeros(SAMPLES)
    names = [name for name in one if name not in ONE_TOKEN]
    for name in names:
        found, weights = values(one[name], "kl", per_token=per_token)
        if other is not None:
            found = found - values(other[name], "kl")[0]
        picks = rng.integers(0, len(found), (SAMPLES, len(found)))
        total = (found * weights)[picks].sum(axis=1)
        means += total / weights[picks].sum(axis=1) / len(names)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def table(ways: Ways) -> list[str]:
    """Return the lines of the table of one stage, best first."""
    lines = [
        "| scores, allocation | KL per token | KL per row | NLL | agreement "
        "| KL − default per token | per row | KL − unseen static per token |",
        "|---|---|---|---|---|---|---|---|",
    ]
    compared = [(DEFAULT.name, True), (DEFAULT.name, False), (STATIC.name, True)]
    for name in _ranked(ways):
        found = ways[name]
        cells = [
            "{:.3f} [{:.2f}, {:.2f}]".format(macro(found, "kl"), *interval(found)),
            f"{macro(found, 'kl', per_token=False):.3f}",
            f"{macro(found, 'nll'):.3f}",
            f"{macro(found, 'agreement'):.1%}",
        ]
        for other, per_token in compared:
            if name == other or other not in ways:
                cells.append("")
                continue
            low, high = interval(found, ways[other], per_token=per_token)
            cells.append(f"[{low:+.2f}, {high:+.2f}]")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def family_table(ways: Ways) -> list[str]:
    """Return the lines of a table of the KL per token in each family."""
    families = sorted(ways[DENSE])
    lines = ["| | " + " | ".join(families) + " |", "|---" * (len(families) + 1) + "|"]
    for name in [*_ranked(ways), DENSE]:
        metric, label = ("nll", "dense: NLL") if name == DENSE else ("kl", name)
        means = []
        for family in families:
            found, weights = values(ways[name][family], metric)
            means.append(f"{np.average(found, weights=weights):.2f}")
        lines.append(f"| {label} | " + " | ".join(means) + " |")
    return lines


def _ranked(ways: Ways) -> list[str]:
    names = [name for name in ways if name != DENSE]
    return sorted(names, key=lambda name: macro(ways[name], "kl"))


def page_of(model: str, lines: Sequence[Mapping]) -> str:
    """Return the page for all results of a model."""
    seconds = sum(line["seconds"] for line in lines)
    before = sum(line["seconds"] for line in lines if line["way"] == CALIBRATION)
    head = HEAD.format(
        model=model,
        rows=1 + max(line["row"] for line in lines if line["way"] == DENSE),
        tokens=round(max(line.get("tokens", 0) for line in lines)),
        spent=f"{seconds / 60:.0f} minutes, {before / 60:.0f} of them for calibration,",
        default=DEFAULT.name,
        static=STATIC.name,
    )
    text = [f"# Ways of selecting, {model}", "", head]
    for stage in STAGES:
        ways = ways_of(lines, stage)
        if not ways[DENSE]:
            continue
        counts = {name: len(rows) for name, rows in sorted(ways[DENSE].items())}
        shown = ", ".join(f"{name} {count}" for name, count in counts.items())
        text += ["", f"## Keep {stage.keep:.3g}", "", f"Rows: {shown}.", ""]
        text += [*table(ways), "", "KL per token by family:", "", *family_table(ways)]
    return "\n".join(text) + "\n"


def write_report(model: str, lines: Iterable[Mapping]) -> Path:
    """Write selectors-MODEL.csv and .md, and return the page."""
    ordered = sorted(lines, key=lambda line: [str(line[name]) for name in FIELDS[:4]])
    with (PAGES / f"selectors-{model}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(ordered)
    return write_page(model)


def write_page(model: str) -> Path:
    """Write selectors-MODEL.md from the rows beside it."""
    page = PAGES / f"selectors-{model}.md"
    page.write_text(page_of(model, read_lines(model)), encoding="utf-8")
    return page


def read_lines(model: str) -> list[dict]:
    """Return the lines of selectors-MODEL.csv, as they were logged."""
    with (PAGES / f"selectors-{model}.csv").open(newline="") as file:
        texts = list(csv.DictReader(file))
    lines: list[dict] = []
    for text in texts:
        given = {name: value for name, value in text.items() if value}
        whole = {name: int(given[name]) for name in ("row", "tokens") if name in given}
        lines.append(
            given | {n: float(given[n]) for n in FIELDS[3:] if n in given} | whole
        )
    return lines


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(
            "usage: python -m examples.benchmarks.selectors.bench_report smollm2|gemma3"
        )
    print(write_page(sys.argv[1]))
