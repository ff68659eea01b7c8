"""Requests whose answers the whole model checks, one check after another."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..checking.loop import Checked, CheckedRun, DraftLength
from ..checking.rule import Rule
from ..checking.whole import Whole
from ..slicing.sliced import twin
from .errors import CheckFailed, InvalidRequest
from .events import FinishReason
from .forms import Use
from .lanes import Ticket, seed_of
from .prompts import WHOLE_MODEL, Prompts
from .turns import Turns

BROKEN: tuple[type[Exception], ...] = (
    OSError,
    ValueError,
    RuntimeError,
)  # errors of reading; the last is MLX's


@dataclass
class Tally:
    """What checking took since the engine was opened; any thread may read it."""

    checks: int = 0
    drafted: int = 0
    accepted: int = 0
    bytes_read: int = 0

    def report(self) -> dict[str, Any]:
        """Return the sums, and the share of drafted tokens that stood."""
        share = self.accepted / self.drafted if self.drafted else None
        return vars(self) | {"acceptance": share}


class CheckedLane(Turns):
    """The requests of one mask whose answers the whole model checks.

    They take turns, a prefill step or a check at a time. Their KV caches are the dense
    model's, so a cache serves every mask.

    Args:
        whole: the whole model, and the compact one of the mask.
        use: the mask.
        tokenizer: mlx-lm's.
        prompts: KV caches.
        tally: counts what checking costs.
        batch: requests at a time.
        prefill_step: prompt tokens between two chances to stop.
    """

    breaks = BROKEN

    def __init__(
        self,
        whole: Whole,
        use: Use,
        tokenizer: Any,
        prompts: Prompts,
        tally: Tally,
        *,
        batch: int,
        prefill_step: int,
    ) -> None:
        super().__init__(use, tokenizer, batch)
        self._whole, self._prompts = whole, prompts
        self._tally, self._prefill_step = tally, prefill_step
        self._runs: dict[int, tuple[CheckedRun, Iterator[int]]] = {}

    def admit(self, ticket: Ticket) -> None:
        """See :meth:`Seats.admit`; a request that cannot be checked ends here."""
        cache, cached = self._prompts.find(WHOLE_MODEL, ticket.tokens)
        try:
            run = self._run(ticket, cache, cached)
        except BROKEN as error:
            refused = isinstance(error, ValueError)
            return ticket.emit(
                InvalidRequest(str(error)) if refused else _failed(error)
            )
        ticket.check = run.figures
        number = self._seat(ticket, cached)
        self._runs[number] = run, run.prefill(self._prefill_step)

    def _run(self, ticket: Ticket, cache: list[Any] | None, known: int) -> CheckedRun:
        request, sampling, whole = ticket.request, ticket.sampling, self._whole
        assert request.check != "off"
        decoding = replace(sampling, seed=seed_of(sampling) % 2**64)
        follow = request.reselect == "drift"
        if follow:  # it changes the compact model, so it gets one of its own
            whole = Whole(whole.source, twin(whole.model))
        rule, length = Rule(request.check, decoding), DraftLength(request.draft_tokens)
        return CheckedRun(whole, ticket.tokens, rule, length, cache, known, follow)

    def _advance(self, number: int) -> list[Checked]:
        """Advance one request, and return the tokens that stand."""
        ticket, (run, reading) = self.running[number], self._runs[number]
        before, figures = dict(vars(run.figures)), run.figures
        try:
            if next(reading, None) is not None:
                ticket.prefilled(run.known - ticket.cached)
                return []
            left = ticket.max_tokens - ticket.number
            return run.check(left, self._tokenizer.eos_token_ids)
        finally:
            for name, sum_ in vars(self._tally).items():
                more = getattr(figures, name) - before[name]
                setattr(self._tally, name, sum_ + more)

    def _forget(self, number: int) -> None:
        del self._runs[number]

    def _failed(self, error: Exception) -> CheckFailed:
        return _failed(error)

    def close(self) -> None:
        """See :meth:`Seats.close`."""
        del self._whole

    @property
    def cache_bytes(self) -> int:
        """See :attr:`Seats.cache_bytes`."""
        caches = [run.cache for run, _ in self._runs.values()]
        return sum(layer.nbytes for cache in caches for layer in cache)

    def _end(self, number: int, reason: FinishReason) -> None:
        ticket, (run, _) = self.running.pop(number), self._runs.pop(number)
        if ticket.number:
            self._prompts.keep(WHOLE_MODEL, run.tokens[: run.known], run.cache)
        ticket.finish(reason)


def _failed(error: Exception) -> CheckFailed:
    return CheckFailed(f"The whole model could not check this answer: {error}")
