"""Write the tables and pictures of both mixes from what was measured."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.benchmarks.pages import fill
from ifp_mlx.pictures.plates import draw_matrices

from .rows import ROWS, Table
from .run import RESULTS
from .tasks import Task, all_tasks

MIXES = ("plain", "crowded")
PICTURE = "overlap.svg"
COLUMNS = ("mean", "facts", "skills", "held_out")
DESCRIBED = "ifp_per_task"
BY_TASK = ("dense_full", "dense_small", "dense_small_equal", "static_equal", "ifp")

Results = dict[str, list[dict[str, Any]]]


def about(table: Table) -> dict[str, str]:
    """Return what the rows are called, in their order."""
    shown = {name: row["about"] for name, row in table.rows.items() if "about" in row}
    return shown | {DESCRIBED: "IFP, one mask per task from a description"}


def load_results(folder: Path, table: Table) -> tuple[Results, Results]:
    """Return the results of every row: those of the seed that chooses, and of the
    others at the rate that it chose.
    """
    every: Results = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        every.setdefault(result["row"], []).append(result)
    for row, runs in list(every.items()):
        if row == "ifp":
            alone = [run | run["per_task"] | {"overlap": None} for run in runs]
            every[DESCRIBED] = [run | {"row": DESCRIBED} for run in alone]
    chosen, found = {}, {}
    for row, runs in every.items():
        rates = [run for run in runs if run["seed"] == table.chooses]
        best = max(rates, key=lambda run: run["mean"])["rate"] if rates else None
        chosen[row] = rates
        others = [run for run in runs if run["seed"] != table.chooses]
        found[row] = [run for run in others if best in (None, run["rate"])]
    return chosen, {row: runs for row, runs in found.items() if runs}


def spread(values: Sequence[float]) -> str:
    """Return the mean, and lowest and highest of several seeds."""
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f}–{max(values):.3f})"


def main_table(results: Results, names: dict[str, str]) -> str:
    """Return accuracy, rate, compute and overlap of every row as markdown."""
    lines = [
        "| row | seeds | rate | mean | facts | skills | unseen family | compute "
        "| within / between |",
        "|---" * 9 + "|",
    ]
    for row, name in names.items():
        if not (runs := results.get(row)):
            continue
        scores = [spread([run[column] for run in runs]) for column in COLUMNS]
        compute = f"{np.mean([run['compute'] for run in runs]):.0f}"
        overlap = _overlap([run["overlap"] for run in runs if run.get("overlap")])
        rates = ", ".join(f"{rate:g}" for rate in sorted({run["rate"] for run in runs}))
        cells = [name, str(len(runs)), rates, *scores, compute, overlap]
        lines.append(f"| {' | '.join(cells)} |")
    left_out = "; ".join(name for row, name in names.items() if row not in results)
    return "\n".join(lines) + (f"\n\nNot run: {left_out}." if left_out else "")


def rate_table(chosen: Results, names: dict[str, str]) -> str:
    """Return the mean of every row at every rate, on the seed that chose."""
    rates = sorted({run["rate"] for runs in chosen.values() for run in runs})
    lines = ["| row | " + " | ".join(f"{rate:g}" for rate in rates) + " |"]
    lines.append("|---" * (len(rates) + 1) + "|")
    for row, name in names.items():
        if row not in chosen:
            continue
        found = {run["rate"]: f"{run['mean']:.3f}" for run in chosen[row]}
        cells = [name, *(found.get(rate, "") for rate in rates)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def task_table(results: Results, names: dict[str, str], tasks: Sequence[Task]) -> str:
    """Return the accuracy of some rows on every task, mean over seeds."""
    rows = [row for row in BY_TASK if row in results]
    lines = ["| task | " + " | ".join(names[row] for row in rows) + " |"]
    lines.append("|---" * (len(rows) + 1) + "|")
    for task in tasks:
        found = [
            np.mean([run["accuracy"][task.name] for run in results[row]])
            for row in rows
        ]
        lines.append(f"| {task.name} | " + " | ".join(f"{f:.2f}" for f in found) + " |")
    return "\n".join(lines)


def margins(results: Results, names: dict[str, str], row: str = "ifp") -> str:
    """Return how far ``row`` is from the others, seed by seed, as markdown."""
    mine = {run["seed"]: run["mean"] for run in results.get(row, [])}
    lines = [f"| {names[row]} minus | mean | of each seed |", "|---|---|---|"]
    for other, runs in results.items():
        gaps = {
            r["seed"]: mine[r["seed"]] - r["mean"] for r in runs if r["seed"] in mine
        }
        if other.startswith(row) or not gaps:
            continue
        each = ", ".join(f"{gaps[seed]:+.3f}" for seed in sorted(gaps))
        lines.append(
            f"| {names[other]} | {np.mean(list(gaps.values())):+.3f} | {each} |"
        )
    return "\n".join(lines)


def draw_overlap(run: dict[str, Any], path: Path, tasks: Sequence[Task]) -> None:
    """Draw the overlap of every two tasks' masks, a square for every layer.

    Source: Hou et al. 2025 (arXiv:2501.02086) fig. 3.
    """
    import matplotlib
    from matplotlib import pyplot as plt

    overlap = run["overlap"]
    layers = [np.array(layer) for layer in overlap["by_depth"]]
    figure = draw_matrices(
        layers,
        [f"layer {layer}" for layer in range(len(layers))],
        [task.name for task in tasks],
        chance=overlap["chance"],
    )
    with matplotlib.rc_context({"svg.hashsalt": "overlap"}):
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def _overlap(found: Sequence[dict[str, Any]]) -> str:
    if not found:
        return "one mask"
    within, between = (
        np.mean([f[key] for f in found]) for key in ("within", "between")
    )
    return f"{within:.2f} / {between:.2f} (chance {found[0]['chance']:.2f})"


def tables(mix: str, folder: Path, config: Path = ROWS) -> str:
    """Return a mix's tables, and draw its picture beside the results."""
    table = Table.read(config, mix)
    names, tasks = about(table), all_tasks(table.scale.mix)
    chosen, results = load_results(folder, table)
    parts = [main_table(results, names)]
    if "ifp" in results:
        parts.append(margins(results, names))
        draw_overlap(results["ifp"][0], folder / PICTURE, tasks)
    if results:
        parts.append(task_table(results, names, tasks))
    if chosen:
        parts.append(f"Mean at every rate, seed {table.chooses}, which chose:")
        parts.append(rate_table(chosen, names))
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> None:
    """Print the tables, and draw the pictures beside the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true", help="also into README.md")
    args = parser.parse_args(arguments)
    for mix in MIXES:
        if not any((args.results / mix).glob("*.json")):
            continue  # the page keeps what it has
        text = tables(mix, args.results / mix)
        print(text)
        if args.write:
            fill(Path(__file__).parent / "README.md", {mix: text})


if __name__ == "__main__":
    main()
