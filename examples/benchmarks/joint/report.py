"""Write the tables and the picture of joint training from the results that are there.

    python -m examples.benchmarks.joint.report

Puts them into examples/benchmarks/joint/README.md between its marks, from the files in
examples/benchmarks/joint/results, which examples/benchmarks/joint/run.py made.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from examples.benchmarks.pages import fill
from ifp_mlx.evaluation.plotting import pyplot
from ifp_mlx.evaluation.statistics import bootstrap, macro_mean
from ifp_mlx.evaluation.tables import markdown
from ifp_mlx.files.atomic import new_file

HERE = Path(__file__).parent
RESULTS, PAGE, PICTURE = HERE / "results", HERE / "README.md", "curves.svg"
RUNS = {"long": "450 steps", "short": "150 steps"}
SETS = ("facts", "seen", "unseen", "families")
KINDS = ("dense", "static", "apart", "added", "oracle")
COLOURS = {
    "dense": "0.6", "static": "tab:blue", "apart": "tab:red", "added": "tab:orange",
    "oracle": "k",
}  # fmt: skip
SMOOTH = 16  # steps of a curve that are averaged
LEARNED = 0.1  # nats a token: facts count as learned below this training loss


@dataclass(frozen=True)
class Result:
    """The results of an arm: rows by set and measure, and its log."""

    kind: str
    keep: float
    seed: int
    rows: dict[str, np.ndarray]
    about: dict[str, Any]

    def loss(self, name: str, measure: str = "nll") -> np.ndarray:
        """Return every row's loss in nats per answer token."""
        return self.rows[f"{name}.{measure}"] / self.rows[f"{name}.targets"]


def read_results(folder: Path) -> list[Result]:
    """Return all results, in the order of kinds, keeps and seeds."""
    found = []
    for path in folder.glob("*.npz"):
        with np.load(path) as file:
            rows = {name: file[name] for name in file if name != "about"}
            about = json.loads(str(file["about"]))
        arm = about["arm"]
        found.append(Result(arm["kind"], arm["keep"], arm["seed"], rows, about))
    return sorted(found, key=lambda r: (-r.keep, KINDS.index(r.kind), r.seed))


def by_task(values: np.ndarray, tasks: np.ndarray) -> dict[str, np.ndarray]:
    """Return the values of each task's rows."""
    return {str(task): values[tasks == task] for task in np.unique(tasks)}


def mean(result: Result, values: np.ndarray, name: str) -> float:
    """Return the mean over a set's rows, then over its tasks."""
    return macro_mean(by_task(values, result.rows[f"{name}.task"]))


class Report:
    """Tables of some results, as :func:`read_results` returns them."""

    def __init__(self, results: list[Result]) -> None:
        self.results = results

    def main_table(self) -> str:
        """Return every arm's losses, right answers and overlaps."""
        lines = []
        for r in self.results:
            right = mean(r, r.rows["facts.right"], "facts")
            losses = [f"{mean(r, r.loss(name), name):.3f}" for name in SETS]
            overlap = ""
            if "facts.within" in r.rows:
                within, between = r.rows["facts.within"], r.rows["facts.between"]
                overlap = f"{within.mean():.2f} / {between.mean():.2f}"
            arm = [f"{r.keep:.3g}", r.kind, str(r.seed), f"{right:.1%}"]
            lines.append([*arm, *losses, overlap])
            lines[-1].append(learned(r.about["log"]))
        head = ["keep", "arm", "seed", "facts right", *SETS, "overlap", "steps"]
        return markdown(head, lines)

    def differences(self) -> str:
        """Return every arm's distance to the static arm of its keep and seed."""
        static = {(r.keep, r.seed): r for r in self.results if r.kind == "static"}
        lines = []
        for r in self.results:
            other = static.get((r.keep, r.seed))
            if other is None or other is r:
                continue
            cells = [
                self._paired(r.rows["facts.right"].astype(float), "facts", other, True)
            ]
            cells += [self._paired(r.loss(name), name, other) for name in SETS]
            lines.append([f"{r.keep:.3g}", f"{r.kind} - static", str(r.seed), *cells])
        return markdown(["keep", "arms", "seed", "facts right", *SETS], lines)

    def _paired(
        self, values: np.ndarray, name: str, other: Result, right: bool = False
    ) -> str:
        theirs = other.rows["facts.right"].astype(float) if right else other.loss(name)
        groups = by_task(values - theirs, other.rows[f"{name}.task"])
        low, high = bootstrap(groups)
        if right:
            return f"{macro_mean(groups):+.1%} [{low:+.1%}, {high:+.1%}]"
        return f"{macro_mean(groups):+.3f} [{low:+.3f}, {high:+.3f}]"

    def own_masks(self) -> str:
        """Return what a predictor's masks are worth to the rows they are for."""
        lines = []
        for r in self.results:
            if "facts.shuffled_nll" not in r.rows:
                continue
            cells = []
            for name in SETS:
                own = mean(r, r.loss(name), name)
                other = mean(r, r.loss(name, "shuffled_nll"), name)
                cells.append(f"{own:.3f} / {other:.3f}")
            lines.append([f"{r.keep:.3g}", r.kind, str(r.seed), *cells])
        return markdown(["keep", "arm", "seed", *SETS], lines)

    def without_training(self) -> str:
        """Return what selection leaves of the dense arm, as trained."""
        dense = next(r for r in self.results if r.kind == "dense")
        lines = []
        for start in sorted({n[:-10] for n in dense.rows if n.endswith(".facts.nll")}):
            kind, _, keep = start.rpartition("-")
            part = Result(kind, float(keep), 0, _under(dense.rows, start), {})
            right = mean(part, part.rows["facts.right"], "facts")
            losses = [f"{mean(part, part.loss(name), name):.3f}" for name in SETS]
            lines.append([keep, kind, f"{right:.1%}", *losses])
        return markdown(["keep", "selected by", "facts right", *SETS], lines)

    def text(self, length: str) -> str:
        """Return all tables with their titles, which name ``length``."""
        parts = [
            (f"Every arm after {length}", self.main_table()),
            (f"Against the static mask, after {length}", self.differences()),
            (f"One's own mask / another row's, after {length}", self.own_masks()),
            (f"Selected from the dense arm, after {length}", self.without_training()),
        ]
        return "\n\n".join(f"### {title}\n\n{table}" for title, table in parts)

    def draw(self, path: Path) -> None:
        """Draw the training losses of facts, static and per input, keep by keep."""
        plt = pyplot()
        keeps = sorted({r.keep for r in self.results if r.kind == "static"})[::-1]
        figure, axes = plt.subplots(
            1, len(keeps), figsize=(3.4 * len(keeps), 3), sharey=True, squeeze=False
        )
        for axis, keep in zip(axes[0], keeps, strict=True):
            for r in self.results:
                if r.kind not in COLOURS or r.keep not in (keep, 1.0):
                    continue
                steps, losses = smooth(r.about["log"])
                label = r.kind if r.seed == 0 else None
                axis.plot(steps, losses, color=COLOURS[r.kind], lw=1, label=label)
            axis.set(title=f"keep {keep:.3g}", xlabel="step", yscale="log")
            axis.grid(alpha=0.3)
        axes[0][0].set_ylabel("training loss of facts, nats a token")
        every = [axis.get_legend_handles_labels() for axis in axes[0]]
        axes[0][0].legend(*max(every, key=lambda found: len(found[0])))
        figure.tight_layout()
        # Fixed names and no date, so that drawing again gives the same file.
        with new_file(path) as scratch, plt.rc_context({"svg.hashsalt": path.name}):
            figure.savefig(scratch, format="svg", metadata={"Date": None})
        plt.close(figure)


def _under(rows: dict[str, np.ndarray], start: str) -> dict[str, np.ndarray]:
    return {n[len(start) + 1 :]: v for n, v in rows.items() if n.startswith(start)}


def smooth(log: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
    """Return steps and moving averages of the losses of facts."""
    lines = [x for x in log if x.get("of") == "facts"]
    width = min(SMOOTH, max(1, len(lines) // 2))
    losses = np.array([line["loss"] for line in lines])
    means = np.convolve(losses, np.ones(width) / width, mode="valid")
    return [line["step"] for line in lines[width - 1 :]], means.tolist()


def learned(log: list[dict[str, Any]]) -> str:
    """Return the steps until the facts' training loss is below ``LEARNED``."""
    below = [step for step, loss in zip(*smooth(log), strict=True) if loss < LEARNED]
    return str(below[0]) if below else "-"


def main() -> None:
    """Write tables and picture."""
    runs = {n: Report(read_results(RESULTS / n)) for n in RUNS}
    runs["long"].draw(HERE / PICTURE)
    text = "\n\n".join(report.text(RUNS[n]) for n, report in runs.items())
    fill(PAGE, {"runs": text})


if __name__ == "__main__":
    main()
