"""Requests of one mask that decode one by one, in turns."""

import itertools
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..decoding.kv import KVOptions
from .events import FinishReason
from .forms import Use
from .lanes import Seats, Text, Ticket, sampler_of
from .prompts import Prompts


class Said(NamedTuple):
    """A token of an answer, in a batch's form; see :meth:`Ticket.token`."""

    token: int
    logprobs: mx.array
    finish_reason: FinishReason | None = None


class Turns(Seats):
    """The requests of one mask that take turns, so that other lanes can take theirs too.

    Args:
        use: the mask.
        tokenizer: mlx-lm's.
        batch: requests at a time.
    """

    breaks: tuple[
        type[Exception], ...
    ] = ()  # they end only the request that raised them

    def __init__(self, use: Use, tokenizer: Any, batch: int) -> None:
        super().__init__(use, batch)
        self._tokenizer = tokenizer
        self._numbers = itertools.count()

    def _seat(self, ticket: Ticket, cached: int) -> int:
        """Give a request a seat, and return its number."""
        number = next(self._numbers)
        self.running[number] = ticket
        ticket.start(Text(self._tokenizer, ticket.sampling.stop_strings), cached)
        return number

    def step(self) -> None:
        """Advance the request that waited longest."""
        for number in [n for n, one in self.running.items() if one.stop.cancelled]:
            self._end(number, "cancelled")
        if not self.running:
            return
        number = next(iter(self.running))
        ticket = self.running[number] = self.running.pop(number)  # now the last
        try:
            said = self._advance(number)
        except self.breaks as error:
            del self.running[number]
            self._forget(number)
            ticket.emit(self._failed(error))
        else:
            self._say(number, said)

    def _say(self, number: int, said: Sequence[Any]) -> None:
        """Hand tokens on, as far as the request wants them."""
        ticket, ends = self.running[number], self._tokenizer.eos_token_ids
        if said and not ticket.number:  # the prompt's last token was read with them
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

    @abstractmethod
    def _advance(self, number: int) -> Sequence[Any]:
        """Advance one request, and return the tokens that it gave."""

    @abstractmethod
    def _end(self, number: int, reason: FinishReason) -> None:
        """End one request, and keep its KV cache."""

    def _forget(self, number: int) -> None:
        """Free what belongs to one request."""

    def _failed(self, error: Exception) -> Exception:
        """Return the error that a request gets when this one ended it."""
        return error


class SoloLane(Turns):
    """The requests of one mask whose kind of KV cache no batch supports.

    Args:
        model: the mask's compact model.
        use, tokenizer, batch: see :class:`Turns`.
        prompts: KV caches.
        kv: how they are kept.
        prefill_step: prompt tokens between two chances to stop.
    """

    def __init__(
        self,
        model: nn.Module,
        use: Use,
        tokenizer: Any,
        prompts: Prompts,
        kv: KVOptions,
        *,
        batch: int,
        prefill_step: int,
    ) -> None:
        super().__init__(use, tokenizer, batch)
        self._model, self._prompts, self._kv = model, prompts, kv
        self._prefill_step = prefill_step
        self._runs: dict[int, tuple[list[Any], list[int], Iterator[Said | None]]] = {}

    def admit(self, ticket: Ticket) -> None:
        """See :meth:`Seats.admit`."""
        cache, cached = self._prompts.find(self.use.selection.identity, ticket.tokens)
        if cache is None:
            cache = self._kv.cache_of(self._model)
        number = self._seat(ticket, cached)
        self._runs[number] = cache, [], self._steps(ticket, cache, cached)

    def _steps(
        self, ticket: Ticket, cache: list[Any], known: int
    ) -> Iterator[Said | None]:
        """Read a prompt in steps, and yield ``None`` after each; then token by token."""
        from mlx_lm.generate import generate_step

        tokens, kv = ticket.tokens, self._kv.for_mlx_lm()
        while known < len(tokens) - 1:
            part = tokens[known : min(known + self._prefill_step, len(tokens) - 1)]
            self._kv.read(self._model, part, cache)
            known += len(part)
            ticket.prefilled(known - ticket.cached)
            yield None
        unseeded = replace(ticket.sampling, seed=None)  # the sampler seeds each draw
        how = unseeded.for_mlx_lm(tokens[:known]) | kv
        how |= {"sampler": sampler_of(ticket.sampling), "prompt_cache": cache}
        left = mx.array(tokens[known:])
        how["max_tokens"] = ticket.max_tokens
        for token, logprobs in generate_step(left, self._model, **how):
            yield Said(token, logprobs)

    def _advance(self, number: int) -> Sequence[Said]:
        _, said, steps = self._runs[number]
        if (one := next(steps)) is None:
            return []
        said.append(one.token)  # its key and value are in the cache already
        return [one]

    def close(self) -> None:
        """See :meth:`Seats.close`."""
        del self._model

    @property
    def cache_bytes(self) -> int:
        """See :attr:`Seats.cache_bytes`."""
        layers = [layer for cache, _, _ in self._runs.values() for layer in cache]
        return sum(layer.nbytes for layer in layers if not layer.empty())

    def _end(self, number: int, reason: FinishReason) -> None:
        ticket, (cache, said, _) = self.running.pop(number), self._runs.pop(number)
        if ticket.number:
            tokens = [*ticket.tokens, *said]
            self._prompts.keep(self.use.selection.identity, tokens, cache)
        ticket.finish(reason)
