"""Quality of whole models at few bits, and of selections, against their bytes.

    python -m examples.benchmarks.frontier.measure [smollm2|gemma3] [--rows 20]
        [--jobs 2] [--points NAME ...]

Writes results-MODEL.csv and about-MODEL.json beside this file, the page and its
picture. What is measured already is not measured again, here or in those results, so a
stopped run goes on where it was. Everything that it makes stays in models/frontier;
delete that and the results once the package selects differently.
"""

import argparse
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import cast

import mlx.core as mx
from tqdm import tqdm

from examples.benchmarks.jobs import in_parallel
from examples.benchmarks.selectors.bench_attention import attention
from examples.benchmarks.selectors.task_families import write as write_families
from examples.fetch import MODELS, fetch
from ifp_mlx import load
from ifp_mlx.evaluation.log import Line, Log
from ifp_mlx.evaluation.rows import Row, read_rows

from . import report
from .models import Selected, Whole, unpacked
from .points import AFFINE, ANSWER, BASES, FILE, POINTS, PROMPT, REFERENCE, Point
from .quantisers import calibration, quantised
from .reference import SEED, Dense, compare, logits_of, write_model, write_reference

MODULE = "examples.benchmarks.frontier.measure"  # of this file
# One has answers of one token, and the others' prompts are so long that a row takes three
# times as long.
LEFT_OUT = ("boolq", "dialog", "facts", "qgen", "sql")
Key = tuple[str, int]
Rows = dict[Key, Row]


def first_rows(rows: Sequence[Row], count: int) -> list[Row]:
    """Return the first rows whose prompts are short, then the shortest of the others."""
    long = sorted((r for r in rows if len(r.prompt) > PROMPT), key=_length)
    return [*(r for r in rows if len(r.prompt) <= PROMPT), *long][:count]


def _length(row: Row) -> int:
    return len(row.prompt)


@contextmanager
def quick_attention() -> Iterator[None]:
    """Let numpy compute attention's exponentials inside the block; without
    gradients.
    """
    stock = mx.fast.scaled_dot_product_attention
    # It takes no stream; no model here gives one.
    mx.fast.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        yield
    finally:
        mx.fast.scaled_dot_product_attention = stock


class Run:
    """A model's points: those measured, and those left.

    Args:
        name: smollm2 or gemma3.
        count: rows of each family.
        points: to measure.
        folder: for everything that is made; stays.
        filed: the folder of results that were written before; ``None`` begins anew.
    """

    def __init__(
        self,
        name: str,
        count: int,
        points: Sequence[Point],
        folder: Path,
        filed: Path | None = None,
    ) -> None:
        self.name, self.count, self.points = name, count, points
        self.folder, self.source = folder, fetch(name)
        self._filed = {} if filed is None else report.filed(name, filed)
        versions = {name: version(name) for name in ("mlx", "mlx-lm")}
        self._settings = versions | {"prompt": PROMPT, "answer": ANSWER, "seed": SEED}

    def log(self, job: str) -> Log:
        """Return the log of the rows that one job measures."""
        return Log(self.folder / "rows" / job, self._settings, report.KEY)

    def failures(self, job: str) -> Log:
        """Return the log of the points that one job could not make."""
        return Log(self.folder / "failures" / job, self._settings, ("point",))

    def lines(self) -> dict[tuple, Line]:
        """Return the rows of all jobs so far, and those filed before, by point, family
        and number.
        """
        jobs = sorted(path.name for path in self.folder.glob("rows/*"))
        logs = [self.log(job).lines for job in jobs]
        return self._filed | {key: line for log in logs for key, line in log.items()}

    @cached_property
    def rows(self) -> Rows:
        """The rows, by family and number."""
        _, tokenizer = load(self.source)
        found: Rows = {}
        for file in sorted((write_families() / "test").glob("*.jsonl")):
            if file.stem not in LEFT_OUT:
                rows = read_rows(file, tokenizer, answer_tokens=ANSWER)
                some = enumerate(first_rows(rows, self.count))
                found |= {(file.stem, number): row for number, row in some}
        return found

    def dense_folder(self, source: str) -> Path:
        """Return the folder of the dense model, as filed or perturbed."""
        return self.source if source == FILE else self.folder / REFERENCE

    def dense(self, source: str) -> Dense:
        """Return what points of a source are compared with."""
        return Dense(self.dense_folder(source), self.folder / "states" / source)

    def whole(self, point: Point) -> Path:
        """Return the folder of a whole model, made if it is not there yet."""
        if point.kind == "dense":
            return self.dense_folder(point.source)
        folder = self.folder / "whole" / point.name.replace("/", "-")
        if not folder.exists():
            dense = self.dense_folder(point.source)
            write_model(folder, *quantised(point, dense), dense)
        return folder

    def plain(self, base: Point) -> Path:
        """Return the folder of a quantised model's weights in float32, made if it is
        not there yet.
        """
        folder = self.folder / "unpacked" / base.name.replace("/", "-")
        if not folder.exists():
            _, model = unpacked(self.whole(base))
            model_config = load(self.dense_folder(REFERENCE))[0].config
            write_model(folder, model, model_config, self.source)
        return folder

    def prepare(self) -> None:
        """Make what several jobs need."""
        if not self.dense_folder(REFERENCE).exists():
            write_reference(self.source, self.dense_folder(REFERENCE))
        for base in (point for point in AFFINE if (point.bits, point.group) in _BASES):
            model, _ = load(self.plain(base))
            model.sketch(tqdm)
        with quick_attention():
            for source in {point.compared for point in self.points}:
                self.dense(source).read(self.rows)

    def measure(self, job: int, jobs: int) -> None:
        """Measure this job's share of the points."""
        done, log = self.lines(), self.log(f"job-{job}")
        for point in self.points[job::jobs]:
            missing = {
                k: r for k, r in self.rows.items() if (point.name, *k) not in done
            }
            if not missing:
                continue
            start = time.process_time()
            try:
                models = self._models(point)
            except Exception as error:  # any error of mlx-lm; the page shows it
                said = f"{type(error).__name__}: {error}".partition("\n")[0]
                self.failures(f"job-{job}").add({"point": point.name, "error": said})
                continue
            spent = time.process_time() - start
            print(f"{point.name}: made in {spent:.0f} s", file=sys.stderr, flush=True)
            self._measure_rows(point, models, missing, log)

    def _models(self, point: Point) -> Whole | Selected:
        if point.kind == "select":
            return Selected(point, self.whole(point.base), self.plain(point.base))
        return Whole(self.whole(point))

    def _measure_rows(
        self, point: Point, models: Whole | Selected, rows: Rows, log: Log
    ) -> None:
        dense = self.dense(point.compared)
        with quick_attention():
            for key, row in tqdm(rows.items(), desc=point.name, disable=None):
                start = time.process_time()
                found = logits_of(models.model_for(row.prompt), row)
                line = dict(zip(report.KEY, (point.name, *key), strict=True))
                line |= {"tokens": len(row.answer), "bytes": models.bytes}
                line |= compare(found, dense.logits(key), row.answer)
                log.add(line | {"seconds": round(time.process_time() - start, 2)})

    def write(self) -> None:
        """Write the results of all jobs beside this file, then the page; a point counts
        once all of its rows are measured.
        """
        failed: dict[str, str] = {}
        for path in sorted(self.folder.glob("failures/*")):
            lines = self.failures(path.name).lines.values()
            failed |= {line["point"]: line["error"] for line in lines}
        dense = self.dense_folder(REFERENCE)
        weights = cast(dict[str, mx.array], mx.load(str(dense / "model.safetensors")))
        about = {
            "weights": sum(weight.size for weight in weights.values()),
            "text": calibration(dense).size,
            "failed": failed,
        }
        found = {k: line for k, line in self.lines().items() if k[1:] in self.rows}
        counts = Counter(point for point, *_ in found)
        rows = [line for k, line in found.items() if counts[k[0]] == len(self.rows)]
        report.write_results(self.name, rows, about)
        report.write()


_BASES = {(bits, 64) for bits in BASES}


def main(argv: list[str] | None = None) -> None:
    """Measure, in one process per job, then write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    names = {point.name: point for point in POINTS}
    add("name", nargs="?", default="smollm2", choices=report.MODELS)
    add("--rows", type=int, default=20, help="of each family")
    add("--jobs", type=int, default=2, help="processes")
    add("--points", nargs="+", choices=names, default=list(names), metavar="NAME")
    add("--job", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    points = [names[name] for name in args.points]
    folder = MODELS / "frontier" / args.name
    run = Run(args.name, args.rows, points, folder, filed=report.HERE)
    if args.job is not None:
        mx.disable_compile()  # else every fused kernel on a CPU costs a call of a compiler
        run.measure(args.job, args.jobs)
        return
    run.prepare()
    arguments = sys.argv[1:] if argv is None else argv
    in_parallel(MODULE, arguments, args.jobs)
    run.write()


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
