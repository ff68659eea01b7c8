"""Requests whose answers the whole model checks, one check after another."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import mlx.core as mx

from ..checking.loop import Checked, CheckedRun, DraftLength
from ..checking.rule import Rule
from ..checking.whole import Whole
from ..slicing.sliced import twin
from .errors import CheckFailed, InvalidRequest
from .events import FinishReason
from .forms import Use
from .lanes import Seats, Text, Ticket, seed_of
from .prompts import WHOLE_MODEL, Prompts

BROKEN = (
    OSError,
    ValueError,
    RuntimeError,
)  # what reading fails with: MLX's is the last


class Said(NamedTuple):
    """A token that stands, as a batch would say it; see :meth:`Ticket.token`."""

    token: int
    logprobs: mx.array
    finish_reason: FinishReason | None


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


class CheckedLane(Seats):
    """The requests of one mask whose answers the whole model checks.

    They take turns, so that other lanes can take theirs between two checks. Their KV
    caches are the dense model's, so that any mask's will do for any other.

    Args:
        whole: the whole model, and the compact one of the mask.
        use: the mask.
        tokenizer: mlx-lm's.
        prompts: KV caches.
        tally: gets what checking takes.
        batch: requests at a time.
        prefill_step: prompt tokens between two chances to stop.
    """

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
        super().__init__(use, batch)
        self._whole, self._tokenizer, self._prompts = whole, tokenizer, prompts
        self._tally, self._prefill_step = tally, prefill_step
        self._runs: dict[int, tuple[CheckedRun, Iterator[int]]] = {}
        self._numbers = itertools.count()

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
        number = next(self._numbers)
        ticket.check = run.figures
        self.running[number] = ticket
        self._runs[number] = run, run.prefill(self._prefill_step)
        ticket.start(Text(self._tokenizer, ticket.sampling.stop_strings), cached)

    def _run(self, ticket: Ticket, cache: list[Any] | None, known: int) -> CheckedRun:
        request, sampling, whole = ticket.request, ticket.sampling, self._whole
        assert request.check != "off"
        decoding = replace(sampling, seed=seed_of(sampling) % 2**64)
        follow = request.reselect == "drift"
        if follow:  # which changes the compact model: not that of the others
            whole = Whole(whole.source, twin(whole.model))
        rule, length = Rule(request.check, decoding), DraftLength(request.draft_tokens)
        return CheckedRun(whole, ticket.tokens, rule, length, cache, known, follow)

    def step(self) -> None:
        """Take the one that waited longest a prefill step or a check further."""
        for number in [n for n, one in self.running.items() if one.stop.cancelled]:
            self._end(number, "cancelled")
        if not self.running:
            return
        number = next(iter(self.running))
        ticket = self.running[number] = self.running.pop(number)  # now the last
        try:
            said = self._advance(number)
        except BROKEN as error:
            del self.running[number], self._runs[number]
            ticket.emit(_failed(error))
        else:
            self._say(number, said)

    def _advance(self, number: int) -> list[Checked]:
        """Take one request a bit further, and return the tokens that stand."""
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

    def _say(self, number: int, said: list[Checked]) -> None:
        """Hand tokens on, as far as the request wants them."""
        ticket, ends = self.running[number], self._tokenizer.eos_token_ids
        if said and not ticket.number:  # of the prompt, a check reads the last token
            ticket.prefilled(len(ticket.tokens) - ticket.cached)
        for one in said:
            last = ticket.number + 1 == ticket.max_tokens
            reason: FinishReason | None = "length" if last else None
            reason = "stop" if one.token in ends else reason
            reason = ticket.token(Said(one.token, one.logprobs, reason))
            if reason is None and ticket.stop.cancelled:
                reason = "cancelled"
            if reason is not None:
                return self._end(number, reason)

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
