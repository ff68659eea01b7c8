"""Write the tables and pictures of both mixes from the results that are there."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.benchmarks.pages import fill
from ifp_mlx.pictures.plates import draw_matrices

from .run import RESULTS, SCALES, folder_of
from .tasks import Task, all_tasks

PICTURE = "overlap.svg"
ABOUT = {
    "dense_full": "dense, all channels (the bound)",
    "dense_small": "dense of the kept size, equal examples",
    "dense_small_compute": "dense of the kept size, equal training compute",
    "static": "static pruning, activation × weight",
    "static_learned": "static pruning, learned mask",
    "static_distil": "static pruning + distillation from dense",
    "moe": "mixture of experts of the same active size",
    "activation": "selected by activation, no training",
    "task_random": "true task known, random mask for each",
    "task_learned": "true task known, learned mask for each",
    "ifp_naive": "IFP, naive",
    "ifp": "IFP, one mask per input",
    "ifp_per_task": "IFP, one mask per task from a description",
    "ifp_both_stages": "IFP, pretrain then sft, same steps",
}
CONTROLS = {
    "ifp_clusters": "IFP, warm start without the names of tasks",
    "ifp_paraphrases": "IFP, warm start with paraphrases in place of names",
    "dense_small_long": "dense of the kept size, three times the examples",
    "dense_small_longest": "dense of the kept size, six times the examples",
}
COLUMNS = ("mean", "facts", "skills", "held_out")


def load_results(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the results of every row, by seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault(result["row"], []).append(result)
        if "per_task" in result:
            alone = (
                result
                | result["per_task"]
                | {"overlap": result.get("per_task_overlap")}
            )
            found.setdefault("ifp_per_task", []).append(alone)
    return found


def spread(values: Sequence[float]) -> str:
    """Return the mean, and lowest and highest of several seeds."""
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f}–{max(values):.3f})"


def main_table(
    results: dict[str, list[dict[str, Any]]], rows: Sequence[str] = tuple(ABOUT)
) -> str:
    """Return accuracy, compute and overlap of every one of ``rows`` as markdown."""
    lines = [
        "| row | seeds | mean | facts | skills | unseen family | compute | within / between |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        runs, about = results.get(row, []), (ABOUT | CONTROLS)[row]
        if not runs:
            lines.append(f"| {about} | not run | | | | | | |")
            continue
        scores = [spread([run[column] for run in runs]) for column in COLUMNS]
        compute = f"{np.mean([run['compute'] for run in runs]):.0f}"
        overlap = _overlap([run["overlap"] for run in runs if run.get("overlap")])
        cells = [about, str(len(runs)), *scores, compute, overlap]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def curve(results: dict[str, list[dict[str, Any]]]) -> str:
    """Return the facts that dense-small knows after ever more examples, as markdown.

    Every figure is of a run of its own, with a whole schedule of learning rates.
    """
    small = [runs for row, runs in results.items() if row.startswith("dense_small")]
    small.sort(key=lambda runs: runs[0]["steps"])
    rows = {f"dense-small, {runs[0]['steps']} steps": runs for runs in small}
    if "ifp" in results:
        rows["IFP, one mask per input"] = results["ifp"]
    seeds = sorted({run["seed"] for runs in rows.values() for run in runs})
    head = ["facts of seed", *map(str, seeds), "compute"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for about, runs in rows.items():
        found = {run["seed"]: f"{run['facts']:.3f}" for run in runs}
        cells = [about, *(found.get(seed, "") for seed in seeds)]
        lines.append(f"| {' | '.join(cells)} | {runs[0]['compute']:.0f} |")
    return "\n".join(lines)


def task_table(
    results: dict[str, list[dict[str, Any]]], rows: Sequence[str], tasks: Sequence[Task]
) -> str:
    """Return the accuracy of some rows on every task, mean over seeds."""
    rows = [row for row in rows if row in results]
    lines = ["| task | " + " | ".join(ABOUT[row] for row in rows) + " |"]
    lines.append("|---" * (len(rows) + 1) + "|")
    for task in tasks:
        found = [
            np.mean([run["accuracy"][task.name] for run in results[row]])
            for row in rows
        ]
        lines.append(f"| {task.name} | " + " | ".join(f"{f:.2f}" for f in found) + " |")
    return "\n".join(lines)


def margins(results: dict[str, list[dict[str, Any]]], row: str = "ifp") -> str:
    """Return how far ``row`` is from the others, seed by seed, as markdown."""
    mine = {run["seed"]: run["mean"] for run in results.get(row, [])}
    about = ABOUT | CONTROLS
    lines = [f"| {about[row]} minus | mean | of each seed |", "|---|---|---|"]
    for other, runs in results.items():
        gaps = {
            r["seed"]: mine[r["seed"]] - r["mean"] for r in runs if r["seed"] in mine
        }
        if other.startswith(row) or not gaps:
            continue
        each = ", ".join(f"{gaps[seed]:+.3f}" for seed in sorted(gaps))
        lines.append(
            f"| {about[other]} | {np.mean(list(gaps.values())):+.3f} | {each} |"
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


def tables(mix: str, folder: Path) -> str:
    """Return a mix's tables, and draw its picture beside the results."""
    results, tasks = load_results(folder), all_tasks(mix)
    tuning = load_results(folder / "tuning")
    controls = [row for row in CONTROLS if row in results]
    parts = [main_table(results, [*ABOUT, *controls])]
    if "ifp" in results:
        parts.append(margins(results))
        draw_overlap(results["ifp"][0], folder / PICTURE, tasks)
    every = {
        row: results.get(row, []) + tuning.get(row, []) for row in results | tuning
    }
    parts.append(curve(every))
    rows = ["dense_full", "dense_small", "dense_small_compute", "static", "ifp"]
    parts.append(task_table(results, rows, tasks))
    if tuning:
        rows = [row for row in ABOUT | CONTROLS if row in tuning]
        seeds = {run["seed"] for runs in tuning.values() for run in runs}
        names = ", ".join(str(seed) for seed in sorted(seeds))
        parts.append(f"Seed {names}, on which choices were made, with controls:")
        parts.append(main_table(tuning, rows))
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> None:
    """Print the tables, and draw the pictures beside the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true", help="also into README.md")
    args = parser.parse_args(arguments)
    for mix in SCALES:
        text = tables(mix, folder_of(mix, args.results))
        print(text)
        if args.write:
            fill(Path(__file__).parent / "README.md", {mix: text})


if __name__ == "__main__":
    main()
