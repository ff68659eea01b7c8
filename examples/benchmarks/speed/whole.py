"""The whole process and the first token, beside mlx_lm.generate and another checkout.

    python -m examples.benchmarks.speed.whole
    git worktree add ../before COMMIT
    python -m examples.benchmarks.speed.whole --before ../before --turns 5 --write

SmolLM2-135M and Gemma-3-270m (`examples/fetch.py`), each from a plain folder and from a
channel store, at keep 1, 1/2 and 1/3, by a mask file and by activation. Every row is a
process of its own, from the command to its end; the rows take turns, and each turn
begins with another row, so that a busy machine slows all alike. Ratios are taken within
a turn. At keep 1 the text has to be that of mlx_lm.generate. `--turns 1 --models
smollm2` is quick. Let nothing else run meanwhile. The last line is JSON.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from examples.benchmarks.pages import fill
from examples.fetch import MODELS, PACKAGES, fetch
from ifp_mlx.evaluation.tables import markdown
from ifp_mlx.files.atomic import new_file
from ifp_mlx.model.checkpoint import IFPModel, open_model
from ifp_mlx.storage.writer import write_store

HERE = Path(__file__).parents[3]
PROMPT = "Explain in a few sentences why the sky is blue, and why sunsets are red."
TOKENS = 16
KEEPS = {"1": 1.0, "1/2": 0.5, "1/3": 1 / 3}
HEADER = b"==========\n"  # what mlx_lm prints before the text
STOCK = "mlx_lm"
MEASURED = ("first", "whole", "whole / mlx_lm")  # seconds, seconds, and their ratio
BESIDE = Path(__file__).parent
FIGURES, PAGE = BESIDE / "whole.json", BESIDE / "benchmark.md"


class Row(NamedTuple):
    """A way of answering, in a process of its own.

    Attributes:
        model: its name for `fetch`.
        checkout: the code that runs: ``mlx_lm``, ``now`` or ``before``.
        source: ``folder`` or ``store``.
        chosen: what chooses the channels.
        keep: one of ``KEEPS``.
        folder: where the process runs, which finds its packages there first.
        command: its arguments.
    """

    model: str
    checkout: str
    source: str
    chosen: str
    keep: str
    folder: Path
    command: list[str]


class Ran(NamedTuple):
    """A row, run once: seconds to the first text and to the end, and the text."""

    first: float
    whole: float
    text: str


def run(command: Sequence[str], folder: Path) -> Ran:
    """Run a command of Python, and time what it prints."""
    start, first, out = time.perf_counter(), 0.0, b""
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None
        while part := os.read(process.stdout.fileno(), 1 << 16):
            out += part
            if not first and out.lstrip(HEADER):
                first = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}.")
    text = out.removeprefix(HEADER).partition(HEADER.strip())[0]
    return Ran(first, time.perf_counter() - start, text.decode().strip())


def prepared(name: str, scratch: Path) -> dict[str, Path]:
    """Return a model's folder and its store, made in a folder that may be written to."""
    folder, store = scratch / name, scratch / f"{name}-store"
    if not folder.exists():
        folder.mkdir(parents=True)
        for file in fetch(name).iterdir():
            (folder / file.name).symlink_to(file.resolve())
    model = open_model(folder)
    prior = model.known_prior()
    if not store.exists():
        write_store(folder, store, uses=np.array(prior)[None])
    for keep, share in KEEPS.items():
        mask = mask_of(folder, keep)
        if not mask.exists():
            chosen_by_prior(model, share).save(mask)
    return {"folder": folder, "store": store}


def chosen_by_prior(model: IFPModel, share: float) -> Any:
    """Return a mask of equal widths, which loads without a pass of the dense model."""
    options: dict[str, Any] = {"selector": "prior", "allocation": "uniform"}
    return model.select(PROMPT, keep=share, **options)


def mask_of(folder: Path, keep: str) -> Path:
    """Return where a mask is."""
    return folder / f"{keep.replace('/', '-')}.mask.safetensors"


def rows_of(name: str, sources: dict[str, Path], checkouts: dict[str, Path]) -> list:
    """Return the rows of a model; the first is mlx_lm's."""
    asked = ["--prompt", PROMPT, "--max-tokens", str(TOKENS)]
    folder = str(sources["folder"])
    stock = ["-m", "mlx_lm", "generate", "--model", folder, *asked, "--temp", "0"]
    rows = [Row(name, STOCK, "folder", "", "", HERE, stock)]
    for source, path in sources.items():
        for keep, share in KEEPS.items():
            size = ["--keep", str(share), "--selector", "activation"]
            given = ["--mask-file", str(mask_of(sources["folder"], keep))]
            for chosen, options in (("mask file", given), ("activation", size)):
                command = ["-m", "ifp_mlx.generate", "--model", str(path), *asked]
                rows += [
                    Row(name, at, source, chosen, keep, home, [*command, *options])
                    for at, home in checkouts.items()
                ]
    return rows


def in_turns(rows: Sequence[Row], turns: int) -> Iterator[list[Ran]]:
    """Yield the runs of all rows, in the rows' order, for each turn, after one turn
    that is not counted.
    """
    for turn in range(turns + 1):
        shift = turn * len(rows) // (turns + 1)
        found = {n: run(rows[n].command, rows[n].folder) for n in rolled(rows, shift)}
        print(f"turn {turn} of {turns}", file=sys.stderr, flush=True)
        if turn:
            yield [found[n] for n in range(len(rows))]


def rolled(rows: Sequence[Row], shift: int) -> list[int]:
    """Return the numbers of the rows, beginning with another."""
    return [(n + shift) % len(rows) for n in range(len(rows))]


def figures(rows: Sequence[Row], turns: Sequence[list[Ran]]) -> list[dict[str, Any]]:
    """Return each row's medians, and how it compares with the first of its model."""
    found = []
    for number, row in enumerate(rows):
        stock = next(n for n, other in enumerate(rows) if other.model == row.model)
        runs = [turn[number] for turn in turns]
        ratios = [turn[number].whole / turn[stock].whole for turn in turns]
        about = {
            k: v for k, v in row._asdict().items() if k not in ("folder", "command")
        }
        about |= {
            "first": statistics.median(one.first for one in runs),
            "whole": statistics.median(one.whole for one in runs),
            "whole / mlx_lm": statistics.median(ratios),
            "same text": all(t[number].text == t[stock].text for t in turns),
        }
        found.append(about)
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    """Return the figures as a Markdown table: a line has all checkouts of one way of
    answering.
    """
    lines: dict[tuple, list[str]] = {}
    checkouts = [one["checkout"] for one in found if one["checkout"] != STOCK]
    checkouts = list(dict.fromkeys(checkouts))
    for one in found:
        way = tuple(one[name] for name in ("model", "source", "chosen", "keep"))
        stock = one["checkout"] == STOCK
        cells = lines.setdefault(way, [way[0], STOCK if stock else way[1], *way[2:]])
        cells += [f"{one[name]:.2f}" for name in MEASURED]
        if stock:
            cells += ["", "", ""] * (len(checkouts) - 1)
    names = [f"{name}, {at}" for at in checkouts for name in MEASURED]
    return markdown(
        ["model", "source", "chosen by", "keep", *names], list(lines.values())
    )


def write(found: Sequence[dict[str, Any]]) -> None:
    """Keep the figures beside this file, and put their table into the page."""
    with new_file(FIGURES) as scratch:
        scratch.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    fill(PAGE, {"whole processes": table(found)})


def main() -> None:
    """Make what is needed, measure, and print."""
    parser = argparse.ArgumentParser(description="Time whole processes.")
    add = parser.add_argument
    add("--before", type=Path, help="another checkout to measure beside this one")
    add("--models", nargs="+", choices=PACKAGES, default=[*PACKAGES])
    add("--turns", type=int, default=7, help="counted turns, default: %(default)s")
    add("--scratch", type=Path, default=MODELS / "whole", help="made, and deleted")
    add(
        "--write",
        action="store_true",
        help="keep the figures, and put them in the page",
    )
    args = parser.parse_args()
    checkouts = {"now": HERE}
    if args.before is not None:
        checkouts["before"] = args.before.resolve()
    args.scratch.mkdir(parents=True)
    try:
        rows = []
        for name in args.models:
            rows += rows_of(name, prepared(name, args.scratch.resolve()), checkouts)
        found = figures(rows, list(in_turns(rows, args.turns)))
    finally:
        shutil.rmtree(args.scratch)
    wrong = [one for one in found if one["keep"] == "1" and not one["same text"]]
    print(table(found))
    print(json.dumps(found))
    if args.write:
        write(found)
    if wrong:
        raise SystemExit(f"Kept whole, and another text than mlx_lm's: {wrong}")


if __name__ == "__main__":
    main()
