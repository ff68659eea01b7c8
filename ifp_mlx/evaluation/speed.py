"""Speed and memory of the compact model beside the dense one and a stock one.

The rows (:mod:`ifp_mlx.evaluation.runners`) take turns in one process, each from nothing in
memory, so that a busy or throttled machine slows all alike, and ratios are taken within
each turn. Prefill is bound by arithmetic, decoding at batch 1 by the bytes of the
weights, so the two are timed apart. The prompt is running text, not one repeated token.
"""

import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.atomic import new_file
from ..slicing.shapes import Unit
from .plotting import pyplot
from .runners import LOADING, ROWS, Contest, Run
from .tables import markdown

PHASES = ("select", "load", "prefill", "decode", "ttft")


@dataclass
class Case:
    """What was measured for one keep and one length of the prompt.

    Attributes:
        target_size: ``k``.
        channels: ``F``; of experts, how many there are.
        unit: what is kept.
        prompt_tokens: of the prompt.
        max_tokens: tokens that were decoded.
        runs: the runs of each row, one a turn.
        cold: the runs of each row that loads, with nothing in the system's cache.
    """

    target_size: int
    channels: int
    prompt_tokens: int
    max_tokens: int
    runs: dict[str, list[Run]]
    cold: dict[str, list[Run]]
    unit: Unit = "channel"

    @property
    def keep(self) -> float:
        """Share of the units."""
        return self.target_size / self.channels

    def values(self, row: str, name: str) -> list[float]:
        """Return a figure of a row, turn by turn."""
        return [float(getattr(run, name)) for run in self.runs[row]]

    def median(self, row: str, name: str) -> float:
        """Return the median of a figure of a row."""
        return statistics.median(self.values(row, name))

    def tokens_per_second(self, row: str) -> float:
        """Return the median decoding speed of a row."""
        return (self.max_tokens - 1) / self.median(row, "decode")

    def ratios(self) -> dict[str, list[float]]:
        """Return, turn by turn, how the compact model compares with the others."""

        def pairs(name: str, row: str) -> list[float]:
            found = zip(
                self.values(row, name), self.values("compact", name), strict=True
            )
            return [other / own for other, own in found]

        result = {
            f"{name} speed, compact / {row}": pairs(name, row)
            for name in ("prefill", "decode")
            for row in ("stock", "dense")
        }
        result["time to first token, dense loaded / compact"] = pairs("ttft", "dense")
        ready = zip(self.runs["compact"], self.runs["dense"], strict=True)
        result["select and load, compact / prefill, dense"] = [
            (own.select + own.load) / dense.prefill for own, dense in ready
        ]
        return result

    def report(self) -> dict[str, Any]:
        """Return everything as plain data."""
        names = (*PHASES, "peak_bytes", "read_bytes")
        return {
            "keep": self.keep,
            "target_size": self.target_size,
            "unit": self.unit,
            "channels": self.channels,
            "prompt_tokens": self.prompt_tokens,
            "max_tokens": self.max_tokens,
            "seconds": {
                row: {name: [getattr(run, name) for run in runs] for name in names}
                for row, runs in self.runs.items()
            },
            "cold_seconds": {
                row: [run.select + run.load for run in runs]
                for row, runs in self.cold.items()
            },
            "ratios": self.ratios(),
        }


def measure(
    contest: Contest,
    *,
    turns: int,
    cold: bool = False,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Case:
    """Let the rows take turns, after one turn that is not counted.

    Args:
        contest: what they have in common.
        turns: how many to count.
        cold: also time loading with nothing in the system's cache.
        progress: wraps the iteration over turns.
    """
    runs: dict[str, list[Run]] = {row: [] for row in ROWS}
    forgotten: dict[str, list[Run]] = {row: [] for row in LOADING} if cold else {}
    for turn in progress(range(turns + 1)):
        for row in ROWS[:: 1 if turn % 2 else -1]:  # so that none is always first
            run = contest.run(row)
            if turn:
                runs[row].append(run)
        for row in forgotten if turn else ():
            forgotten[row].append(contest.run(row, cold=True))
    channels, tokens = contest.model.channels, len(contest.prompt)
    about = (contest.size, channels, tokens, contest.max_tokens, runs, forgotten)
    return Case(*about, unit=contest.model.plan.unit)


def table(cases: Sequence[Case]) -> str:
    """Return the medians as a Markdown table."""
    head = ["keep", "prompt", "row", "select s", "load s", "cold s", "prefill s"]
    head += ["TTFT s", "tokens/s", "peak MB", "read MB"]
    rows = []
    for case, row in ((case, row) for case in cases for row in ROWS):
        loads = row in LOADING
        cold = [run.select + run.load for run in case.cold.get(row, [])]
        read = case.runs[row][0].read_bytes
        seconds = [case.median(row, name) for name in PHASES]
        select, load, prefill, _, ttft = (f"{value:.3f}" for value in seconds)
        cells = [f"{case.keep:.3g}", str(case.prompt_tokens), row]
        cells += [select, load] if loads else ["", ""]
        cells += [f"{statistics.median(cold):.3f}" if cold else "", prefill]
        cells += [ttft if loads else "", f"{case.tokens_per_second(row):.1f}"]
        cells += [f"{case.median(row, 'peak_bytes') / 1e6:.0f}"]
        cells += [f"{read / 1e6:.0f}" if loads and read is not None else ""]
        rows.append(cells)
    return markdown(head, rows)


def draw(cases: Sequence[Case], path: Path) -> None:
    """Draw time to first token and decoding speed against keep.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    plt = pyplot()

    figure, panels = plt.subplots(1, 2, figsize=(10, 4))
    lengths = sorted({case.prompt_tokens for case in cases})
    for length, row in itertools.product(lengths, ROWS):
        shown = sorted(
            (case for case in cases if case.prompt_tokens == length),
            key=lambda case: case.keep,
        )
        keeps = [case.keep for case in shown]
        label, style = f"{row}, {length} tokens", "-" if length == lengths[0] else "--"
        color = f"C{ROWS.index(row)}"
        speeds = [case.tokens_per_second(row) for case in shown]
        panels[1].plot(keeps, speeds, style, marker="o", color=color, label=label)
        if row in LOADING:
            times = [case.median(row, "ttft") for case in shown]
            panels[0].plot(keeps, times, style, marker="o", color=color, label=label)
    for panel, name in zip(panels, ("time to first token, s", "tokens/s"), strict=True):
        panel.set(
            xlabel=f"kept share of the {cases[0].unit}s", ylabel=name, ylim=(0, None)
        )
        panel.grid(alpha=0.25)
        panel.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    with new_file(path) as scratch:
        figure.savefig(scratch, dpi=100)
    plt.close(figure)
