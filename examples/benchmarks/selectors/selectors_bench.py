"""Compare ways of selecting on ten families of tasks: the evidence for the defaults.

    python -m examples.benchmarks.selectors.selectors_bench [smollm2|gemma3]
        [--rows 40] [--jobs 2] [--answer-tokens 96] [--published] [--ways NAME ...]

Writes selectors-MODEL.csv and .md beside this file. Every answer token is compared
with the dense model's next-token distribution. What is measured already is not measured again, so a
stopped run goes on where it was; rows are taken in turn from all families, so that it can
be stopped at any time. With ``--published`` it goes on from the rows in the CSV, and with
``--ways`` it measures no other ways. Where a mask comes from:

- random; activation: of this prompt alone
- prior: the package's own calibration text, none of these tasks
- blend of ranks, and blend where nothing is compensated: the ranks of activation and prior
  averaged
- blend where it compensates: what the other channels could not make up for, as this prompt
  and a sketch of the calibration text show
- others: one static mask from 16 examples each of the other families
- task: one static mask from 16 other examples of the same family

In the last two, prompts and answers count the same. The text that is named compensates,
together with the sketch; *alone* means without the sketch.

The allocation `sensitivity` uses costs measured on a calibration example of each
family: of the other nine, or of all ten if the mask is the task's own. Costs on the
package's text are those that `python -m ifp_mlx.sensitivity` measures by default. Of a
model at 4 bits only what selecting adds is measured: whole groups of 64 channels kept
or dropped, or `down_proj` at 4 bits; gate and up, which lose nothing, stay as they are.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from tqdm import tqdm

from examples.benchmarks.jobs import in_parallel
from examples.fetch import MODELS, fetch
from ifp_mlx import load
from ifp_mlx.evaluation.log import Log
from ifp_mlx.evaluation.rows import Row, read_rows
from ifp_mlx.evaluation.teacher import metrics
from ifp_mlx.selection import scores, top_k, widths
from ifp_mlx.selection.calibration import SKETCH_VERSION
from ifp_mlx.slicing.compensation import merit

from .bench_attention import attention
from .bench_calibration import Calibration, Part, file_of, parts_of
from .bench_model import GROUP, Bench, Reading, energy
from .bench_report import ALL, CALIBRATION, read_lines, write_report
from .bench_ways import STAGES, Way
from .task_families import write as write_families

KEY = ("family", "row", "way", "keep")
MODULE = "examples.benchmarks.selectors.selectors_bench"  # of this file
PUBLISHED = "published"  # the log that has the rows of the CSV
WAYS = tuple(dict.fromkeys(way.name for stage in STAGES for way in stage.ways))


class Todo(NamedTuple):
    """One row at one keep, and the ways in which it is still to be measured."""

    keep: float
    family: str
    number: int
    row: Row
    ways: list[Way]


def missing(
    families: dict[str, list[Row]],
    done: Container[tuple],
    count: int,
    wanted: Container[str] = WAYS,
) -> list[Todo]:
    """Return every row at every keep, with the ways of its tables that are not done:
    the first row of every family, then the second, ...

    Args:
        families: their rows.
        done: the keys of what is measured.
        count: rows of each family in the first table.
        wanted: the names of the ways that are to be measured.
    """
    found = []
    for keep in dict.fromkeys(stage.keep for stage in STAGES):
        stages = [stage for stage in STAGES if stage.keep == keep]
        for number in range(max(stage.rows(count) for stage in stages)):
            tables = [stage.ways for stage in stages if number < stage.rows(count)]
            for family, rows in families.items():
                ways = [
                    way
                    for way in dict.fromkeys(sum(tables, ()))
                    if way.name in wanted
                    and (family, number, way.name, round(keep, 3)) not in done
                ]
                if number < len(rows):
                    found.append(Todo(keep, family, number, rows[number], ways))
    return found


def share(todo: Sequence[Todo], job: int, jobs: int) -> list[Todo]:
    """Return what one of several jobs is to measure: whole families, which have slices
    in common, spread so that all jobs read about as many tokens.
    """
    tokens: Counter[str] = Counter()
    for entry in todo:
        tokens[entry.family] += len(entry.row.prompt) + len(entry.row.answer)
    loads, mine = [0] * jobs, set()
    for family, count in tokens.most_common():
        least = loads.index(min(loads))
        loads[least] += count
        if least == job:
            mine.add(family)
    return [entry for entry in todo if entry.family in mine]


def measure_row(calibration: Calibration, todo: Todo) -> Iterator[dict]:
    """Yield a line of results for the dense model and for every way, with the
    processor time it took; a way's slices are made but once.
    """
    bench, (keep, family, number, row, ways) = calibration.bench, todo
    clock = Clock()
    reading = bench.read(row)
    about = {"family": family, "row": number, "keep": round(keep, 3)}
    reference = metrics(row, reading.reference, reading.reference)
    yield about | {
        "way": "dense",
        "tokens": len(row.answer),
        **_short(reference),
        "seconds": clock.lap(),
    }
    scores = {
        kind: scores_of(kind, calibration, family, number, reading, keep)
        for kind in {way.statistic for way in ways}
    }
    sliced: dict[tuple, list[nn.Module]] = {}
    for way in ways:
        key = way._replace(prompt="")
        if key not in sliced:
            sliced[key] = modules_of(calibration, family, reading, way, keep, scores)
        if way.prompt == "dense":
            found = bench.decode(row, sliced[key], reading)
        else:
            found = bench.compact(row, sliced[key])
        measured = _short(metrics(row, found, reading.reference))
        yield about | {"way": way.name} | measured | {"seconds": clock.lap()}


def modules_of(
    calibration: Calibration,
    family: str,
    reading: Reading,
    way: Way,
    keep: float,
    scores: dict[str, mx.array],
) -> list[nn.Module]:
    """Return the sliced FFNs of a way."""
    model = calibration.bench.model
    costs = None
    if way.allocation == "sensitivity":
        costs = calibration.costs(way, family, keep)
    step = GROUP if way.quantised else 1
    k = widths.target_size(model.channels, keep, step)
    sizes = widths.layer_sizes(
        k, model.layers, model.channels, way.allocation, step, costs
    )
    granularity = GROUP if way.quantised == "groups" else 1
    selection = top_k.select(scores[way.statistic], sizes, granularity=granularity)
    if way.compensation == "examples":
        return calibration.compensated(family, selection, alone=way.alone)
    rows = None
    if way.compensation:
        rows = calibration.bench.evidence(reading.channels, alone=way.alone)
    again = way.quantised == "channels" or bool(way.quantised and way.compensation)
    return calibration.bench.sliced(selection, rows, quantise=again)


def scores_of(
    kind: str,
    calibration: Calibration,
    family: str,
    number: int,
    reading: Reading,
    keep: float,
) -> mx.array:
    """Return one row's scores of a kind at a keep, ``[L, F]``."""
    prior = calibration.bench.prior
    if kind in ("others", "task"):
        return calibration.scores(kind, family)
    if kind == "prior":
        return prior
    if kind == "merit":
        known = calibration.bench.evidence(reading.channels)
        return mx.stack([merit(one, keep) for one in known])
    if kind == "random":
        L, F = prior.shape
        return scores.random_scores(L, F, seed=number)
    local = mx.sqrt(mx.stack([energy(h) for h in reading.channels]))
    return local if kind == "activation" else scores.blend_scores(local, prior)


def _short(values: dict[str, float]) -> dict[str, float]:
    """Return numbers rounded to the digits that mean something."""
    return {name: round(value, 5) for name, value in values.items()}


class Clock:
    """Tells the processor time that this process has used since the last call."""

    def __init__(self) -> None:
        self._last = time.process_time()

    def lap(self) -> float:
        """Return seconds."""
        before, self._last = self._last, time.process_time()
        return round(self._last - before, 2)


class Run:
    """A model's bench: what its logs have, and what is left.

    Args:
        name: smollm2 or gemma3.
        rows: of each family, in the first table.
        settings: what decides the results.
        ways: the names of those that are measured.
    """

    def __init__(
        self,
        name: str,
        rows: int,
        settings: dict[str, Any],
        ways: Sequence[str] = WAYS,
    ) -> None:
        self.name, self.rows, self.settings, self.ways = name, rows, settings, ways
        self.folder = MODELS / "bench" / f"{name}-rows"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.source = fetch(name)

    def log(self, job: int | str) -> Log:
        """Return the log that one job writes."""
        about = self.settings | {"sketch": SKETCH_VERSION}
        return Log(self.folder / f"job-{job}", about, KEY)

    def lines(self) -> dict[tuple, dict]:
        """Return the results of all jobs so far, by family, row, way and keep."""
        found: dict[tuple, dict] = {}
        for file in sorted(self.folder.glob("job-*")):
            found |= self.log(file.name.removeprefix("job-")).lines
        return found

    def todo(self) -> list[Todo]:
        """Return every row of every table, with the ways that no log has yet."""
        _, tokenizer = load(self.source)
        files = sorted((write_families() / "test").glob("*.jsonl"))
        families = {f.stem: read_rows(f, tokenizer, **self.settings) for f in files}
        return missing(families, self.lines(), self.rows, self.ways)

    def take_published(self) -> None:
        """Count the published rows as measured, except those that a log has.

        Raises:
            ValueError: if they were measured with other settings.
        """
        lines = read_lines(self.name)
        longest = round(max(line.get("tokens", 0) for line in lines))
        if longest != self.settings["answer_tokens"]:
            raise ValueError(
                f"The published rows of {self.name} compare {longest} answer tokens at "
                f"most; give --answer-tokens {longest}, or leave out --published."
            )
        done, log = self.lines(), self.log(PUBLISHED)
        log.add(*(line for line in lines if log.key_of(line) not in done))

    def unprepared(self, job: int = 0, jobs: int = 1) -> list[Part]:
        """Return a job's share of what the rows that are left need, if not measured."""
        needed = [parts_of(todo.ways, todo.keep) for todo in self.todo()]
        mine = sorted(set().union(*needed))[job::jobs]
        return [part for part in mine if not file_of(self.folder, part).exists()]

    def prepare(self) -> None:
        """Compute the prior and the sketch, which every job needs."""
        load(self.source)[0].sketch(tqdm)

    def calibrate(self, job: int, jobs: int) -> None:
        """Measure this job's share of what the rows need."""
        clock, parts = Clock(), self.unprepared(job, jobs)
        times = sum(key[0] == ALL for key in self.lines())
        if not parts:
            return
        calibration = Calibration(Bench(self.source, **self.settings), self.folder)
        for part in parts:
            calibration.prepare(part)
        line = dict(zip(KEY, (ALL, times + job, CALIBRATION, 0.0), strict=True))
        self.log(job).add(line | {"seconds": clock.lap()})

    def measure(self, job: int, jobs: int) -> None:
        """Measure this job's share of the rows that are left."""
        todo = [entry for entry in share(self.todo(), job, jobs) if entry.ways]
        if not todo:
            return
        calibration = Calibration(Bench(self.source, **self.settings), self.folder)
        log = self.log(job)
        for entry in tqdm(todo, disable=None):
            log.add(*measure_row(calibration, entry))


def main() -> None:
    """Measure, in one process per job, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("name", nargs="?", default="smollm2", help="smollm2 or gemma3")
    add("--rows", type=int, default=40, help="of each family, in the first table")
    add("--answer-tokens", type=int, default=96, help="compared in a row, at most")
    add("--jobs", type=int, default=2, help="processes")
    add("--published", action="store_true", help="go on from the rows in the CSV")
    add(
        "--ways",
        nargs="+",
        choices=WAYS,
        default=WAYS,
        metavar="NAME",
        help="no others",
    )
    add("--phase", choices=("calibrate", "measure"), help=argparse.SUPPRESS)
    add("--job", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    run = Run(args.name, args.rows, {"answer_tokens": args.answer_tokens}, args.ways)
    if args.phase is not None:
        # Only in this process. It takes no stream; no model here gives one.
        mx.fast.scaled_dot_product_attention = attention  # type: ignore[assignment]
        getattr(run, args.phase)(args.job, args.jobs)
        return
    if args.published:
        run.take_published()
    run.prepare()
    for phase in ("calibrate", "measure"):
        in_parallel(MODULE, [*sys.argv[1:], "--phase", phase], args.jobs)
    print(write_report(args.name, list(run.lines().values())))


if __name__ == "__main__":
    main()
