"""Write the tables of the page from the results that are there.

python -m examples.benchmarks.experts.report --write
"""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.benchmarks.pages import fill

from .measure import RESULTS

LOW_AGREEMENT = 0.7  # a smaller one gave a warning when this was measured
PAGE = Path(__file__).parent / "README.md"
MODELS = {
    "pools": "the checkpoint",
    "pools-seed-301": "a second seed",
    "no-pools": "no pools, an ordinary mixture",
}
WAYS = {
    "task": "task mask, 16 examples of the domain",
    "prompt": "the prompt of each question",
    "blend": "prompt and static ranking, blended by shares",
    "blend_ranks": "the same, blended by ranks",
    "task_mean": "task mask by REAP's mean",
    "prior": "static ranking",
    "prior_mean": "static ranking by REAP's mean",
    "static": "the stronger of the two static ones",
    "random": "random, mean of 5 seeds",
    "other": "task mask of another domain",
}
BOLD = ("task", "static")

Result = dict[str, Any]


def load_results(folder: Path = RESULTS) -> dict[str, Result]:
    """Return the results by name, those of :data:`MODELS` alone."""
    return {
        name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        for name in MODELS
        if (folder / f"{name}.json").exists()
    }


def accuracy(result: Result, way: str, k: str) -> np.ndarray:
    """Return the accuracy of every domain."""
    found = result["accuracy"]
    if way == "static":
        way = max(("prior", "prior_mean"), key=lambda each: np.mean(found[each][k]))
    return np.array(found[way][k])


def lost(result: Result, way: str, k: str) -> np.ndarray:
    """Return the points of accuracy that every domain loses."""
    return 100 * (np.array(result["whole"]) - accuracy(result, way, k))


def sizes(result: Result) -> list[str]:
    """Return the numbers of experts that were kept, as results name them."""
    return list(result["overlap"])


def at_share(result: Result, share: float) -> str:
    """Return how many experts a share of them is, as results name it."""
    return str(int(share * result["experts"]))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table as markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ways(results: dict[str, Result]) -> str:
    """Return what each way to select costs the checkpoint."""
    result = results["pools"]
    kept = [f"{k} of {result['experts']}" for k in sizes(result)]
    rows = []
    for way, about in WAYS.items():
        found = [lost(result, way, k) for k in sizes(result)]
        about = f"**{about}**" if way in BOLD else about
        rows.append([about, *(f"{f.mean():.1f} ({f.max():.0f})" for f in found)])
    return table(["points lost, mean (worst domain)", *kept], rows)


def domains(results: dict[str, Result]) -> str:
    """Return the accuracy of every domain of the checkpoint."""
    result = results["pools"]
    head, columns = ["domain", "all experts"], [np.array(result["whole"])]
    for share in (0.5, 0.25):
        k = at_share(result, share)
        for way, about in {
            "task": "task mask",
            "prompt": "prompt",
            "static": "static",
        }.items():
            head.append(f"{about}, {k}")
            columns.append(accuracy(result, way, k))
    rows = [
        [name, *(f"{value:.2f}" for value in values)]
        for name, *values in zip(result["domains"], *columns, strict=True)
    ]
    means = ["**mean**", *(f"**{column.mean():.2f}**" for column in columns)]
    return table(head, [*rows, means])


def models(results: dict[str, Result]) -> str:
    """Return the checkpoint beside the controls."""
    shown = ("task", "prompt", "blend", "static", "random", "other")
    names = ("task mask", "prompt", "blend", "static", "random", "another's mask")
    head = ["mixture", "accuracy of all", "kept", *names, "overlap within / between"]
    rows = []
    for name, result in results.items():
        for share in (0.5, 0.25):
            k = at_share(result, share)
            each = [f"{lost(result, way, k).mean():.1f}" for way in shown]
            whole = f"{np.mean(result['whole']):.3f}"
            rows.append([MODELS[name], whole, k, *each, _overlap(result["overlap"][k])])
    for name in (name for name in MODELS if name not in results):
        rows.append([MODELS[name], "not measured", *[""] * (len(head) - 2)])
    return table(head, rows)


def _overlap(found: dict[str, Any]) -> str:
    within, between = (np.mean(found[key]) for key in ("within", "between"))
    return f"{within:.2f} / {between:.2f}"


def overlap(results: dict[str, Result]) -> str:
    """Return how much the task masks of the checkpoint have in common."""
    result, rows = results["pools"], []
    for k, found in result["overlap"].items():
        layers = [
            f"{a:.2f} / {b:.2f}"
            for a, b in zip(found["within"], found["between"], strict=True)
        ]
        rows.append([k, *layers, _overlap(found), f"{found['chance']:g}"])
    numbers = [f"layer {layer}" for layer in range(result["layers"])]
    return table(["kept", *numbers, "mean", "chance"], rows)


def foretold(results: dict[str, Result]) -> str:
    """Return what a selection's agreement and router mass say about its answer."""
    head = [
        "mixture", "kept", "agreement", "router mass", "points lost",
        "agreement, over questions", "over domains",
        "router mass, over questions", "over domains",
        f"agreement below {LOW_AGREEMENT:g}", "of these still right", "of the others",
    ]  # fmt: skip
    rows = []
    for name, result in results.items():
        for k, found in result["foretold"].items():
            rows.append([MODELS[name], k, *_foretold(found, result["told"])])
    return table(head, rows)


def _foretold(found: dict[str, Any], told: int) -> list[str]:
    agreement, mass, right, whole = (
        np.array(found[key])
        for key in ("agreement", "router_mass", "right", "right_whole")
    )
    could = whole > 0  # only what all experts answer right can be lost
    signs = []
    for sign in (agreement, mass):
        signs += [correlation(sign[could], right[could])]
        means = [v.reshape(-1, told).mean(axis=1) for v in (sign, whole - right)]
        signs += [correlation(means[0], -means[1])]
    low = agreement < LOW_AGREEMENT
    loss = 100 * (whole.mean() - right.mean())
    first = [f"{agreement.mean():.2f}", f"{mass.mean():.2f}", f"{loss:.1f}"]
    return [
        *first, *signs, f"{low.mean():.0%}",
        _share(right[could & low]), _share(right[could & ~low]),
    ]  # fmt: skip


def correlation(a: np.ndarray, b: np.ndarray) -> str:
    """Return Pearson's correlation, a dash where one of both never changes."""
    if a.std() == 0 or b.std() == 0:
        return "–"
    return f"{np.corrcoef(a, b)[0, 1]:+.2f}"


def _share(right: np.ndarray) -> str:
    return f"{right.mean():.0%}" if len(right) else "–"


def seconds(results: dict[str, Result]) -> str:
    """Return the seconds of measuring."""
    rows = [[MODELS[name], str(r["cpu_seconds"])] for name, r in results.items()]
    return table(["mixture", "seconds of one CPU core"], rows)


TABLES: dict[str, Callable[[dict[str, Result]], str]] = {
    made.__name__: made for made in (ways, domains, models, overlap, foretold, seconds)
}


def tables(results: dict[str, Result]) -> dict[str, str]:
    """Return every table by its name."""
    return {name: made(results) for name, made in TABLES.items()}


def main(arguments: list[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true", help="also into README.md")
    args = parser.parse_args(arguments)
    found = tables(load_results(args.results))
    for name, text in found.items():
        print(f"{name}\n\n{text}\n")
    if args.write:
        fill(PAGE, found)


if __name__ == "__main__":
    main()
