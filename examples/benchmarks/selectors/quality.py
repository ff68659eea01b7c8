"""Write quality.md: what selection costs, in one table for each model.

    python -m examples.benchmarks.selectors.quality

From selectors-*.csv, the rows that selectors_bench.py measured.
"""

import numpy as np

from .bench_report import (
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
from .bench_ways import (
    ACTIVATION,
    ALONE,
    COMPENSATED,
    DEFAULT,
    GRIFFIN,
    PLAIN,
    STAGES,
    STATIC,
    TASK,
    Stage,
    Way,
)

MODELS = {"smollm2": "SmolLM2-135M-Instruct", "gemma3": "Gemma-3-270m (base)"}
KEEPS = sorted({stage.keep for stage in STAGES}, reverse=True)

HEAD = """# What selection costs untrained models

Written by `python -m examples.benchmarks.selectors.quality` from the rows that
`selectors_bench.py` measured: ten families of tasks, float32 on a Linux CPU, not run on a
Mac. Each cell has the KL from the dense model's next-token distribution in nats per answer
token, its 95 % interval, and how often both models would choose the same token. Some keeps
have few rows, so compare ways within a keep, and by the paired intervals on the page of
each model, which also says how the means are taken. Both models come from 4-bit files and
are small; how much larger ones can lose is not measured here.

*Compensated by* names the text that compensates. Beside it stands a sketch of the package's
calibration text; *alone* means without the sketch, as it was before there was one. An empty
cell was not measured.
"""

# What is compared at keep 0.5: words, a way, and the way it is set against.
PARTS = (
    ("a sketch beside the prompt, not the prompt alone: the default", DEFAULT, ALONE),
    (
        "the same where activation chooses",
        ACTIVATION,
        ACTIVATION._replace(alone=True),
    ),
    (
        "the same of a task mask's examples",
        COMPENSATED,
        COMPENSATED._replace(alone=True),
    ),
    ("chosen by merit, not by activation: the default", DEFAULT, ACTIVATION),
    ("the default, not a blend that does not compensate", DEFAULT, PLAIN),
    ("the default, not a static mask of other families", DEFAULT, STATIC),
    ("a compensated task mask, not the default", COMPENSATED, DEFAULT),
    (
        "the first layer whole, the same total: the default",
        DEFAULT,
        DEFAULT._replace(allocation="uniform"),
    ),
    (
        "widths by sensitivity, not the first layer whole: the default",
        DEFAULT._replace(allocation="sensitivity"),
        DEFAULT,
    ),
    (
        "the prompt read by the compact model, not the dense one: the default",
        DEFAULT,
        DEFAULT._replace(prompt="dense"),
    ),
    ("compensated by the prompt alone", ALONE, PLAIN),
    (
        "the same where activation chooses",
        ACTIVATION._replace(alone=True),
        Way("activation", "first-layer"),
    ),
    (
        "the same with uniform widths",
        ALONE._replace(allocation="uniform"),
        Way("blend", "uniform"),
    ),
    (
        "a task mask compensated by its examples alone",
        COMPENSATED._replace(alone=True),
        TASK,
    ),
    (
        "the same with the first layer whole",
        COMPENSATED._replace(allocation="first-layer", alone=True),
        Way("task", "first-layer"),
    ),
    ("compensated alone, not a static mask of other families", ALONE, STATIC),
    ("the same, not compensated", PLAIN, STATIC),
    (
        "a task mask, both compensated alone, not the prompt's",
        COMPENSATED._replace(alone=True),
        ALONE,
    ),
    ("neither compensated", TASK, PLAIN),
    (
        "the prompt read by the compact model, compensated alone, not the dense one",
        ALONE,
        ALONE._replace(prompt="dense"),
    ),
    ("the same, not compensated", PLAIN, PLAIN._replace(prompt="dense")),
    ("the same, of GRIFFIN", GRIFFIN, GRIFFIN._replace(prompt="dense")),
    (
        "the first layer whole, the same total, compensated alone",
        ALONE,
        ALONE._replace(allocation="uniform"),
    ),
    ("the same, not compensated", PLAIN, PLAIN._replace(allocation="uniform")),
    ("the same of a static mask", STATIC, STATIC._replace(allocation="uniform")),
    ("the same of a task mask", Way("task", "first-layer"), Way("task", "uniform")),
    (
        "the prompt and the prior, not the prompt, both compensated alone",
        ALONE,
        ACTIVATION._replace(alone=True),
    ),
    ("the same, not compensated", PLAIN, Way("activation", "first-layer")),
    (
        "the prompt and the prior, not the prior alone, not compensated",
        PLAIN,
        Way("prior", "first-layer"),
    ),
    (
        "widths by sensitivity, not the first layer whole, compensated alone",
        ALONE._replace(allocation="sensitivity"),
        ALONE,
    ),
    ("the same, not compensated", Way("blend", "sensitivity"), PLAIN),
    ("the same of a task mask", TASK, Way("task", "first-layer")),
    (
        "its costs measured on the package's text, not compensated",
        Way("blend", "sensitivity", costs="package"),
        PLAIN,
    ),
)
PARTS_NOTES = """
The following was found with compensation by one text alone, before a sketch of the
package's calibration text was added to it.

Compensation helped every way it was tried with, on both models, and helped most where the
mask is worst. With it the compact model reads the prompt nearly as well as the dense model,
so it hardly matters which of them reads; `generate` goes on from the dense model's keys and
values because that saves time. It also makes up for half of what SmolLM2 loses by uniform
widths, which every program loads.

In a model at 4 bits, whole quantisation groups of `down_proj` can be kept without
quantising again. But they leave hardly any choice: of 64 channels that lie side by side, some
are needed and some are not. So such models keep single channels, and `down_proj` is
quantised again.

The first layer is what SmolLM2 needs most and Gemma-3-270m among what it needs least, so
keeping it whole, the default, is right for one and costs the other 0.03. Widths by a
sensitivity that was measured on examples of tasks (`ifp_mlx.sensitivity --data`) are a
little better than the default's on both, where compensated. Measured on the text that ships
with the package they are better for Gemma-3-270m and clearly worse for SmolLM2. So
no rule could choose for each model, and the measurement is used only where
`--allocation sensitivity` asks for it.

Other ways were tried with SmolLM2 on 36 calibration prompts of the earlier, shorter rows,
and given up; their scripts were not kept. Without compensation the KL was 1.19, with
compensation by the prompt alone 0.87. Compensating each layer for what the compact model
before it makes of the prompt had 0.94 to 0.99, and for its residual error too 1.35 and
more; the prompt together with 256 tokens of the package's text, whose channels would have
to be stored, 0.82, with 1,024 tokens 0.78; that text alone 1.15; scores by leverage 0.89 to
0.94, weighted by the columns of `down_proj` 0.98; more of the prior 0.85, less 0.91. A
short instruction in place of the prompt had 1.38, and 1.28 compensated by it.

The sketch, and the figure by which channels are chosen, were found on nine calibration
prompts of SmolLM2, one of each family, by scripts that were not kept. The KL at keep 0.5 /
at 0.75 was 0.90 / 0.41 for channels chosen by ranks and compensated by the prompt alone.
A channel's *energy* is the sum of its squares over the rows; its *worth* is what of that the
other channels could not make up for. With the sketch beside the prompt the KL was
0.82 / 0.36 by ranks, 0.76 / 0.38 by worth, 0.80 / 0.36 by the mean of both rankings, and
0.79 at 0.5 by energy. With channels chosen by worth the model chooses the dense model's
token less often than by ranks at 0.75, 71 % against 77 %, and more often at 0.5, 68 %
against 62 %. Therefore the default's scores, the *merit*, are worth plus a share of the
energy, and that share is larger the more is kept. A sketch of half of the calibration text, of fewer than
256 rows, or of the texts joined together was worse, one of 512 rows no better; so were
scores weighted by the columns of `down_proj`, and channels dropped in three rounds. Worth
or merit do not choose a task's mask better than its examples' use; such a mask gains from
2,000 tokens of examples instead of 1,000, from the sketch, and from a ridge whose
penalty grows with the number of rows.
"""
MEANS_NOTES = """
The default and the compensated masks are well within their goals. A table has the rows on
which each of its ways was measured. Over all 360 rows of SmolLM2, GRIFFIN (activation,
uniform) is as near to its own goals as these rows can tell: 1.616 or, per row, 1.636, where
the goal is 1.62; read by the dense model 1.408 or 1.404, slightly above the goal of 1.40,
with an interval of 1.35 to 1.46. GRIFFIN leaves nothing to choose, so its KL tells how hard
the rows are. Without compensation, on the same rows in a longer run, the prompt's mask is
at 1.310 (per row 1.352) and the task's at 1.189 (1.212), which misses its goal. Family by
family, SmolLM2, activation, uniform:
"""
ROWS_NOTES = """
Over all 360 rows it is within 0.1 of the trial's in all but math, which the dense model
finds harder here too.

Documents and conversations are taken whole, up to 4,000 characters. In an earlier version
of these rows they were cut at 900 and 1,100, to save time, and GRIFFIN was at 1.68 and,
read by the dense model, 1.48; the prompt's mask, compensated alone, at 1.02 (1.33 without),
the static mask of other families at 1.52, the task's at 0.78 (1.15). The cuts were ours;
the trial mentions none. They were lifted when probes beside the bench had shown that
GRIFFIN's KL depends on the length of a prompt, and that longer prompts should have 1.63 and
1.41. No third rule was tried, and only these rows were measured. In the probes, on 16
documents of the same source, with the first 48, 96, 160, 256 and 400 tokens as the prompt,
the KL is 2.27, 1.89, 1.68, 1.53 and 1.65 (read by the dense model 2.21, 1.79, 1.51, 1.32
and 1.41). The prompts here have 199 tokens on average in prose (97 when cut) and 369 in
dialog (180).
"""
RUN_NOTES = """
## How it was run

All of SmolLM2's tables, starting from nothing, took 38 minutes and 38 seconds on two cores
with nothing else to do, 10 of them for the prior, the statistics of the families and the
costs of the layers. Gemma's took 33 minutes with 10 rows a family, and 29 more with 40,
beside other work.
"""
PARTS_HEAD = """## What each part is worth at keep 0.5

The change of KL per token, with its paired 95 % interval over prompts and the number of
rows; below zero is better. Intervals from four rows of a family (36 rows) are too narrow.
"""

# What a trial on other prompts of such tasks found SmolLM2 to reach, KL per token.
GOALS = {
    GRIFFIN: 1.62,
    GRIFFIN._replace(prompt="dense"): 1.40,
    DEFAULT: 1.32,
    ALONE: 1.32,
    COMPENSATED: 1.05,
    COMPENSATED._replace(alone=True): 1.05,
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
token" says. Counting each row the same instead gives short answers more say. Either way the
families then count the same. The goals, for SmolLM2, are from a trial on other prompts of
such tasks, which did not say which of the two means it took.
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
    text.append(RUN_NOTES.lstrip())
    return "\n".join(text)


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
    ways = dict.fromkeys(way.name for stage in STAGES for way in stage.ways)
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
