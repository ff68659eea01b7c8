"""Speed of a compact model that the whole one checks, and the bytes read for it.

It is compared with the dense model in memory; with the compact one alone, whose answer
may differ; and with naive streaming: the dense model with only one channel a layer (one
group of them, if quantised) in memory, all others read for every token by the same
code. Bytes come from the system's cache, or, slowed down by :class:`Disk`, as from a
disk of some bandwidth, which shows the speed of a model larger than memory.
"""

import statistics
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import mlx.core as mx

from ..checking.loop import CheckedRun, DraftLength
from ..checking.rule import Rule
from ..checking.whole import Whole
from ..decoding.options import Decoding
from ..files.amounts import physical_memory
from ..model.checkpoint import Compact, IFPModel
from ..model.decide import decide
from ..selection.request import MOST_DRAFTED, Check, Request
from .cost import decode
from .runners import clear
from .tables import markdown

DENSE, ALONE, STREAMING = "dense", "compact alone", "streaming"
STREAMED = 8  # tokens to stream; more would tell nothing, as all take the same time


class Disk:
    """A single disk of some bandwidth, which many threads read from.

    Each thread waits until its bytes could have arrived, after all bytes that were
    asked for earlier.

    Args:
        bandwidth: bytes per second.
    """

    def __init__(self, bandwidth: float) -> None:
        self.bandwidth = bandwidth
        self._free = 0.0  # the time at which everything asked for so far has arrived
        self._lock = threading.Lock()

    def __call__(self, nbytes: int, began: float) -> None:
        """Wait until the bytes could have arrived; to be used as
        :attr:`ifp_mlx.storage.units.UnitReader.throttle`.
        """
        with self._lock:
            self._free = max(self._free, began) + nbytes / self.bandwidth
            due = self._free
        time.sleep(max(0.0, due - time.perf_counter()))


@dataclass
class Decoded:
    """One run of a row, from the end of the prompt on.

    Attributes:
        tokens: of the answer.
        seconds: how long they took.
        checks: passes of the dense model, layer by layer.
        bytes_read: bytes of channels read in that time.
        peak_bytes: MLX's peak, loading and reading the prompt included.
    """

    tokens: int
    seconds: float
    checks: int = 0
    bytes_read: int = 0
    peak_bytes: int = 0


@dataclass
class CheckedContest:
    """What the rows have in common.

    Attributes:
        model: the large model.
        keeps: fields of the :class:`Request` that say what is kept.
        prompt: token ids, which select too, unless ``keeps`` names a selection.
        max_tokens: tokens to decode; an end of text does not stop it.
        draft_tokens: most tokens drafted for one check.
    """

    model: IFPModel
    keeps: dict[str, Any]
    prompt: list[int]
    max_tokens: int
    draft_tokens: int = MOST_DRAFTED

    def run(self, row: Check | str, bandwidth: float | None = None) -> Decoded:
        """Run a row from nothing in memory.

        Args:
            row: ``DENSE``, ``ALONE``, ``STREAMING``, or how to check.
            bandwidth: bytes per second of the disk; default: as fast as the system's
                cache gives them.
        """
        clear()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        if row in (DENSE, ALONE):
            model = self.model.dense() if row == DENSE else self.prepare("off").model
            mx.eval(model.parameters())
            tokens = self.max_tokens
            found = Decoded(tokens, decode(model, self.prompt, tokens))
        elif row == STREAMING:
            found = self._streamed(self._streaming(), bandwidth)
        else:
            rule = Rule(cast(Any, row), Decoding())
            found = self._checked(self.prepare(rule.check).whole, rule, bandwidth)
        found.peak_bytes = mx.get_peak_memory() - before
        return found

    def prepare(self, check: Check) -> Compact:
        """Return the compact model, and the whole one beside it if that is to check."""
        named = self.keeps.keys() & {"mask_file", "selection"}
        what = self.keeps if named else self.keeps | {"instruction": self.prompt}
        return self.model.prepare(decide(Request(**what, check=check), self.model))

    def _streaming(self) -> Whole:
        """Return the whole model beside the smallest compact one."""
        fewest = self.model.granularity
        about: dict[str, Any] = {"granularity": fewest, "target_size": fewest}
        about |= {"selector": "random", "allocation": "uniform"}
        selection = self.model.select(**about)
        return Whole(self.model.source, self.model.apart(selection))

    def _streamed(self, whole: Whole, bandwidth: float | None) -> Decoded:
        from mlx_lm.models.cache import make_prompt_cache

        cache, tokens = make_prompt_cache(whole.model), min(self.max_tokens, STREAMED)
        logits = whole(mx.array([self.prompt]), cache)
        begun = _throttled(whole, bandwidth)
        for _ in range(tokens):
            logits = whole(logits[:, -1].argmax(axis=-1, keepdims=True), cache)
        return Decoded(tokens, *_since(begun, whole, tokens))

    def _checked(
        self, whole: Whole | None, rule: Rule, bandwidth: float | None
    ) -> Decoded:
        if whole is None:
            raise ValueError(
                "All is kept, so that there is nothing to check; keep less."
            )
        run = CheckedRun(whole, self.prompt, rule, DraftLength(self.draft_tokens))
        for _ in run.prefill():
            pass
        begun, left = _throttled(whole, bandwidth), self.max_tokens
        while left:
            left -= len(run.check(left))
        checks = run.figures.checks
        return Decoded(self.max_tokens, *_since(begun, whole, checks))


def _throttled(whole: Whole, bandwidth: float | None) -> tuple[float, int]:
    """Read as from a disk from now on; return the time, and the bytes read so far."""
    if bandwidth is not None:
        whole.throttle = Disk(bandwidth)
    return time.perf_counter(), whole.bytes_read


def _since(
    begun: tuple[float, int], whole: Whole, checks: int
) -> tuple[float, int, int]:
    """Return seconds, checks and bytes read since."""
    start, read = begun
    return time.perf_counter() - start, checks, whole.bytes_read - read


@dataclass
class CheckedCase:
    """What was measured for one keep and one length of the prompt.

    Attributes:
        keep: kept share of the channels.
        prompt_tokens: of the prompt.
        runs: of each row and bandwidth (``None``: the system's cache), one a turn.
    """

    keep: float
    prompt_tokens: int
    runs: dict[tuple[str, float | None], list[Decoded]] = field(default_factory=dict)

    @property
    def rows(self) -> list[str]:
        """The names of the rows, in order."""
        return list(dict.fromkeys(row for row, _ in self.runs))

    def tokens_per_second(self, row: str, bandwidth: float | None) -> float | None:
        """Return the median; ``None`` where a row has no such runs."""
        runs = self.runs.get((row, bandwidth), [])
        return statistics.median(r.tokens / r.seconds for r in runs) if runs else None

    def tokens_per_check(self, row: str) -> float | None:
        """Return how many tokens a pass of the dense model brought."""
        run = self.runs[row, None][0]
        return run.tokens / run.checks if run.checks else None

    def bytes_per_token(self, row: str) -> float:
        """Return the bytes of channels that were read for a token."""
        run = self.runs[row, None][0]
        return run.bytes_read / run.tokens

    def report(self) -> dict[str, Any]:
        """Return everything as plain data; bandwidths in bytes per second."""
        rows: list[dict[str, Any]] = []
        for row in self.rows:
            found: dict[str, Any] = {"row": row}
            found["tokens_per_check"] = self.tokens_per_check(row)
            found["bytes_per_token"] = self.bytes_per_token(row)
            found["runs"] = [
                {"bandwidth": bandwidth} | asdict(run)
                for (name, bandwidth), runs in self.runs.items()
                for run in runs
                if name == row
            ]
            rows.append(found)
        return {"keep": self.keep, "prompt_tokens": self.prompt_tokens, "rows": rows}


def measure(
    contest: CheckedContest,
    checks: Sequence[Check],
    bandwidths: Sequence[float] = (),
    *,
    turns: int = 1,
    progress: Callable[[Iterable], Iterable] = iter,
) -> CheckedCase:
    """Let the rows take turns; a dense model that does not fit into memory is left out.

    Args:
        contest: what they have in common.
        checks: ways of checking, each a row.
        bandwidths: bytes per second of the disks to measure with, besides the cache.
        turns: how many.
        progress: wraps the iteration over turns.
    """
    fits = contest.model.footprint.dense_bytes < physical_memory()
    ways: list[tuple[Check | str, float | None]] = [(DENSE, None)] if fits else []
    ways += [(ALONE, None)]
    ways += [
        (row, bandwidth)
        for row in (STREAMING, *checks)
        for bandwidth in (None, *bandwidths)
    ]
    keep = contest.prepare("off").selection.share
    case = CheckedCase(keep, len(contest.prompt), {(_name(r), b): [] for r, b in ways})
    for turn in progress(range(turns)):
        for row, bandwidth in ways[
            :: -1 if turn % 2 else 1
        ]:  # so that none is always first
            case.runs[_name(row), bandwidth].append(contest.run(row, bandwidth))
    return case


def _name(row: Check | str) -> str:
    return row if row in (DENSE, ALONE, STREAMING) else f"check {row}"


def table(cases: Sequence[CheckedCase]) -> str:
    """Return the medians as a Markdown table."""
    bandwidths = list(dict.fromkeys(b for _, b in cases[0].runs if b is not None))
    head = ["keep", "prompt", "row", "tokens/check", "read MB/token", "of streaming"]
    head += ["tokens/s", *(f"at {b / 1e9:g} GB/s" for b in bandwidths), "peak MB"]
    rows = [_cells(case, row, bandwidths) for case in cases for row in case.rows]
    return markdown(head, rows)


def _cells(case: CheckedCase, row: str, bandwidths: Sequence[float]) -> list[str]:
    read, every = case.bytes_per_token(row), case.bytes_per_token(STREAMING)
    cells = [f"{case.keep:.3g}", str(case.prompt_tokens), row]
    cells += [_shown(case.tokens_per_check(row)), f"{read / 1e6:.1f}"]
    cells += [f"{read / every:.1%}"]
    speeds = [case.tokens_per_second(row, b) for b in (None, *bandwidths)]
    peak = max(run.peak_bytes for run in case.runs[row, None])
    return [*cells, *map(_shown, speeds), f"{peak / 1e6:.0f}"]


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
