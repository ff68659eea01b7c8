"""Requests of one mask decode in one batch; the masks take turns, step by step."""

import itertools
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..checking.loop import Checks
from ..decoding.stops import Stops
from ..selection.masks import Selection
from ..selection.request import Request
from .calling import Calling
from .errors import Cancelled
from .events import (
    CancelToken,
    Done,
    Event,
    FinishReason,
    Progress,
    Token,
    TokenLogprob,
)
from .forms import Use
from .prompts import Prompts
from .sampling import Sampling
from .spelling import bytes_of, spelled
from .worker import detached

Emit = Callable[[Event | BaseException], None]


class Ticket:
    """One request on its way through the engine; used by the worker alone.

    Attributes:
        emit: hands an event, or the error that ends the stream, to the caller.
        stop: the caller's cancel token.
        messages: the conversation or text, as the caller gave it.
        request: what it asks of a selection.
        calling: the tools that the answer may call.
        sampling: how to decode.
        use: what it needs in memory, once there is a selection.
        tokens: the prompt's ids, once tokenised.
        max_tokens: most tokens that ``sampling`` and the context allow.
        kv_bytes: of its KV cache at full length, and of what else only it needs.
        cached: tokens of the prompt that came from the prompt cache.
        seconds: the time spent so far.
        check: what checking took so far.
    """

    use: Use
    tokens: list[int]
    max_tokens: int
    kv_bytes: int

    def __init__(
        self,
        messages: Any,
        request: Request,
        sampling: Sampling,
        stop: CancelToken,
        emit: Emit,
        chat_template: bool = True,
        calling: Calling | None = None,
    ) -> None:
        self.messages, self.request, self.sampling = messages, request, sampling
        self.chat_template, self.calling = chat_template, calling
        self.stop, self.emit = stop, emit
        self.cached = self.number = 0
        self.seconds: dict[str, float] = {}
        self.arrived = self.ready = self.admitted = time.perf_counter()
        self.first: float | None = None
        self.check: Checks | None = None

    @property
    def tools(self) -> tuple[dict[str, Any], ...]:
        """The tools as the chat template shows them."""
        return self.calling.tools if self.calling else ()

    def start(self, text: "Text", cached: int) -> None:
        """Note that the request has its place in a batch."""
        self.text, self.cached = text, cached
        self.admitted = time.perf_counter()
        waited = self.admitted - self.ready - self.seconds.get("load", 0.0)
        self.seconds["wait"] = max(0.0, waited)
        self.emit(Progress("prefill", cached, len(self.tokens)))

    def prefilled(self, done: int) -> None:
        """Report prompt tokens processed; the last one starts decoding."""
        total = len(self.tokens)
        self.emit(Progress("prefill", min(self.cached + done, total), total))

    def token(self, response: Any) -> FinishReason | None:
        """Take one decoded token; return why the request is over, or ``None``."""
        now = time.perf_counter()
        if self.first is None:
            self.first = now
            self.seconds["prefill"] = now - self.admitted
            self.seconds["ttft"] = now - self.arrived
            self.emit(Progress("decode", 0, self.max_tokens))
        self.seconds["decode"] = now - self.first
        self.number += 1
        reason: FinishReason | None = response.finish_reason
        piece = "" if reason == "stop" else self.text.add(response.token)
        if reason is not None:
            piece += self.text.finish()
        logprobs = self._logprobs(response)
        self.emit(Token(piece, response.token, self.number, logprobs))
        return "stop" if self.text.stopped else reason

    def _logprobs(self, response: Any) -> tuple[TokenLogprob, ...]:
        if not self.sampling.logprobs:
            return ()
        logprobs = np.array(response.logprobs.astype(mx.float32))
        best = np.argsort(-logprobs, kind="stable")[: self.sampling.top_logprobs]
        return tuple(
            self.text.spell(int(token), float(logprobs[token]))
            for token in (response.token, *best)
        )

    def finish(self, reason: FinishReason) -> None:
        """End the stream with its figures."""
        decode = self.seconds.get("decode", 0.0)
        done = Done(
            finish_reason=reason,
            prompt_tokens=len(getattr(self, "tokens", ())),
            cached_tokens=self.cached,
            generation_tokens=self.number,
            seconds=self.seconds,
            tokens_per_second=(self.number - 1) / decode if decode else 0.0,
            check=None if self.check is None else asdict(self.check),
            **self._mask_figures(),
        )
        self.emit(done)

    def _mask_figures(self) -> dict[str, Any]:
        if not hasattr(self, "use"):
            return {}
        return mask_figures(self.use.selection, self.use.promise)


def mask_figures(selection: Selection, promise: float | None) -> dict[str, Any]:
    """Return which selection it is, how much it keeps, and how good it is.

    Args:
        selection: the one in use.
        promise: of the model's card.
    """
    sizes, origin = selection.sizes, selection.origin
    return {
        "mask_id": selection.mask_id,
        "identity": selection.identity,
        "kept_channels": sum(sizes),
        "total_channels": selection.channels * len(sizes),
        "unit": selection.unit,
        "agreement": origin.agreement,
        "promise": promise,
        "router_mass": origin.router_mass,
    }


class Text:
    """Turns tokens into text, held back where a stop string may have begun."""

    def __init__(self, tokenizer: Any, stops: tuple[str, ...] = ()) -> None:
        self._tokenizer, self._detokenizer = tokenizer, tokenizer.detokenizer
        self._stops = Stops(stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._stops.stopped

    def add(self, token: int) -> str:
        """Return the text that this token makes certain."""
        self._detokenizer.add_token(token)
        return self._stops.add(self._detokenizer.last_segment)

    def finish(self) -> str:
        """Return what is left at the end."""
        self._detokenizer.finalize()
        text = self._stops.add(self._detokenizer.last_segment)
        return text + self._stops.finish()

    def spell(self, token: int, logprob: float) -> TokenLogprob:
        """Return one token, with its log probability, as it is reported."""
        content = bytes_of(self._tokenizer, token)
        return TokenLogprob(token, spelled(content), logprob, content)


class Seats(ABC):
    """The requests that are served with one use of a selection.

    Args:
        use: what all of them need in memory.
        seats: how many there can be.

    Attributes:
        running: the requests, by number.
        draining: whether no more are let in.
    """

    def __init__(self, use: Use, seats: int) -> None:
        self.use, self._seats = use, seats
        self.running: dict[int, Ticket] = {}
        self.draining = False

    @property
    def full(self) -> bool:
        """Whether it takes no more requests now."""
        return self.draining or len(self.running) >= self._seats

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV caches if every answer comes to its full length."""
        return sum(ticket.kv_bytes for ticket in self.running.values())

    def fail(self, error: BaseException) -> None:
        """End every request with ``error``."""
        for ticket in self.running.values():
            ticket.emit(error)
        self.running.clear()

    @abstractmethod
    def admit(self, ticket: Ticket) -> None:
        """Give a request a seat, with what is cached of its prompt."""

    @abstractmethod
    def step(self) -> None:
        """Do one step: of all requests at once, or of the next in turn."""

    @abstractmethod
    def close(self) -> None:
        """Free what belongs to no request."""

    @property
    @abstractmethod
    def cache_bytes(self) -> int:
        """Bytes of the KV caches in use."""


class Lane(Seats):
    """The requests of one mask, decoded together by mlx-lm's ``BatchGenerator``.

    Args:
        model: the mask's compact model.
        use: the mask; its identity is the key of every KV cache that comes from it.
        tokenizer: mlx-lm's.
        prompts: KV caches.
        batch: most requests decoded together.
        prefill_step: prompt tokens between two chances to stop.
    """

    def __init__(
        self,
        model: nn.Module,
        use: Use,
        tokenizer: Any,
        prompts: Prompts,
        *,
        batch: int,
        prefill_step: int,
    ) -> None:
        from mlx_lm.generate import BatchGenerator

        super().__init__(use, batch)
        self._identity = use.selection.identity
        self._tokenizer, self._prompts = tokenizer, prompts
        self._generator = BatchGenerator(
            model,
            stop_tokens=[[token] for token in tokenizer.eos_token_ids],
            completion_batch_size=batch,
            prefill_batch_size=min(batch, 8),
            prefill_step_size=prefill_step,
        )

    def admit(self, ticket: Ticket) -> None:
        """See :meth:`Seats.admit`."""
        cache, cached = self._prompts.find(self._identity, ticket.tokens)
        [uid] = self._generator.insert(
            [ticket.tokens[cached:]],
            [ticket.max_tokens],
            caches=None if cache is None else [cache],
            all_tokens=[ticket.tokens[:cached]],
            samplers=[sampler_of(ticket.sampling)],
            logits_processors=[ticket.sampling.all_processors],
        )
        self.running[uid] = ticket
        text = Text(self._tokenizer, ticket.sampling.stop_strings)
        ticket.start(text, cached)

    def step(self) -> None:
        """Prefill one step of the new prompts, decode one token of the others."""
        stopped = [uid for uid, r in self.running.items() if r.stop.cancelled]
        for uid in stopped:
            self._end(uid, "cancelled")
        if not self.running:
            return
        prompts, tokens = self._generator.next()
        for response in prompts:
            self.running[response.uid].prefilled(response.progress[0])
        for response in tokens:
            ticket = self.running[response.uid]
            reason = ticket.token(response)
            if response.finish_reason is not None:
                self._prompts.keep(
                    self._identity, response.all_tokens, response.prompt_cache
                )
                del self.running[response.uid]
                ticket.finish(reason or response.finish_reason)
            elif reason is not None:
                self._end(response.uid, reason)

    def close(self) -> None:
        """Let the batch go."""
        self._generator.close()
        del self._generator

    @property
    def cache_bytes(self) -> int:
        """See :attr:`Seats.cache_bytes`."""
        return int(self._generator.prompt_cache_nbytes)

    def _end(self, uid: int, reason: FinishReason) -> None:
        ticket = self.running.pop(uid)
        decoding = ticket.number > 0
        kept = self._generator.remove([uid], return_prompt_caches=decoding)
        if decoding:
            cache, tokens = kept[uid]
            self._prompts.keep(self._identity, tokens, cache)
        ticket.finish(reason)


def seed_of(sampling: Sampling) -> int:
    """Return the seed of one request's draws, a random one if it names none."""
    return secrets.randbits(32) if sampling.seed is None else sampling.seed


def sampler_of(sampling: Sampling) -> Any:
    """Return the sampler of one request; its seed does not depend on the batch."""
    sampler = sampling.sampler()
    if sampling.greedy:
        return sampler
    seed, numbers = seed_of(sampling), itertools.count()

    def seeded(logprobs: mx.array) -> mx.array:
        # MLX's random state is shared by the whole batch: each draw sets its own.
        mx.random.seed((seed * 1_000_003 + next(numbers)) % 2**63)
        return sampler(logprobs)

    return seeded


class Schedule:
    """Who decodes when: each mask has a lane, and another for its checked requests; the
    lanes take turns, one step each.

    A new lane opens while its model fits into the budget beside those of the other
    lanes. When it does not, the oldest lane takes no new requests until it ends and
    makes room: no mask starves, and no model is loaded twice for the same waiting
    requests.

    Args:
        open_lane: makes the lane of a request, loading its model if need be.
        weigh: bytes of the compact models of several uses together.
        budget: bytes of the models of all lanes together.
        limit: bytes of models and KV caches together, or ``None``.
    """

    def __init__(
        self,
        open_lane: Callable[[Ticket], Seats],
        weigh: Callable[..., int],
        budget: int,
        limit: int | None = None,
    ) -> None:
        self._open, self._weigh = open_lane, weigh
        self._budget, self._limit = budget, limit
        self.waiting: list[Ticket] = []
        self.lanes: dict[tuple[str, bool], Seats] = {}

    def uses(self) -> list[Use]:
        """Return the uses of all open lanes."""
        return [lane.use for lane in self.lanes.values()]

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.waiting or self.lanes)

    def add(self, ticket: Ticket) -> None:
        """Queue a request that has its selection and tokens."""
        ticket.ready = time.perf_counter()
        self.waiting.append(ticket)

    def turn(self) -> None:
        """Admit what fits, then one step of every lane."""
        self._admit()
        for key, lane in list(self.lanes.items()):
            try:
                lane.step()
            except Exception as error:  # fails one batch; the others go on
                lane.fail(detached(error))
            if not lane.running:
                self.lanes.pop(key).close()

    def cancel(self) -> None:
        """End everything as cancelled."""
        for lane in self.lanes.values():
            for ticket in lane.running.values():
                ticket.stop.cancel()
        for ticket in self.waiting:
            ticket.stop.cancel()
        while self.busy:
            self.turn()

    def fail(self, error: BaseException) -> None:
        """End everything with ``error``."""
        for lane in self.lanes.values():
            lane.fail(error)
            lane.close()
        for ticket in self.waiting:
            ticket.emit(error)
        self.waiting, self.lanes = [], {}

    def _admit(self) -> None:
        crowded: dict[tuple[str, bool], None] = {}
        still_waiting = []
        held = False  # a request waits for memory: then no other may overtake it
        for ticket in self.waiting:
            key = ticket.use.key
            if ticket.stop.cancelled:
                ticket.finish("cancelled")
            elif key in self.lanes:
                lane = self.lanes[key]
                held = held or not self._fits(ticket)
                if held or lane.full:
                    still_waiting.append(ticket)
                else:
                    lane.admit(ticket)
            elif not (held or crowded) and self._fits(ticket, opening=True):
                self._open_for(ticket)
            else:
                crowded[key] = None
                still_waiting.append(ticket)
        self.waiting = still_waiting
        for lane in list(self.lanes.values())[: len(crowded)]:
            lane.draining = True

    def _fits(self, ticket: Ticket, *, opening: bool = False) -> bool:
        """Whether there is room for a request; alone, there always is."""
        opened = [ticket.use] if opening else []
        models = self._weigh(*self.uses(), *opened)
        caches = ticket.kv_bytes + sum(lane.kv_bytes for lane in self.lanes.values())
        fits = self._limit is None or models + caches <= self._limit
        return not self.lanes or (fits and not (opening and models > self._budget))

    def _open_for(self, ticket: Ticket) -> None:
        try:
            lane = self._open(ticket)
        except Cancelled:
            ticket.finish("cancelled")
        except Exception as error:  # of this request; the others go on
            ticket.emit(detached(error))
        else:
            self.lanes[lane.use.key] = lane
            lane.admit(ticket)
