"""Write examples/quality.md: what selection costs, in one table for each model.

    python examples/quality.py

From examples/selectors-*.csv, the rows that selectors_bench.py measured.
"""

from statistics import median

import numpy as np
from bench_report import (
    DENSE,
    ONE_TOKEN,
    PAGES,
    Ways,
    interval,
    macro,
    read_lines,
    values,
    ways_of,
)
from bench_ways import COMPENSATED, DEFAULT, STAGES, STATIC, Stage, Way

MODELS = {"smollm2": "SmolLM2-135M-Instruct", "gemma3": "Gemma-3-270m (base)"}
KEEPS = sorted({stage.keep for stage in STAGES}, reverse=True)

HEAD = """# What selection costs untrained models

Written by `python examples/quality.py` from the rows that `selectors_bench.py` measured:
ten families of tasks, float32 on a Linux CPU, not run on a Mac. In each cell: KL from the
dense model's next-token distribution in nats per answer token, its 95 % interval, and how
often both would choose the same token. Rows are few at some keeps, so compare ways within
a keep, and by the paired intervals on the page of each model, which also says how the
means are taken. Both models come from 4-bit files and are small; what larger ones bear is
not measured here.
"""

# What is compared at keep 0.5: words, a way, and the way it is set against.
PARTS = (
    (
        "the prompt read by the compact model, not the dense one",
        Way("activation", "uniform"),
        Way("activation", "uniform", prompt="dense"),
    ),
    (
        "the same of the default",
        DEFAULT,
        DEFAULT._replace(prompt="dense"),
    ),
    (
        "the first layer whole, the same total: the default",
        DEFAULT,
        DEFAULT._replace(allocation="uniform"),
    ),
    (
        "the same of a static mask",
        STATIC,
        STATIC._replace(allocation="uniform"),
    ),
    (
        "the same of a task mask",
        Way("task", "first-layer"),
        Way("task", "uniform"),
    ),
    (
        "the prompt and the prior, not the prompt alone",
        DEFAULT,
        Way("activation", "first-layer"),
    ),
    (
        "the prompt and the prior, not the prior alone",
        DEFAULT,
        Way("prior", "first-layer"),
    ),
    ("the default, not a static mask of other families", DEFAULT, STATIC),
    ("a task mask, not the default", Way("task", "sensitivity"), DEFAULT),
    (
        "widths by sensitivity, not the first layer whole: the default",
        Way("blend", "sensitivity"),
        DEFAULT,
    ),
    (
        "the same of a task mask",
        Way("task", "sensitivity"),
        Way("task", "first-layer"),
    ),
    (
        "its costs measured on the package's text: the default",
        Way("blend", "sensitivity", costs="package"),
        DEFAULT,
    ),
    (
        "compensated by the prompt (`--compensate`)",
        DEFAULT._replace(compensation="prompt"),
        DEFAULT,
    ),
    (
        "a task mask compensated by its examples",
        COMPENSATED,
        Way("task", "sensitivity"),
    ),
    (
        "the same with the first layer whole",
        COMPENSATED._replace(allocation="first-layer"),
        Way("task", "first-layer"),
    ),
    (
        "the same with uniform widths",
        COMPENSATED._replace(allocation="uniform"),
        Way("task", "uniform"),
    ),
)
PARTS_NOTES = """
The first layer is what SmolLM2 needs most and Gemma-3-270m among what it needs least, so
keeping it whole, the default, is right for one and slightly wrong for the other. Widths
by a sensitivity that was measured on examples of tasks (`ifp_mlx.sensitivity --data`) are
no worse than the default's on either, within what these rows can tell. Measured on the
text that ships with the package they are better for Gemma-3-270m and clearly worse for
SmolLM2. No rule that chooses by the model follows from that: a measurement is used where
`--allocation sensitivity` asks for it.

Compensation helped every way it was tried with, on both models: a task mask's by its
examples is what `compact --task` writes and `generate --task --compensate` does. With
uniform widths, which every program loads, SmolLM2's is closer to the dense model than
one with widths by sensitivity is without it.
"""
MEANS_NOTES = """
Which mean is taken moves a figure by at most 0.04, and decides about no goal: all four
are missed, the default's by less than its interval is wide, GRIFFIN's (activation,
uniform) and the task mask's by 0.06 to 0.10. The prompts are others than the trial's, so
what a way gains over another on the same rows is the safer figure. A compensated task
mask, which had no goal, is well below the task mask's.

GRIFFIN is an algorithm with nothing to choose, so that its KL tells how hard the rows are.
Family by family, SmolLM2, activation, uniform:
"""
ROWS_NOTES = """
In code, question generation, data-to-text and HellaSwag it is the trial's. It is above it
in math, dialog and prose; of these only math is harder for the dense model here than in
the trial, and why the other two differ is not known.
"""
RUN_NOTES = """
## How it was run

In several goes, each gone on with where the last was stopped, from the published rows
too. The first costs of SmolLM2's layers were measured at five widths, which took 12 of
the 15 minutes of that calibration, and read off between two of them at keep 0.333; now
they are measured at the keep itself: 46 seconds of one core for the prior, 114 for the
statistics of the families, 144 for the costs at one keep, 87 for those on the package's
text. By the seconds of its rows, measured while other work shared the two cores, all of
SmolLM2's tables at 40 rows a family would take {minutes} minutes of both, {before} of
them for calibration.
"""
CALIBRATION_SECONDS = 46 + 114 + 3 * 144 + 87
PARTS_HEAD = """## What each part is worth at keep 0.5

The change of KL per token, with its paired 95 % interval over prompts and the number of
rows; below zero is better. Intervals from two or three rows of a family are too narrow.
"""

# What a trial on other prompts of such tasks found SmolLM2 to reach, KL per token.
GOALS = {
    Way("activation", "uniform"): 1.62,
    Way("activation", "uniform", prompt="dense"): 1.40,
    DEFAULT: 1.32,
    Way("task", "sensitivity"): 1.05,
}
# Of the same trial, by family: KL per token of activation, uniform, and the dense NLL.
TRIAL = {
    "code": (1.66, 1.34),
    "math": (1.47, 1.33),
    "qgen": (1.56, 3.47),
    "facts": (1.23, 2.65),
    "dialog": (1.76, 3.85),
    "prose": (1.57, 3.12),
    "sql": (1.90, 3.20),
    "data2text": (1.53, 2.22),
    "hella": (1.73, 3.16),
}
MEANS_HEAD = """## Per token or per row, at keep 0.5

Everywhere else on this page a family's mean counts each answer token the same, as "KL per
token" says. Counting each row the same instead gives short answers more say. Either way
the families then count the same. The goals, of SmolLM2, are from a trial on other prompts
of such tasks, which did not say which of the two its means were.
"""


def page() -> str:
    """Return the page, for all models that were measured."""
    text = [HEAD]
    for name, title in MODELS.items():
        if (PAGES / f"selectors-{name}.csv").exists():
            text += [f"## {title}", "", *model_table(name), ""]
    names = [n for n in MODELS if (PAGES / f"selectors-{n}.csv").exists()]
    text += [PARTS_HEAD, *parts_table(names), PARTS_NOTES]
    text += [MEANS_HEAD, *means_table(names), MEANS_NOTES]
    text += [*trial_table("smollm2"), ROWS_NOTES]
    text.append(run_notes(read_lines("smollm2")).lstrip())
    return "\n".join(text)


def run_notes(lines: list[dict], rows: int = 40, cores: int = 2) -> str:
    """Return how it was run, and what it would take with so many rows of each family."""
    seconds: dict[tuple, list[float]] = {}
    for line in lines:
        seconds.setdefault((line["way"], line["keep"]), []).append(line["seconds"])
    families = len({line["family"] for line in lines}) - 1  # one is "all"
    planned: dict[tuple, int] = {}
    for stage in STAGES:
        for way in stage.ways:
            key = way.name, round(stage.keep, 3)
            planned[key] = max(planned.get(key, 0), stage.rows(rows))
        dense = DENSE, round(stage.keep, 3)
        planned[dense] = max(planned.get(dense, 0), stage.rows(rows))
    spent = 0.0
    for key, count in planned.items():
        if found := seconds.get(key):
            left = max(0, count * families - len(found))
            spent += sum(found) + median(found) * left
    before = CALIBRATION_SECONDS / cores / 60
    minutes = before + spent / cores / 60
    return RUN_NOTES.format(minutes=round(minutes), before=round(before))


def means_table(names: list[str]) -> list[str]:
    """Return the lines of the table of both means, two columns for each model."""
    stage = STAGES[0]
    ways = {MODELS[name]: ways_of(read_lines(name), stage) for name in names}
    head = [f"{m}, {count_of(w)} rows: per token | per row" for m, w in ways.items()]
    text = [
        "| | goal | " + " | ".join(head) + " |",
        "|---" * (2 * len(names) + 2) + "|",
    ]
    for way in stage.ways:
        cells = [f"{GOALS[way]:.2f}" if way in GOALS else ""]
        for found in ways.values():
            rows = found.get(way.name)
            for per_token in (True, False):
                mean = macro(rows, "kl", per_token=per_token) if rows else None
                cells.append("" if mean is None else f"{mean:.3f}")
        text.append(f"| {way.name} | " + " | ".join(cells) + " |")
    return text


def trial_table(name: str) -> list[str]:
    """Return the lines of a table of GRIFFIN's KL and the dense NLL beside the trial's."""
    stage = STAGES[0]
    ways = ways_of(read_lines(name), stage)
    text = ["| | KL | the trial's | dense NLL | the trial's |", "|---|---|---|---|---|"]
    for family, (kl, nll) in TRIAL.items():
        row = [
            f"{np.average(found, weights=weights):.2f} | {goal:.2f}"
            for way, metric, goal in (
                (stage.ways[0].name, "kl", kl),
                (DENSE, "nll", nll),
            )
            for found, weights in [values(ways[way][family], metric)]
        ]
        text.append(f"| {family} | {' | '.join(row)} |")
    return text


def parts_table(names: list[str]) -> list[str]:
    """Return the lines of the table of differences, a column for each model."""
    text = ["| | " + " | ".join(MODELS[name] for name in names) + " |"]
    text.append("|---" * (len(names) + 1) + "|")
    lines = {name: read_lines(name) for name in names}
    for words, way, other in PARTS:
        row = [difference(lines[name], way, other) for name in names]
        text.append(f"| {words} | {' | '.join(row)} |")
    return text


def difference(lines: list[dict], way: Way, other: Way) -> str:
    """Return how a way's KL at keep 0.5 differs from another's, on all their rows."""
    ways = ways_of(lines, Stage((way, other), 0.5, 1))
    if not {way.name, other.name} <= set(ways):
        return ""
    one, two = ways[way.name], ways[other.name]
    low, high = interval(one, two)
    mean = macro(one, "kl") - macro(two, "kl")
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}], {count_of(ways)}"


def count_of(ways: Ways) -> int:
    """Return how many rows count in a table's means."""
    dense = ways[DENSE].items()
    return sum(len(found) for name, found in dense if name not in ONE_TOKEN)


def model_table(name: str) -> list[str]:
    """Return a model's lines, a row of the table for each way."""
    cells, rows = cells_of(read_lines(name))
    ways = list(dict.fromkeys(way for way, _ in cells))
    counts = ", ".join(f"{rows[keep]} at keep {keep:.3g}" for keep in KEEPS)
    text = [
        f"Rows in the means: {counts} ([more about them](selectors-{name}.md)).",
        "",
        "| scores, allocation | " + " | ".join(f"{k:.3g}" for k in KEEPS) + " |",
        "|---" * (len(KEEPS) + 1) + "|",
    ]
    for way in ways:
        label = f"**{way}** (the default)" if way == DEFAULT.name else way
        row = [cells.get((way, keep), "") for keep in KEEPS]
        text.append(f"| {label} | {' | '.join(row)} |")
    return text


def cells_of(
    lines: list[dict],
) -> tuple[dict[tuple[str, float], str], dict[float, int]]:
    """Return each way's cell at each keep, from the stage with most rows, and how many
    rows that keep has.
    """
    cells: dict[tuple[str, float], str] = {}
    rows: dict[float, int] = {}
    for stage in STAGES:
        ways = ways_of(lines, stage)
        if not ways[DENSE]:
            continue
        count = count_of(ways)
        rows.setdefault(stage.keep, count)
        for way in stage.ways:
            if way.name not in ways:
                continue
            found = ways[way.name]
            low, high = interval(found)
            text = f"{macro(found, 'kl'):.2f} [{low:.2f}, {high:.2f}]"
            text += f", {macro(found, 'agreement'):.0%}"
            text += "" if count == rows[stage.keep] else f" ({count} rows)"
            cells.setdefault((way.name, stage.keep), text)
    return cells, rows


if __name__ == "__main__":
    (PAGES / "quality.md").write_text(page(), encoding="utf-8")
