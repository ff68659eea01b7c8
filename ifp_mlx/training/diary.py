"""The log of a run, which a resumed run continues."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from ..files.atomic import new_file, writing
from .batches import Batch
from .validation import Report

LOG = "log.jsonl"


class Pace:
    """How fast steps are made: a context around each step, which counts its batches."""

    def __init__(self) -> None:
        self._began = 0.0
        self._clear()

    def _clear(self) -> None:
        self.steps, self.tokens, self.seconds = 0, 0, 0.0

    def of(self, batch: Batch) -> Batch:
        """Count a batch, and return it."""
        self.tokens += batch.tokens.size
        return batch

    def __enter__(self) -> None:
        """Begin a step."""
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        """End it."""
        self.seconds += time.perf_counter() - self._began
        self.steps += 1

    def take(self) -> Report:
        """Return seconds per step and tokens per second, padding included, since the
        last call.
        """
        found = {
            "seconds_per_step": self.seconds / max(self.steps, 1),
            "tokens_per_second": self.tokens / max(self.seconds, 1e-9),
        }
        self._clear()
        return found


class Diary:
    """The log of a run: in memory, in a file, and for whoever listens.

    Args:
        folder: where the file is kept, or ``None``.
        start: the step that the run goes on from; later lines are forgotten.
        listen: called with every line.
    """

    def __init__(
        self, folder: Path | None, start: int, listen: Callable[[Report], None] | None
    ) -> None:
        self.lines: list[Report] = []
        self.path = None if folder is None else folder / LOG
        self.listen = listen
        if self.path is not None:
            if self.path.exists() and start:
                # A killed run may have logged steps that are now made again.
                text = self.path.read_text(encoding="utf-8").splitlines()
                lines = [json.loads(line) for line in text if line.endswith("}")]
                self.lines = [line for line in lines if line["step"] <= start]
            with new_file(self.path) as scratch:
                text = [json.dumps(line) + "\n" for line in self.lines]
                scratch.write_text("".join(text), encoding="utf-8")

    def note(self, step: int, report: Report) -> None:
        """Write down what is known after a step."""
        line = {"step": step, **report}
        self.lines.append(line)
        if self.path is not None:
            with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        if self.listen is not None:
            self.listen(line)
