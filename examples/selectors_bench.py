"""Compare ways of selecting on ten families of tasks: the evidence for the defaults.

    python examples/selectors_bench.py [smollm2|gemma3] [--rows 40] [--jobs 2]
                                       [--answer-tokens 96]

Writes examples/selectors-MODEL.md. Every answer token is compared with the dense model's
next-token distribution. What is measured already is not measured again, so a stopped run
goes on where it was; rows are taken in turn from all families, so that it can be stopped
at any time. Where a mask comes from:

- random; activation: of this prompt alone
- prior: the package's own calibration text, none of these tasks
- blend: the ranks of activation and prior averaged
- others: one static mask from 16 examples each of the other families
- task: one static mask from 16 other examples of the same family

In the last two prompts and answers have the same say.

The allocation `sensitivity` goes by costs measured on a calibration example of each
family: of the other nine, or of all ten where the mask is the task's own.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from bench_model import Bench, Reading, energy
from bench_report import ALL, CALIBRATION, write_report
from bench_ways import STAGES, Way
from fetch import MODELS, fetch
from task_families import write as write_families
from tqdm import tqdm

from ifp_mlx import Selection, masks, selectors
from ifp_mlx.atomic import new_file
from ifp_mlx.compensation import read_channels
from ifp_mlx.evaluation.log import Log
from ifp_mlx.evaluation.rows import Row, read_rows
from ifp_mlx.evaluation.teacher import metrics
from ifp_mlx.sensitivity import Probe

TASK_TOKENS = 1000  # of the calibration examples, for the task's own compensation
PARTS = ("prompt", "answer")
KEY = ("family", "row", "way", "keep")
KEEPS = sorted({stage.keep for stage in STAGES})


class Calibration:
    """What is measured once: statistics and costs of each family's calibration rows.

    Args:
        bench: the model.
        folder: where the results are kept.
    """

    def __init__(self, bench: Bench, folder: Path) -> None:
        self.bench = bench
        self._examples: dict[str, list[Row]] = {}
        self._compensated: dict[tuple, list[nn.Module]] = {}
        files = sorted((write_families() / "calibration").glob("*.jsonl"))
        self.families = [file.stem for file in files]
        for file in files:
            rows = read_rows(file, bench.tokenizer, answer_tokens=bench.answer_tokens)
            self._examples[file.stem] = rows
        self._energy = _kept(folder / "energies.safetensors", self._measure_energy)
        self._costs = _kept(folder / "costs.safetensors", self._measure_costs)

    def scores(self, kind: str, family: str) -> mx.array:
        """Return the static scores ``others`` or ``task`` of a family, ``[L, F]``."""
        names = [name for name in self.families if name != family]
        if kind == "task":
            names = [family]
        parts = [self._energy[f"{name}.{part}"] for name in names for part in PARTS]
        # Families have the same say, and so have prompts and answers.
        return mx.sqrt(sum(part / part.sum(axis=1, keepdims=True) for part in parts))

    def costs(self, kind: str, family: str, keep: float) -> mx.array:
        """Return what keeping that share costs each layer, as :func:`masks.layer_sizes`
        takes it, ``[L, 6]``: a task's mask may know its own family, others may not.
        """
        known = self._costs.items()
        found = [c for name, c in known if kind == "task" or name != family]
        column = mx.stack(found).mean(axis=0)[:, KEEPS.index(keep)]
        # It is known at this very keep: nothing is to be read off between shares.
        return mx.repeat(column[:, None], len(masks.MEASURED_SHARES), axis=1)

    def compensated(self, family: str, selection: Selection) -> list[nn.Module]:
        """Return the FFNs of a selection that is the same for all rows of a family,
        compensated by what its first calibration examples show.
        """
        key = family, selection.mask_id
        if key not in self._compensated:
            texts = [row.prompt + row.answer for row in self._examples[family]]
            tokens = sum(texts, [])[:TASK_TOKENS]
            channels = read_channels(self.bench.dense, tokens)
            self._compensated[key] = self.bench.sliced(selection, channels)
        return self._compensated[key]

    def _measure_energy(self) -> dict[str, mx.array]:
        """Return the squared statistic of each family's prompts and answers."""
        found: dict[str, mx.array] = {}
        for name in tqdm(self.families, "statistics", disable=None):
            parts = [mx.array(0.0)] * 2
            for row in self._examples[name]:
                channels = read_channels(self.bench.dense, row.prompt + row.answer)
                P = len(row.prompt)
                for part, tokens in enumerate((slice(P), slice(P, None))):
                    more = mx.stack([energy(h[tokens]) for h in channels])
                    parts[part] = parts[part] + more
                mx.eval(parts)
            found |= {f"{name}.{p}": e for p, e in zip(PARTS, parts, strict=True)}
        return found

    def _measure_costs(self) -> dict[str, mx.array]:
        """Return each family's costs at each of ``KEEPS``, ``[L, 3]``, by a text of its
        calibration rows.
        """
        texts = []
        for name in self.families:
            every = [row.prompt + row.answer for row in self._examples[name]]
            enough = [text for text in every if len(text) > 60]
            texts += [min(enough, key=len)[: round(1.15 * self.bench.answer_tokens)]]
        # By the prior, so that no family has a say in the costs of another.
        probe = Probe(self.bench.model, texts, self.bench.prior)
        layers = tqdm(range(self.bench.model.layers), "sensitivity", disable=None)
        costs = mx.array([probe.costs(layer, KEEPS).tolist() for layer in layers])
        return {name: costs[:, n] for n, name in enumerate(self.families)}


def _kept(file: Path, measure: Callable[[], dict[str, mx.array]]) -> dict:
    """Return arrays from a file, or measure and keep them."""
    if not file.exists():
        with new_file(file) as scratch:
            mx.save_safetensors(str(scratch), measure())
    return dict(mx.load(str(file)))  # type: ignore[arg-type]


def measure_row(
    calibration: Calibration,
    family: str,
    number: int,
    row: Row,
    keep: float,
    ways: list[Way],
) -> Iterator[dict]:
    """Yield a line of results for the dense model and for every way, with the
    processor time it took; a way's slices are made but once.
    """
    bench = calibration.bench
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
    scores = row_scores(calibration, family, number, reading)
    sliced: dict[tuple, list[nn.Module]] = {}
    for way in ways:
        key = way[:3]
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
        costs = calibration.costs(way.scores, family, keep)
    k = masks.target_size(model.channels, keep, model.granularity)
    sizes = masks.layer_sizes(
        k, model.layers, model.channels, way.allocation, model.granularity, costs
    )
    selection = masks.select(scores[way.scores], sizes, granularity=model.granularity)
    if way.compensation == "examples":
        return calibration.compensated(family, selection)
    seen = reading.channels if way.compensation else None
    return calibration.bench.sliced(selection, seen)


def row_scores(
    calibration: Calibration, family: str, number: int, reading: Reading
) -> dict[str, mx.array]:
    """Return the scores of every kind for one row, each ``[L, F]``."""
    prior = calibration.bench.prior
    local = mx.sqrt(mx.stack([energy(h) for h in reading.channels]))
    L, F = local.shape
    return {
        "random": selectors.random_scores(L, F, seed=number),
        "activation": local,
        "prior": prior,
        "blend": selectors.blend_scores(local, prior),
        "others": calibration.scores("others", family),
        "task": calibration.scores("task", family),
    }


def _short(values: dict[str, float]) -> dict[str, float]:
    """Return numbers with no more digits than they are worth."""
    return {name: round(value, 5) for name, value in values.items()}


class Clock:
    """Says how much time of a processor core this process has used since last asked."""

    def __init__(self) -> None:
        self._last = time.process_time()

    def lap(self) -> float:
        """Return seconds."""
        before, self._last = self._last, time.process_time()
        return round(self._last - before, 2)


def own_copy(source: Path) -> Path:
    """Return a linked copy of a model, to keep its prior apart: a stored prior would
    change what `--selector auto` means for the model's users.
    """
    copy = MODELS / "bench" / source.name
    if not copy.exists():
        scratch = copy.with_suffix(".partial")
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(source, scratch, copy_function=os.link)
        for file in ("prior.safetensors", "sensitivity.safetensors"):
            (scratch / file).unlink(missing_ok=True)
        scratch.rename(copy)
    return copy


def rows_in_turn(bench: Bench, count: int) -> Iterator[tuple[str, int, Row]]:
    """Yield family, number and row: the first of every family, then the second, ..."""
    for number in range(count):
        for family, found in families_of(bench).items():
            if number < len(found):
                yield family, number, found[number]


@cache
def families_of(bench: Bench) -> dict[str, list[Row]]:
    """Return the held-out rows of every family."""
    files = sorted((write_families() / "test").glob("*.jsonl"))
    return {
        file.stem: read_rows(file, bench.tokenizer, answer_tokens=bench.answer_tokens)
        for file in files
    }


def read_logs(folder: Path, settings: dict) -> dict[tuple, dict]:
    """Return the results of all jobs so far, by family, row, way and keep."""
    found: dict[tuple, dict] = {}
    for file in sorted(folder.glob("job-*")):
        found |= Log(file, settings, KEY).lines
    return found


def calibrate(name: str, folder: Path, settings: dict) -> None:
    """Measure what all jobs need, once."""
    log, clock = Log(folder / "job-calibration", settings, KEY), Clock()
    key = (ALL, 0, CALIBRATION, 0.0)
    if key not in log:
        Calibration(Bench(own_copy(fetch(name)), **settings), folder)
        log.add(dict(zip(KEY, key, strict=True)) | {"seconds": clock.lap()})


def measure(
    name: str, folder: Path, settings: dict, rows: int, job: int, jobs: int
) -> None:
    """Measure this job's share of what no log has yet."""
    done = read_logs(folder, settings)
    bench = Bench(own_copy(fetch(name)), **settings)
    calibration = Calibration(bench, folder)
    log = Log(folder / f"job-{job}", settings, KEY)
    todo = [
        (stage, *row)
        for stage in STAGES
        for row in rows_in_turn(bench, stage.rows(rows))
    ]
    for stage, family, number, row in tqdm(todo[job::jobs], disable=None):
        keep = round(stage.keep, 3)
        ways = [w for w in stage.ways if (family, number, w.name, keep) not in done]
        if not ways:
            continue
        log.add(*measure_row(calibration, family, number, row, stage.keep, ways))
        done |= log.lines


def main() -> None:
    """Measure, in one process per job, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("name", nargs="?", default="smollm2", help="smollm2 or gemma3")
    add("--rows", type=int, default=40, help="of each family, in the first table")
    add("--answer-tokens", type=int, default=96, help="compared in a row, at most")
    add("--jobs", type=int, default=2, help="processes")
    add("--job", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    settings = {"answer_tokens": args.answer_tokens}
    folder = MODELS / "bench" / f"{args.name}-rows"
    folder.mkdir(parents=True, exist_ok=True)
    if args.job is not None:
        measure(args.name, folder, settings, args.rows, args.job, args.jobs)
        return
    calibrate(args.name, folder, settings)
    again = [sys.executable, __file__, *sys.argv[1:], "--job"]
    jobs = [subprocess.Popen([*again, str(job)]) for job in range(args.jobs)]
    if any(job.wait() for job in jobs):
        sys.exit("A job failed; run this again to go on.")
    print(write_report(args.name, list(read_logs(folder, settings).values())))


if __name__ == "__main__":
    main()
