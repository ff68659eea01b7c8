"""Compare ways of selecting on ten families of tasks: the evidence for the defaults.

    python examples/selectors_bench.py [smollm2|gemma3] [--rows 40] [--jobs 2]

Writes examples/selectors-MODEL.md. Every answer token is compared with the dense model's
next-token distribution. Rows that are measured already are not measured again, so a
stopped run goes on where it was; rows are taken in turn from all families, so that it
can be stopped at any time. Where a mask comes from:

- random; activation: of this prompt alone
- prior: the package's own calibration text, none of these tasks
- blend: the ranks of activation and prior averaged
- others: one static mask from 16 examples each of the other families
- task: one static mask from 16 other examples of the same family

The allocation `sensitivity` is measured on calibration examples of the other families,
`own sensitivity` on those of all, as a user with data of the task would.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from bench_model import Bench, Reading, energy
from bench_report import write_report
from fetch import MODELS, fetch
from task_families import write as write_families
from tqdm import tqdm

from ifp_mlx import Selection, masks, selectors
from ifp_mlx.compensation import read_channels
from ifp_mlx.evaluation.log import Log
from ifp_mlx.evaluation.rows import Row, read_rows
from ifp_mlx.evaluation.teacher import metrics
from ifp_mlx.sensitivity import Probe

ANSWER_TOKENS = 96
TASK_TOKENS = 1000  # of the calibration examples, for the task's own compensation
SENSITIVITY_TOKENS = 110  # of one example of each family
KEEPS = (0.5, 0.75, 1 / 3)
STAGES = (KEEPS[:1], KEEPS[1:])  # all rows go through the first before the second
KEY = ("family", "row", "way", "keep")
CPU = ("all", 0, "processor", 0.0)  # under which a job keeps the time it took
SETTINGS = {"answer_tokens": ANSWER_TOKENS}


class Way(NamedTuple):
    """One way of selecting.

    Attributes:
        scores: where they come from.
        allocation: how the kept channels are spread over the layers.
        compensation: the text that it learns from, ``prompt`` or ``examples``.
        prompt: which model reads the prompt, ``compact`` or ``dense``.
        keeps: the kept shares it is measured at.
    """

    scores: str
    allocation: str
    compensation: str = ""
    prompt: str = "compact"
    keeps: tuple[float, ...] = KEEPS[:1]

    @property
    def name(self) -> str:
        """What the table calls it."""
        text = f"{self.scores}, {self.allocation}"
        text += f", compensated by {self.compensation}" if self.compensation else ""
        return text + (", dense prompt" if self.prompt == "dense" else "")


WAYS = (
    Way("random", "uniform"),
    Way("others", "uniform"),
    Way("others", "first-layer", keeps=KEEPS),
    Way("activation", "uniform", keeps=KEEPS),
    Way("activation", "uniform", prompt="dense", keeps=KEEPS),
    Way("activation", "first-layer"),
    Way("blend", "first-layer", keeps=KEEPS),
    Way("blend", "first-layer", prompt="dense", keeps=KEEPS),
    Way("blend", "first-layer", "prompt", keeps=KEEPS),
    Way("blend", "first-layer", "prompt", prompt="dense"),
    Way("blend", "sensitivity"),
    Way("task", "first-layer"),
    Way("task", "own sensitivity", keeps=KEEPS),
    Way("task", "own sensitivity", "examples"),
)


class Statics:
    """What is measured once: statistics and costs of each family's calibration rows.

    Args:
        bench: the model.
        folder: where the results are kept.
    """

    def __init__(self, bench: Bench, folder: Path) -> None:
        self.bench = bench
        self._examples: dict[str, list[list[int]]] = {}
        self._sliced: dict[tuple, list[nn.Module]] = {}
        files = sorted((write_families() / "calibration").glob("*.jsonl"))
        self.families = [file.stem for file in files]
        for file in files:
            rows = read_rows(file, bench.tokenizer, answer_tokens=ANSWER_TOKENS)
            self._examples[file.stem] = [row.prompt + row.answer for row in rows]
        self._energy = self._kept(folder / "energies.safetensors", self._measure_energy)
        self._costs = self._kept(folder / "costs.safetensors", self._measure_costs)

    def scores(self, kind: str, family: str) -> mx.array:
        """Return the static scores ``others`` or ``task`` of a family, ``[L, F]``."""
        if kind == "task":
            return mx.sqrt(self._energy[family])
        return _static(e for name, e in self._energy.items() if name != family)

    def costs(self, allocation: str, family: str) -> mx.array | None:
        """Return the layers' costs ``[L, 6]`` that an allocation goes by."""
        if not allocation.endswith("sensitivity"):
            return None
        own = allocation == "own sensitivity"
        found = [c for name, c in self._costs.items() if own or name != family]
        return mx.stack(found).mean(axis=0)

    def compensated(self, family: str, selection: Selection) -> list[nn.Module]:
        """Return the FFNs of a selection that is the same for all rows of a family,
        compensated by what its first calibration examples show.
        """
        key = family, selection.mask_id
        if key not in self._sliced:
            tokens = sum(self._examples[family], [])[:TASK_TOKENS]
            channels = read_channels(self.bench.dense, tokens)
            self._sliced[key] = self.bench.sliced(selection, channels)
        return self._sliced[key]

    def _kept(self, file: Path, measure: Any) -> dict[str, mx.array]:
        if not file.exists():
            mx.save_safetensors(
                str(file.with_suffix(".partial.safetensors")), measure()
            )
            file.with_suffix(".partial.safetensors").rename(file)
        return dict(mx.load(str(file)))  # type: ignore[arg-type]

    def _measure_energy(self) -> dict[str, mx.array]:
        found = {}
        for name in tqdm(self.families, "statistics", disable=None):
            scores = selectors.prior_scores(self.bench.dense, self._examples[name])
            found[name] = mx.square(scores)
        return found

    def _measure_costs(self) -> dict[str, mx.array]:
        """Return each family's costs ``[L, 6]``, by texts of its calibration rows."""
        texts = []
        for name in self.families:
            enough = [text for text in self._examples[name] if len(text) > 60]
            texts += [min(enough, key=len)[:SENSITIVITY_TOKENS]]
        probe = Probe(self.bench.model, texts, _static(self._energy.values()))
        layers = tqdm(range(self.bench.model.layers), "sensitivity", disable=None)
        costs = mx.array([probe.costs(layer).tolist() for layer in layers])
        return {name: costs[:, n] for n, name in enumerate(self.families)}


def _static(energies: Any) -> mx.array:
    """Return the scores of several texts together, each with the same say."""
    shares = (energy / energy.sum(axis=1, keepdims=True) for energy in energies)
    return mx.sqrt(sum(shares))


def measure_row(
    statics: Statics, family: str, number: int, row: Row, keeps: tuple[float, ...]
) -> Iterator[dict]:
    """Yield the results of every way that is measured at one of ``keeps``."""
    bench = statics.bench
    reading = bench.read(row)
    about = {"family": family, "row": number, "tokens": len(row.answer)}
    reference = metrics(row, reading.reference, reading.reference)
    yield about | {"way": "dense", "keep": round(keeps[0], 3)} | reference
    scores = row_scores(statics, family, number, reading)
    chosen = [(way, keep) for way in WAYS for keep in way.keeps if keep in keeps]
    for (kind, allocation, text, keep), group in groupby(
        sorted(chosen, key=lambda c: (*c[0][:3], c[1])), lambda c: (*c[0][:3], c[1])
    ):
        costs = statics.costs(allocation, family)
        selection = choose(bench, scores[kind], allocation, keep, costs)
        if text == "examples":
            modules = statics.compensated(family, selection)
        else:
            modules = bench.sliced(selection, reading.channels if text else None)
        for way, _ in group:
            if way.prompt == "dense":
                found = bench.decode(row, modules, reading)
            else:
                found = bench.compact(row, modules)
            measured = metrics(row, found, reading.reference)
            yield about | {"way": way.name, "keep": round(keep, 3)} | measured


def row_scores(
    statics: Statics, family: str, number: int, reading: Reading
) -> dict[str, mx.array]:
    """Return the scores of every kind for one row, each ``[L, F]``."""
    bench = statics.bench
    local = mx.sqrt(mx.stack([energy(h) for h in reading.channels]))
    L, F = local.shape
    return {
        "random": selectors.random_scores(L, F, seed=number),
        "activation": local,
        "blend": selectors.blend_scores(local, bench.prior),
        "others": statics.scores("others", family),
        "task": statics.scores("task", family),
    }


def choose(
    bench: Bench,
    scores: mx.array,
    allocation: str,
    keep: float,
    costs: mx.array | None,
) -> Selection:
    """Return the selection, its layers as wide as the allocation says."""
    model = bench.model
    k = masks.target_size(model.channels, keep, model.granularity)
    name: Any = allocation.removeprefix("own ")
    shape = (k, model.layers, model.channels, name, model.granularity)
    sizes = masks.layer_sizes(*shape, costs)
    return masks.select(scores, sizes, granularity=model.granularity)


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
    files = sorted((write_families() / "test").glob("*.jsonl"))
    rows = {
        file.stem: read_rows(
            file, bench.tokenizer, limit=count, answer_tokens=ANSWER_TOKENS
        )
        for file in files
    }
    for number in range(count):
        for family, found in rows.items():
            if number < len(found):
                yield family, number, found[number]


def read_logs(folder: Path) -> dict[tuple, dict]:
    """Return the results of all jobs so far, by family, row, way and keep."""
    files = sorted(folder.glob("job-*"))
    found: dict[tuple, dict] = {}
    for file in files:
        found |= Log(file, SETTINGS, KEY).lines
    return found


def measure(name: str, folder: Path, rows: int, job: int, jobs: int) -> None:
    """Measure this job's share of what no log has yet."""
    done = read_logs(folder)
    bench = Bench(own_copy(fetch(name)))
    statics = Statics(bench, folder)
    log = Log(folder / f"job-{job}", SETTINGS, KEY)
    everything = [
        (*row, keeps) for keeps in STAGES for row in rows_in_turn(bench, rows)
    ]
    start, before = time.process_time(), log.lines.get(CPU, {"seconds": 0.0})["seconds"]
    for family, number, row, keeps in tqdm(everything[job::jobs], disable=None):
        if (family, number, "dense", round(keeps[0], 3)) in done:
            continue
        log.add(*measure_row(statics, family, number, row, keeps))
        spent = before + time.process_time() - start
        log.add(dict(zip(KEY, CPU, strict=True)) | {"seconds": spent})


def main() -> None:
    """Measure, in one process per job, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", default="smollm2")
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--job", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = MODELS / "bench" / f"{args.name}-rows"
    folder.mkdir(parents=True, exist_ok=True)
    if args.job is not None:
        measure(args.name, folder, args.rows, args.job, args.jobs)
        return
    Statics(Bench(own_copy(fetch(args.name))), folder)  # before the jobs need it
    again = [sys.executable, __file__, *sys.argv[1:], "--job"]
    jobs = [subprocess.Popen([*again, str(job)]) for job in range(args.jobs)]
    if any(job.wait() for job in jobs):
        sys.exit("A job failed; run this again to go on.")
    print(write_report(args.name, list(read_logs(folder).values())))


if __name__ == "__main__":
    main()
