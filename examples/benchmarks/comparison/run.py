"""Run the comparison: every row for every seed; what is done already is left alone."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from ifp_mlx.files.atomic import new_file

from .lab import Clock, Lab, Scale, measure, report
from .rows import CONTROLS, ROWS

RESULTS = Path(__file__).parent / "results"
SCALES = {
    "plain": Scale(),
    # So narrow, and with so much to remember, that the small model learns it slowly.
    "crowded": Scale(
        mix="crowded", width=32, kept=32, batch_size=64, start_steps=1500, steps=2500
    ),
}


def folder_of(mix: str, root: Path) -> Path:
    """Return where a mix's files are: in ``root``, or in a folder of its own there."""
    return root if mix == "plain" else root / mix


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mix", choices=list(SCALES), default="plain")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    rows = [row for row in ROWS if row not in CONTROLS]
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=rows)
    parser.add_argument("--results", type=Path, help="default: beside this file")
    parser.add_argument("--cache", type=Path, help="default: models/comparison")
    parser.add_argument(
        "--tiny", action="store_true", help="a few steps, to see that it runs"
    )
    args = parser.parse_args(arguments)
    scale = SCALES[args.mix]
    if args.tiny:
        scale = replace(scale, start_steps=4, steps=4, warm_steps=4, test_per_task=2)
    results = args.results or folder_of(args.mix, RESULTS)
    cache = args.cache or folder_of(args.mix, Path("models/comparison"))
    results.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:  # seed by seed, so that one that is stopped has whole ones
        lab = None
        for row in args.rows:
            path = results / f"{row}-{seed}.json"
            if path.exists():
                continue
            lab = lab or Lab(scale, seed, cache)
            print(f"{row}, seed {seed} ...", flush=True)
            found = run_row(lab, row)
            with new_file(path) as scratch:
                scratch.write_text(json.dumps(found) + "\n", encoding="utf-8")
            summary = {k: round(found[k], 3) for k in ("facts", "skills", "mean")}
            print(f"{row}, seed {seed}: {summary}", flush=True)


def run_row(lab: Lab, row: str) -> dict:
    """Train and test one row; return what is kept of it."""
    clock = Clock()
    trained = ROWS[row](lab)
    found = report(lab, trained, clock.seconds()) | {"row": row}
    if row == "ifp":  # the same model, with one mask for a task
        described = measure(trained, lab.test_batches(described=True), lab.tasks)
        found["per_task"] = described
    return found


if __name__ == "__main__":
    main()
