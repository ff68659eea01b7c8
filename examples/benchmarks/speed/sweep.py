"""The sweep that selects and slices, beside one prefill of the dense model in memory.

    python -m examples.benchmarks.speed.sweep [--tokens 123] [--turns 15] [--write]

The dense model is in memory before its prefill is timed; the sweep has to read it from
the disk, and to write the compact model into memory that the system has to clear first.
Hence two figures: elapsed time, and the time that the processor spent in the program
itself (*user*), without the system's part. The ways take turns; ratios are taken within
a turn. Let nothing else run meanwhile.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from examples.benchmarks.pages import fill
from examples.fetch import PACKAGES, fetch
from ifp_mlx import load
from ifp_mlx.evaluation.tables import markdown
from ifp_mlx.files.atomic import new_file
from ifp_mlx.model import sweep
from ifp_mlx.slicing.compensation import Evidence
from ifp_mlx.slicing.stock import PREFILL_STEP, prefill

TEXT = "The tide tables are printed each year, and every skipper keeps a copy. "
KEEP = 0.5
FIGURES = Path(__file__).with_name("sweep.json")
PAGE = FIGURES.with_name("benchmark.md")
Times = Sequence[float]  # seconds elapsed, and of the processor in the program
Turns = Sequence[dict[str, Times]]  # of each way


def timed(work: Callable[[], Any]) -> Times:
    """Do some work, and return the time it took."""
    began, used = time.perf_counter(), os.times().user
    work()
    return time.perf_counter() - began, os.times().user - used


def ways_of(name: str, count: int) -> dict[str, Callable[[], Any]]:
    """Return what is timed, by name; the first is what the others are compared with.

    Args:
        name: of a model, for `fetch`.
        count: tokens of the prompt.
    """
    model, tokenizer = load(fetch(name))
    tokens = tokenizer.encode(TEXT * count)[:count]
    dense = model.dense()
    mx.eval(dense.parameters())
    sketches, kept = model.sketch(), round(KEEP * model.channels)

    def choose(layer: int, scores: mx.array, known: Evidence | None) -> mx.array:
        return mx.sort(mx.argsort(-scores)[:kept]).astype(mx.int32)

    def swept(**how: Any) -> None:
        sweep.compact_model(model.source, tokens, choose, **how)

    def beside() -> None:
        swept(compensate=True, sketch=sketches.__getitem__)

    return {
        "dense prefill": lambda: mx.eval(
            [layer.state for layer in prefill(dense, tokens, PREFILL_STEP)]
        ),
        "sweep": swept,
        "compensated by the prompt alone": lambda: swept(compensate=True),
        "compensated, with the sketch": beside,
    }


def table(found: dict[str, Turns]) -> str:
    """Return medians, and medians of the ratios within a turn, as a Markdown table."""
    rows = []
    for model, turns in found.items():
        first = next(iter(turns[0]))
        for way in turns[0]:
            cells = []
            for kind in (0, 1):
                mine = [turn[way][kind] for turn in turns]
                ratios = [turn[way][kind] / turn[first][kind] for turn in turns]
                cells += [f"{statistics.median(mine):.2f}"]
                cells += [f"{statistics.median(ratios):.2f}"]
            rows.append([f"{model}, {way}", *cells])
    return markdown(["", "s", "ratio", "user s", "ratio of user s"], rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=PACKAGES, default=[*PACKAGES])
    add("--tokens", type=int, default=123, help="of the prompt")
    add("--turns", type=int, default=15, help="counted; one more comes first")
    add("--write", action="store_true", help="keep the times, and put them in the page")
    args = parser.parse_args()
    found: dict[str, Turns] = {}
    for name in args.models:
        ways = ways_of(name, args.tokens).items()
        turns = [
            {way: timed(work) for way, work in ways} for _ in range(args.turns + 1)
        ]
        found[name] = turns[1:]
    print(table(found))
    if args.write:
        with new_file(FIGURES) as scratch:
            scratch.write_text(json.dumps(found) + "\n", encoding="utf-8")
        fill(PAGE, {"sweep": table(found)})


if __name__ == "__main__":
    main()
