"""Write the page and its picture from the results that are there.

python -m examples.benchmarks.frontier.report
"""

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from examples.benchmarks.pages import fill
from ifp_mlx.evaluation.log import Line
from ifp_mlx.evaluation.plotting import pyplot
from ifp_mlx.evaluation.statistics import bootstrap, macro_mean
from ifp_mlx.evaluation.tables import markdown
from ifp_mlx.files.atomic import new_file

from . import distilled
from .points import (
    ANSWER,
    AS_FILED,
    BASES,
    DENSE,
    DYNAMIC,
    POINTS,
    PROMPT,
    SELECTIONS,
    WHOLE,
    Point,
)
from .quantisers import AWQ_PIECES, PIECE

HERE = Path(__file__).parent
PAGE, PICTURE = HERE / "README.md", HERE / "frontier.svg"
README = HERE.parents[2] / "README.md"
# What the project's first page shows of SmolLM2, in its words.
SHORT = {
    "4 bits": "affine 4/64",
    "4 bits, half of the channels": "select 4/64 keep 0.5",
    "4 bits, a third of the channels": "select 4/64 keep 0.33",
    "3 bits": "affine 3/64",
    "3 bits, distilled for minutes (mlx-lm's DWQ)": "dwq 3/64",
    "2 bits": "affine 2/64",
}
MODELS = {"smollm2": "SmolLM2-135M-Instruct", "gemma3": "Gemma-3-270m (base)"}
KEY = ("point", "family", "row")
NUMBERS = ("tokens", "kl", "agreement", "nll")
Groups = dict[str, list[float]]  # of each family its rows' values, in one order

HEAD = """# When 4 bits do not fit

Written by `python -m examples.benchmarks.frontier.measure`. If a model does not fit a Mac,
there are two ways out: fewer bits for all weights, or fewer channels of a model at 4 or 8
bits, chosen by the prompt. Which is nearer to the dense model at the same bytes?

![KL from the dense model against megabytes](frontier.svg)

Computed in float32 on a Linux CPU from the quantised weights. Nothing was run on a Mac;
[what a Mac owner can check](../../guides/on_a_mac.md).
"""

HOW = f"""## How it was measured

**Rows.** Five [families of tasks](../selectors/task_families.py), whose prompts are short:
code, maths, prose, sentences to be finished, and data to be put into words. From each
family come the first rows whose prompts have {PROMPT} tokens at most, then the shortest of
the others; answers are cut to the first {ANSWER} tokens. Each model reads the prompt and
the reference answer itself. KL is from the dense model's next-token distribution, in nats a
token of the answer; *agreement* is how often both would choose the same token. Means are
over a row's tokens, over a family's rows, then over families. Intervals are 95 % of a
bootstrap over the rows of each family: they cover no other families and no other model.

**A fair start.** The models come from 4-bit files. Rounding them to 4 bits again may hit
nearly the same grid, cost too little, and be unfair to everything else. So every weight of
a linear layer or an embedding gets uniform noise as wide as its own 4-bit step in groups of
32, with a fixed seed. The result is one of the many models that the file may have been
rounded from, and it is the *dense* model here. In the table, *file* is the file as it came,
and *affine 4/32 of the file* is compared with that.

**Bytes.** They count all weights: packed ones, their scales and biases, and two bytes for
every number that is not quantised, as mlx-lm's folder has them on disk and in memory.
Scales and biases were rounded to 16 bits too. For a selection they count the compact model,
in memory or as a folder of its own; to select anew for another prompt, the whole quantised
model has to be on disk. The KV cache is the same for all, and left out.

**Whole models.** All were made by mlx-lm's own functions.

- *affine B/G*: B bits in groups of G.
- *mixed_L_H*: recipes, L bits for most layers and H for the others.
- *dynamic T*: layers with {", ".join(f"{low} or {high}" for low, high in DYNAMIC.values())}
  bits, mixed to T bits per weight. T is mlx-lm's count; it has scales of 32 bits here,
  hence half a bit more than the table.
- *awq* ([2306.00978](https://arxiv.org/abs/2306.00978)), embeddings at 4 bits in groups of 32.
- *gptq* ([2210.17323](https://arxiv.org/abs/2210.17323)), embeddings at 6 bits. It knows 2,
  4 and 8 bits.
- *dwq*: {distilled.STEPS} steps of {distilled.BATCH} times {distilled.PIECE} tokens, at a
  rate that was the best at 3 bits of those tried: {distilled.RATES["llama"]:g} for SmolLM2,
  {distilled.RATES["gemma3_text"]:g} for Gemma. With a GPU one would take many more steps.

Quantisers that need a text had the package's own dialogues, in pieces of {PIECE} tokens;
*awq*, whose search takes long, had one of every {AWQ_PIECES} pieces.

**Selections.** They are taken from *affine 4/64* and *8/64*, as `generate` selects by
default: by each prompt for itself, with a sketch of the package's own dialogues. A
layer keeps a multiple of 64 channels, each chosen by itself, and its `down_proj` is
quantised again. The ridge regression that compensates is related to GRAIL
([2602.23795](https://arxiv.org/abs/2602.23795)) and MoDeGPT
([2408.09632](https://arxiv.org/abs/2408.09632)), which use one text for all prompts.
Nothing was selected from the other quantisers' models.
"""


@dataclass(frozen=True)
class Result:
    """What was measured of one point."""

    point: Point
    bytes: int
    rows: dict[tuple[str, int], Line]

    def groups(self, metric: str, keys: Iterable[tuple[str, int]]) -> Groups:
        """Return a metric's values by family, of some rows."""
        found: Groups = {}
        for key in keys:
            found.setdefault(key[0], []).append(self.rows[key][metric])
        return found

    def mean(self, metric: str = "kl") -> float:
        """Return a metric's mean over rows, then families."""
        return macro_mean(self.groups(metric, sorted(self.rows)))

    def less(self, other: "Result") -> tuple[float, float, float]:
        """Return how much less the KL is than another's, on the rows of both, and the
        95 % interval.
        """
        keys = sorted(self.rows.keys() & other.rows.keys())
        mine, theirs = self.groups("kl", keys), other.groups("kl", keys)
        pairs = {f: zip(theirs[f], mine[f], strict=True) for f in mine}
        less = {family: [a - b for a, b in values] for family, values in pairs.items()}
        return macro_mean(less), *bootstrap(less)


class Model:
    """The results of one model, read from its files.

    Args:
        name: smollm2 or gemma3.
        folder: of the files.
    """

    def __init__(self, name: str, folder: Path = HERE) -> None:
        self.name, self.title = name, MODELS[name]
        text = (folder / f"about-{name}.json").read_text(encoding="utf-8")
        self.about: dict[str, Any] = json.loads(text)
        rows: dict[str, dict[tuple[str, int], Line]] = {}
        with (folder / f"results-{name}.csv").open(newline="") as file:
            for line in csv.DictReader(file):
                key = line["family"], int(line["row"])
                values = {number: float(line[number]) for number in NUMBERS}
                rows.setdefault(line["point"], {})[key] = values
        points = {p.name: p for p in [DENSE, *AS_FILED, *WHOLE, *SELECTIONS]}
        sizes = self.about["bytes"]
        self.results = {n: Result(points[n], sizes[n], rows[n]) for n in rows}

    def of(self, points: Iterable[Point]) -> list[Result]:
        """Return what was measured of some points, most bytes first."""
        found = [self.results[p.name] for p in points if p.name in self.results]
        return sorted(found, key=lambda result: -result.bytes)

    @cached_property
    def whole(self) -> list[Result]:
        """Whole models, most bytes first."""
        return self.of(WHOLE)

    @cached_property
    def selections(self) -> list[Result]:
        """Selections, most bytes first."""
        return self.of(SELECTIONS)

    @cached_property
    def frontier(self) -> set[str]:
        """The names of the models that no other of at most their bytes beats."""
        every = [*self.whole, *self.selections]
        return {
            one.point.name
            for one in every
            if not any(o.bytes <= one.bytes and o.mean() < one.mean() for o in every)
        }

    def rival(self, one: Result) -> Result | None:
        """Return the nearest whole model of no more bytes, if there is any so small."""
        small = [other for other in self.whole if other.bytes <= one.bytes]
        return min(small, key=Result.mean, default=None)

    def rows_text(self) -> str:
        """Return how many rows were measured, and what was done before."""
        counts: dict[str, int] = {}
        for family, _ in self.results[DENSE.name].rows:
            counts[family] = counts.get(family, 0) + 1
        few, many = min(counts.values()), max(counts.values())
        each = f"{few}" if few == many else f"{few} to {many}"
        text = (
            f"Rows of each of {len(counts)} families: {each}. Tokens of the text that "
        )
        text += f"quantisers had: {self.about['text']:,}.\n"
        rounded = AS_FILED[1], Point("affine", 4, 32)
        file, dense = (self.results[point.name].mean() for point in rounded)
        text += f"Rounding to 4 bits in groups of 32 costs the file {file:.3f} of KL, "
        text += f"and the dense model {dense:.3f}.\n"
        return text + "**Bold**: nothing of no more bytes is nearer."

    def table(self) -> str:
        """Return every point's figures, most bytes first."""
        every = self.of([DENSE, *AS_FILED, *WHOLE, *SELECTIONS])
        lines = [self._cells(one) for one in every]
        head = ["", "bits per weight", "MB", "KL [95 %]", "agreement", "NLL"]
        return markdown(head, lines)

    def _cells(self, one: Result) -> list[str]:
        name = one.point.name
        low, high = bootstrap(one.groups("kl", sorted(one.rows)))
        return [
            f"**{name}**" if name in self.frontier else name,
            f"{one.bytes * 8 / self.about['weights']:.2f}",
            f"{one.bytes / 1e6:.1f}",
            f"{one.mean():.3f} [{low:.3f}, {high:.3f}]",
            f"{one.mean('agreement'):.1%}",
            f"{one.mean('nll'):.3f}",
        ]

    def duels(self) -> str:
        """Return every selection beside the best whole model of no more bytes."""
        lines = []
        for one in self.selections:
            cells = [one.point.name, f"{one.bytes / 1e6:.1f}", f"{one.mean():.3f}"]
            rival = self.rival(one)
            if rival is None:
                lines.append([*cells, "none is so small", "", "", ""])
                continue
            less, low, high = one.less(rival)
            cells += [rival.point.name, f"{rival.bytes / 1e6:.1f}"]
            cells += [f"{rival.mean():.3f}", f"{less:+.3f} [{low:+.3f}, {high:+.3f}]"]
            lines.append(cells)
        head = ["selection", "MB", "KL", "whole model", "MB", "KL", "KL less [95 %]"]
        return markdown(head, lines)

    def failures(self) -> str:
        """Return what could not be made, and why."""
        lines = [f"- *{name}*: {why}" for name, why in self.about["failed"].items()]
        return "\n".join(["Not made:", "", *lines])

    def conclusions(self) -> str:
        """Return what the figures say."""
        ranges = [self._range(*ends) for ends in self.ruled_by_selections()]
        best = ", and from ".join(ranges)
        text = f"- The best that fits is a selection from {best}; else a whole model."
        lines = [text if ranges else "- The best that fits is always a whole model."]
        lines += [self._said_of(bits) for bits in sorted(BASES) if self._of_base(bits)]
        if missing := self.missing():
            lines.append(f"- Not measured yet: {', '.join(missing)}.")
        return "\n".join(lines)

    def missing(self) -> list[str]:
        """Return the names of what was neither measured nor impossible."""
        known = self.results.keys() | self.about["failed"].keys()
        return [point.name for point in POINTS if point.name not in known]

    def ruled_by_selections(self) -> list[tuple[int, int | None]]:
        """Return the spans of bytes in which the best that fits is a selection, smallest
        first; ``None`` has no end.
        """
        some = [
            r for r in [*self.whole, *self.selections] if r.point.name in self.frontier
        ]
        ordered = sorted(some, key=lambda result: (result.bytes, -result.mean()))
        spans: list[tuple[int, int | None]] = []
        for kind, span in groupby(ordered, key=lambda r: r.point.kind == "select"):
            if spans and not kind and spans[-1][1] is None:
                spans[-1] = spans[-1][0], next(span).bytes
            elif kind:
                spans.append((next(span).bytes, None))
        return spans

    def _range(self, low: int, high: int | None) -> str:
        four = self.results[Point("affine", 4).name].bytes
        start = f"{low / 1e6:.1f} MB ({low / four:.0%} of *affine 4/64*)"
        if high is None:
            return f"{start} on"
        return f"{start} to {high / 1e6:.1f} MB ({high / four:.0%})"

    def won(self, bits: int) -> list[Result]:
        """Return the selections of one base that are nearer to the dense model than
        every whole model of at most their bytes, by an interval above zero.
        """
        pairs = [(one, self.rival(one)) for one in self._of_base(bits)]
        return [one for one, rival in pairs if rival and one.less(rival)[1] > 0]

    def lost(self, bits: int) -> list[Result]:
        """Return the selections than which such a whole model is nearer, likewise."""
        pairs = [(one, self.rival(one)) for one in self._of_base(bits)]
        return [one for one, rival in pairs if rival and one.less(rival)[2] < 0]

    def _of_base(self, bits: int) -> list[Result]:
        return [one for one in self.selections if one.point.bits == bits]

    def _said_of(self, bits: int) -> str:
        won, lost, every = self.won(bits), self.lost(bits), self._of_base(bits)
        alone = [one for one in every if self.rival(one) is None]
        rest = [one for one in every if one not in [*won, *lost, *alone]]
        said = {
            "nearer to the dense model than every whole model of no more bytes": won,
            "further away than one of these": lost,
            "not clearly either": rest,
            "smaller than every whole model": alone,
        }
        parts = [f"{_keeps(some)} {what}" for what, some in said.items() if some]
        return f"- Selections at {bits} bits, by 95 % intervals: {'; '.join(parts)}."


def _keeps(results: list[Result]) -> str:
    keeps = ", ".join(f"{one.point.keep:g}" for one in results)
    return f"keep {keeps} {'is' if len(results) == 1 else 'are'}"


def models(folder: Path = HERE) -> list[Model]:
    """Return the models that there are results of."""
    return [Model(n, folder) for n in MODELS if (folder / f"about-{n}.json").exists()]


def page(found: list[Model]) -> str:
    """Return the page."""
    text = [HEAD, "## What to conclude", ""]
    text += [f"{model.title}:\n\n{model.conclusions()}\n" for model in found]
    text += [HOW]
    for model in found:
        text += [f"## {model.title}", "", model.rows_text(), "", model.table(), ""]
        text += ["Each selection, and the nearest whole model of no more bytes:", ""]
        text += [model.duels(), ""]
        text += [model.failures(), ""] if model.about["failed"] else []
    return "\n".join(text).rstrip() + "\n"


LOOKS = {
    "affine": ("tab:gray", "o"), "mixed": ("tab:brown", "s"),
    "dynamic": ("tab:purple", "D"), "awq": ("tab:orange", "^"),
    "gptq": ("tab:green", "v"), "dwq": ("tab:cyan", "P"),
}  # fmt: skip


def draw(found: list[Model], path: Path) -> None:
    """Draw KL against megabytes, a panel for each model."""
    plt = pyplot()
    size = 5.2 * len(found), 4.2
    figure, axes = plt.subplots(1, len(found), figsize=size, squeeze=False)
    for axis, model in zip(axes[0], found, strict=True):
        for kind, (colour, mark) in LOOKS.items():
            some = [r for r in model.whole if r.point.kind.startswith(kind)]
            line = "-" if kind == "affine" else ""
            about = {"color": colour, "marker": mark, "ms": 5, "lw": 0.6, "ls": line}
            _plot(axis, some, f"whole, {kind}", **about)
        for bits, colour in zip(BASES, ("tab:red", "tab:blue"), strict=True):
            some = [one for one in model.selections if one.point.bits == bits]
            about = {"color": colour, "marker": ".", "ms": 9, "lw": 2}
            _plot(axis, some, f"selected, of {bits} bits", **about)
        axis.set(title=model.title, xlabel="MB of weights", yscale="log")
        axis.grid(alpha=0.3, which="both")
    axes[0][0].set_ylabel("KL from the dense model, nats a token")
    axes[0][0].legend(fontsize="small")
    figure.tight_layout()
    # Fixed names and no date, so that drawing again gives the same file.
    with new_file(path) as scratch, plt.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(scratch, format="svg", metadata={"Date": None})
    plt.close(figure)


def _plot(axis: Any, results: list[Result], label: str, **about: Any) -> None:
    if results:
        sizes = [result.bytes / 1e6 for result in results]
        axis.plot(sizes, [result.mean() for result in results], label=label, **about)


def write_results(
    name: str, lines: Iterable[Line], about: dict[str, Any], folder: Path = HERE
) -> None:
    """Write a model's rows, and what else the page says.

    Args:
        name: smollm2 or gemma3.
        lines: of all rows.
        about: how many ``weights``, tokens of ``text``, and why points ``failed``.
        folder: for both files.
    """
    ordered = sorted(lines, key=lambda line: [line[name] for name in KEY])
    sizes = {line["point"]: line["bytes"] for line in ordered}
    failed = {n: why for n, why in about["failed"].items() if n not in sizes}
    with new_file(folder / f"results-{name}.csv") as scratch:
        with scratch.open("w", newline="") as file:
            how: dict[str, Any] = {"extrasaction": "ignore", "lineterminator": "\n"}
            writer = csv.DictWriter(file, [*KEY, *NUMBERS], **how)
            writer.writeheader()
            writer.writerows(ordered)
    with new_file(folder / f"about-{name}.json") as scratch:
        text = json.dumps(about | {"failed": failed, "bytes": sizes}, indent=1)
        scratch.write_text(text + "\n", encoding="utf-8")


def filed(name: str, folder: Path = HERE) -> dict[tuple, Line]:
    """Return the rows that :func:`write_results` wrote, by ``KEY``; empty if it did not.

    Args:
        name: smollm2 or gemma3.
        folder: of both files.
    """
    if not (folder / f"results-{name}.csv").exists():
        return {}
    found: dict[tuple, Line] = {}
    for point, result in Model(name, folder).results.items():
        for (family, number), values in result.rows.items():
            about = {"point": point, "family": family, "row": number}
            line = about | values | {"bytes": result.bytes}
            found[tuple(about.values())] = line | {"tokens": int(values["tokens"])}
    return found


def short(model: Model) -> str:
    """Return the table of the project's first page."""
    rows = []
    for words, name in SHORT.items():
        one = model.results[name]
        rows.append([words, f"{one.bytes / 1e6:.0f}", f"{one.mean():.2f}"])
    return markdown(["", "MB", "KL"], rows)


def write() -> None:
    """Write the page, the picture, and what the project's first page has of them."""
    found = models()
    fill(README, {"frontier": short(found[0])})
    draw(found, PICTURE)
    with new_file(PAGE) as scratch:
        scratch.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    write()
