"""Measure the whole table: every row at every rate on one seed, then on three others.

What is done already is left alone, so that a command that was stopped goes on. The rate
of a row is the one whose model is right most often on the seed that chooses; no row's is
the end of what was tried.
"""

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ifp_mlx.files.atomic import new_file
from ifp_mlx.training.estimate import estimate
from ifp_mlx.training.recipe import TrainConfig
from ifp_mlx.training.run import REPORT, run, train

from .corpus import Corpus, describe
from .data import write_data, write_shapes
from .lab import Scale, measure, overlaps
from .rows import ROWS, SEEN, Table, opened, prune, split, train_oracle
from .tasks import all_tasks, test_examples

RESULTS = Path(__file__).parent / "measured"
CACHE = Path("models/comparison")


@dataclass
class Bench:
    """One mix: its rows, and where runs and results are.

    Args:
        table: what the file of rows says.
        cache: folder of models, data and runs.
        results: folder of what is kept of them.
    """

    table: Table
    cache: Path
    results: Path

    def data(self, seed: int) -> Path:
        """Return the folder of a seed's data, written now if it is not there."""
        folder = self.cache / "data" / str(seed)
        write_data(folder, self.table.scale, self.table.examples, seed)
        return folder

    def folder(self, row: str, rate: float, seed: int) -> Path:
        """Return the folder of a run."""
        return self.cache / "runs" / f"{rate:g}" / str(seed) / row

    def config(self, row: str, rate: float, seed: int, steps: int = 1) -> TrainConfig:
        """Return the complete settings of a run; what it begins with is made now."""
        about, output = self.table.rows[row], self.folder(row, rate, seed)
        settings = self.table.settings(row, rate, seed)
        data = self.data(seed) / about.get("data", "questions")
        if (teacher := settings.get("teacher")) is not None:
            self.trained(teacher, rate, seed)
            settings["teacher"] = str(self.folder(teacher, rate, seed) / "model")
        begins = about["from"]
        if begins in self.table.rows:
            self.trained(begins, rate, seed)
            model = self.folder(begins, rate, seed) / "model"
        else:
            model = self.cache / "shapes" / begins
        if about.get("prune"):
            cut = model.parent / "pruned"
            prune(model, data, self.table.scale.kept, cut)
            model = cut
        if about.get("split"):
            cut = model.parent / "split"
            split(model, self.cache / "shapes" / "experts", settings["seed"], cut)
            model = cut
        if settings.get("masker") == "dense":
            settings.pop("target_size")
        where = {"model": str(model), "data": str(data), "output": str(output)}
        config = TrainConfig(**settings | where | {"steps": steps})
        config.check()
        return config

    def steps(self, row: str, rate: float, seed: int) -> int:
        """Return how many steps a row makes."""
        asked = self.table.rows[row]["steps"]
        if isinstance(asked, str):
            return self.table.steps[asked]
        if isinstance(asked, dict):
            return self._as(row, asked["as"], rate, seed)
        return round(asked * self.table.steps["second"])

    def _as(self, row: str, other: str, rate: float, seed: int) -> int:
        """Return how many steps cost as much as another row, its beginnings counted."""
        wanted = self.cost(other, self._known(other, rate, seed), seed)
        wanted -= sum(self._own(r, rate, seed) for r in self._before(row)[:-1])
        one = estimate(self.config(row, rate, seed)).cost
        return max(1, round((wanted - one.warm_start) / (one.total - one.warm_start)))

    def _known(self, row: str, rate: float, seed: int) -> float:
        """Return a rate at which a row has been run, else ``rate``: it costs the same."""
        done = sorted(self.cache.glob(f"runs/*/{seed}/{row}/comparison.json"))
        return float(done[0].parents[2].name) if done else rate

    def trained(self, row: str, rate: float, seed: int) -> dict[str, Any]:
        """Return the report of a run, which is made now if it is not there."""
        about, folder = self.table.rows[row], self.folder(row, rate, seed)
        path = folder / "comparison.json"
        if "select" in about:
            self.trained(about["from"], rate, seed)
            return {"seconds": 0.0, "multiplications": 0.0}
        if not path.exists():
            steps = self.steps(row, rate, seed)
            config = self.config(row, rate, seed, steps)
            began = time.process_time()
            if "oracle" in about:
                cost = estimate(replace(config, masker="dense")).cost.total
                if not (folder / "model").exists():
                    train_oracle(config, about["oracle"], self.table.scale, train)
            else:
                if not (folder / REPORT).exists():
                    run(config, lambda line: None)
                report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
                cost = sum(report["multiplications"].values())
            if about.get("prune") or about.get("oracle") == "learned":
                cost += self._looked(rate, seed)
            found = {"steps": steps, "multiplications": cost}
            found |= {"seconds": time.process_time() - began}
            with new_file(path) as scratch:
                scratch.write_text(json.dumps(found) + "\n", encoding="utf-8")
        return json.loads(path.read_text(encoding="utf-8"))

    def _looked(self, rate: float, seed: int) -> float:
        """Return what reading the examples costs that a mask is made from."""
        examples = self.table.steps["start"] * self.table.scale.batch_size
        forward = self._own("start", rate, seed) / examples / 3
        return forward * min(SEEN * 32, self.table.examples)

    def _before(self, row: str) -> list[str]:
        """Return all that has to be trained for a row: beginnings, teacher, itself."""
        about, found = self.table.rows[row], []
        for other in (about.get("teacher"), about["from"]):
            if other in self.table.rows:
                found += self._before(other)
        return [*dict.fromkeys([*found, row])]

    def _own(self, row: str, rate: float, seed: int) -> float:
        return float(self.trained(row, rate, seed)["multiplications"])

    def cost(self, row: str, rate: float, seed: int) -> float:
        """Return the multiplications of all that a row needs, each run counted once."""
        return sum(self._own(r, rate, seed) for r in self._before(row))

    def measured(self, row: str, rate: float, seed: int) -> dict[str, Any]:
        """Return what a row is worth, trained and tested now if it has not been."""
        path = self.results / f"{row}-{rate:g}-{seed}.json"
        if not path.exists():
            print(f"{row}, rate {rate:g}, seed {seed} ...", flush=True)
            found = self._test(row, rate, seed)
            with new_file(path) as scratch:
                scratch.write_text(json.dumps(found) + "\n", encoding="utf-8")
            print(f"{row}, rate {rate:g}, seed {seed}: {found['mean']:.3f}", flush=True)
        return json.loads(path.read_text(encoding="utf-8"))

    def _test(self, row: str, rate: float, seed: int) -> dict[str, Any]:
        about, scale = self.table.rows[row], self.table.scale
        report = self.trained(row, rate, seed)
        source = about["from"] if "select" in about else row
        result = self.folder(source, rate, seed) / "model"
        trained = opened(result, scale, activation="select" in about)
        tasks = all_tasks(scale.mix)
        batches = tested(scale, seed)
        known = self._known("start", rate, seed)
        step = self._own("start", known, seed) / self.table.steps["start"]
        found = measure(trained, batches, tasks) | {
            "overlap": overlaps(trained, batches, len(tasks)),
            "parameters": sum(w.size for _, w in tree_flatten(trained.model.parameters())),
            "compute": self.cost(row, rate, seed) / step,
            "cpu_seconds": sum(
                self.trained(r, rate, seed)["seconds"] for r in self._before(row)
            ),
            "steps": report.get("steps", 0),
            "row": row, "rate": rate, "seed": seed, "mix": scale.mix,
        }  # fmt: skip
        if (result / "predictor").exists() and "select" not in about:
            described = tested(scale, seed, described=True)
            found["per_task"] = measure(trained, described, tasks)
            found["per_task_overlap"] = None
        return found

    def rate(self, row: str) -> float:
        """Return the rate of a row that the choosing seed finds best; where that is the
        lowest or the highest, the next one is tried too.
        """

        def worth(rate: float) -> float:
            return self.measured(row, rate, self.table.chooses)["mean"]

        rates = sorted(self.table.rates)
        best = max(rates, key=worth)
        while len(rates) > 1 and best in (rates[0], rates[-1]):
            ratio = rates[1] / rates[0]
            beyond = best * ratio if best == rates[-1] else best / ratio
            if worth(beyond) <= worth(best):
                break
            rates, best = sorted([*rates, beyond]), beyond
        return best


def tested(scale: Scale, seed: int, *, described: bool = False) -> list[Any]:
    """Return the test examples; ``described``: their task's description selects."""
    tasks = all_tasks(scale.mix)
    drawn = test_examples(tasks, scale.test_per_task, seed)
    corpus = Corpus(drawn, 64, scale.mix)
    if described:
        describe(tasks, corpus)
    return corpus.all()


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=ROWS, help="the file of rows")
    parser.add_argument("--mix", nargs="+", default=["plain", "crowded"])
    parser.add_argument("--rows", nargs="+", help="default: all that are not hidden")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: the file's")
    parser.add_argument("--rates", type=float, nargs="+", help="default: the file's")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument(
        "--tiny", action="store_true", help="a few steps, to see that it runs"
    )
    args = parser.parse_args(arguments)
    mx.set_default_device(mx.cpu)
    for mix in args.mix:
        table = Table.read(args.config, mix, tiny=args.tiny)
        if args.rates:
            table.rates[:] = args.rates
        write_shapes(args.cache / mix / "shapes", table.scale)
        (args.results / mix).mkdir(parents=True, exist_ok=True)
        bench = Bench(table, args.cache / mix, args.results / mix)
        shown = [name for name, row in table.rows.items() if not row.get("hidden")]
        for row in args.rows or shown:
            rate = bench.rate(row)
            for seed in args.seeds if args.seeds is not None else table.seeds:
                bench.measured(row, rate, seed)


if __name__ == "__main__":
    main()
