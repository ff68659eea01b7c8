"""The engine's worker side: the model, its prepared tasks, and the requests served."""

import io
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from ..decoding.kv import PLAIN, KVOptions
from ..files.amounts import physical_memory
from ..model.checkpoint import load
from ..selection.prompts import (
    Prompt,
    as_messages,
    ids_of,
    instruction_of,
    known_tokens,
    tokenize,
)
from ..slicing.stock import context_of
from ..storage.folder import resolve
from .calling import grammar_of
from .checked import CheckedLane, Tally
from .dialect import TALKING, Dialect, dialect_of
from .errors import (
    Busy,
    Cancelled,
    ContextTooLong,
    IFPError,
    IncompatibleModel,
    InvalidRequest,
    ModelNotFound,
)
from .events import Progress
from .grammar import Grammar
from .lanes import Lane, Schedule, Seats, Ticket
from .prompts import WHOLE_MODEL, Prompts
from .residents import Shelf, clear_memory
from .sampling import DEFAULT_MAX_TOKENS, Sampling
from .turns import SoloLane
from .worker import detached

QUICK = 0.02  # seconds that taking in the requests of one turn may take


@dataclass(frozen=True)
class Settings:
    """What an engine is opened with; see ``Engine.open``."""

    path: str
    memory_limit: int | None
    cache_bytes: int | None
    prompt_cache_bytes: int
    context_length: int | None
    batch: int
    prefill_step: int
    adapter_path: str | None = None
    kv: KVOptions = PLAIN


class Host:
    """Lives on the worker thread and owns every array of an engine.

    Args:
        settings: what the engine was opened with.
        progress: told about ``download`` and ``load``, on this thread.
    """

    def __init__(
        self, settings: Settings, progress: Callable[[Progress], None]
    ) -> None:
        from mlx_lm.utils import maybe_set_recommended_wired_limit

        self.settings = settings
        with typed_errors(IncompatibleModel):
            folder = resolve(settings.path, download_bars(progress))
            progress(Progress("load", 0, 1))
            self.model, self.tokenizer = load(folder, settings.adapter_path)
            if str(folder) != str(settings.path):
                self.model.name = settings.path
        with typed_errors(InvalidRequest):
            settings.kv.check_fits(self.model.source.skeleton)
        limit = settings.memory_limit
        budget = settings.cache_bytes
        if budget is None:
            budget = limit or half_the_memory()
        self.shelf = Shelf(self.model, budget, limit, settings.kv)
        self.prompts, self.tally = Prompts(settings.prompt_cache_bytes), Tally()
        self.schedule = Schedule(self._open_lane, self.shelf.weigh, budget, limit)
        self.shelf.in_use = self.schedule.uses
        self.shelf.read = partial(self.prompts.keep, WHOLE_MODEL)
        self.arrivals: deque[Ticket] = deque()
        # As mlx-lm does while it generates; each batch restores what it found.
        self._old_wired_limit = maybe_set_recommended_wired_limit()
        self._old_memory_limit = None if limit is None else mx.set_memory_limit(limit)
        progress(Progress("load", 1, 1))

    @property
    def context_length(self) -> int:
        """Tokens that prompt and answer may have together."""
        own = context_of(self.model.config) or 1 << 20
        return min(own, self.settings.context_length or own)

    @property
    def busy(self) -> bool:
        """Whether anyone is being served."""
        return bool(self.arrivals or self.schedule.busy)

    @property
    def queued(self) -> int:
        """Requests that wait for a place."""
        return len(self.arrivals) + len(self.schedule.waiting)

    def add(self, ticket: Ticket, max_queue: int) -> None:
        """Queue a request.

        Raises:
            Busy: if ``max_queue`` wait already.
        """
        if self.queued >= max_queue:
            raise Busy(f"{self.queued} requests are waiting; try again a little later.")
        self.arrivals.append(ticket)

    def turn(self) -> None:
        """Take in arrivals until ``QUICK`` seconds are over, then step each lane."""
        start = time.perf_counter()
        while self.arrivals and time.perf_counter() - start < QUICK:
            self._take_in(self.arrivals.popleft())
        self.schedule.turn()

    def fail(self, error: BaseException) -> None:
        """End every request with ``error``, and put the limits back."""
        for ticket in self.arrivals:
            ticket.emit(error)
        self.arrivals.clear()
        self.schedule.fail(error)
        if self._old_wired_limit is not None:
            mx.set_wired_limit(self._old_wired_limit)
        if self._old_memory_limit is not None:
            mx.set_memory_limit(self._old_memory_limit)

    def memory(self) -> dict[str, int]:
        """Report bytes; see ``Engine.memory``."""
        lanes = self.schedule.lanes.values()
        return {
            "active": mx.get_active_memory(),
            "peak": mx.get_peak_memory(),
            "freed_but_cached": mx.get_cache_memory(),
            "compact_models": self.shelf.residents.nbytes,
            "prompt_cache": self.prompts.nbytes,
            "kv_in_use": sum(lane.cache_bytes for lane in lanes),
        }

    def unload(self) -> None:
        """Cancel what runs, and give all weights and caches back."""
        for ticket in self.arrivals:
            ticket.stop.cancel()
        while self.arrivals:
            self._take_in(self.arrivals.popleft())
        self.schedule.cancel()
        self.prompts.clear()
        self.shelf.unload()
        clear_memory()

    def tokens_of(self, ticket: Ticket) -> list[int]:
        """Return the ids of a request's prompt."""
        tokens = ids_of(ticket.messages)
        if tokens is None:
            messages = as_messages(ticket.messages)
            how: Any = {"chat_template": ticket.chat_template, "open_end": True}
            how["config"] = ticket.request.chat_template_config
            tokens = tokenize(self.tokenizer, messages, tools=ticket.tools, **how)
        return known_tokens(tokens, self.vocabulary)

    def _take_in(self, ticket: Ticket) -> None:
        """Give a request its tokens and its selection, and let it wait for a lane."""
        if ticket.stop.cancelled:
            return ticket.finish("cancelled")
        try:
            with typed_errors(InvalidRequest):
                self._check_length(ticket)
                if ticket.request.checks:
                    self.settings.kv.check_unchecked(ticket.request.check)
                start = time.perf_counter()
                ticket.use = self.shelf.select(
                    ticket.request, self._selecting(ticket), ticket.emit, ticket.stop
                )
                ticket.seconds["select"] = time.perf_counter() - start
                ticket.kv_bytes = self.shelf.check_limit(
                    ticket.use,
                    len(ticket.tokens) + ticket.max_tokens,
                    moving=ticket.request.reselect == "drift",
                )
                ticket.sampling = self._sampling(ticket)
        except Cancelled:
            ticket.finish("cancelled")
        except Exception as error:  # fails this request; the others go on
            ticket.emit(detached(error))
        else:
            self.schedule.add(ticket)

    def _selecting(self, ticket: Ticket) -> Prompt:
        """Return what selects by default, tokenised like the prompt: including the
        tools, which a chat template shows before the first user message.
        """
        plain = ticket.chat_template and not ticket.tools
        if plain or ids_of(ticket.messages) is not None:
            return ticket.messages
        messages = instruction_of(as_messages(ticket.messages))
        how: Any = {"chat_template": ticket.chat_template, "tools": ticket.tools}
        how["config"] = ticket.request.chat_template_config
        return tokenize(self.tokenizer, messages, **how)

    def _check_length(self, ticket: Ticket) -> None:
        ticket.tokens = self.tokens_of(ticket)
        asked, room = ticket.sampling.max_tokens, self.context_length
        length = len(ticket.tokens)
        ticket.max_tokens = asked or min(DEFAULT_MAX_TOKENS, room - length)
        if length + max(ticket.max_tokens, 1) > room:
            raise ContextTooLong(
                f"The prompt has {length} tokens and the answer {asked or 'at least 1'}, "
                f"more than the context of {room}; shorten one."
            )

    def _sampling(self, ticket: Ticket) -> Sampling:
        """Return how a request decodes with this model, a grammar included."""
        sampling = ticket.sampling.fitted(self.tokenizer, self.vocabulary)
        if (held := self._held(ticket)) is None:
            return sampling
        if ticket.use.checked:
            raise InvalidRequest(
                f"check={ticket.request.check} takes tokens back, and a JSON schema or a "
                "call that must come is followed token by token, never back; leave one "
                "of them out."
            )
        return replace(sampling, processors=[held])

    def _held(self, ticket: Ticket) -> Any:
        """Return the logits processor that holds an answer to JSON or to calls."""
        schema, calling = ticket.sampling.json_schema, ticket.calling
        if schema is None and (calling is None or calling.free):
            return None
        dialect, state = self.dialect, TALKING
        if ticket.chat_template and ids_of(ticket.messages) is None:
            config = ticket.request.chat_template_config
            state = dialect.opening(as_messages(ticket.messages), config)
        else:
            dialect = Dialect()
        grammar = grammar_of(dialect, state, schema, calling, self.grammar.spell)
        return self.grammar.processor(grammar)

    @cached_property
    def dialect(self) -> Dialect:
        """How the model writes thoughts and calls."""
        return dialect_of(self.tokenizer)

    @cached_property
    def grammar(self) -> Grammar:
        """What makes answers follow a grammar; made when first asked for."""
        return Grammar(self.tokenizer, self.vocabulary)

    @property
    def vocabulary(self) -> int:
        """How many tokens the model knows."""
        return self.model.vocabulary

    def _open_lane(self, ticket: Ticket) -> Seats:
        start = time.perf_counter()
        with typed_errors(InvalidRequest):
            held = self.shelf.load(ticket.use, ticket.emit, ticket.stop)
        ticket.seconds["load"] = time.perf_counter() - start
        settings, about = self.settings, (ticket.use, self.tokenizer, self.prompts)
        how: Any = {"batch": settings.batch, "prefill_step": settings.prefill_step}
        if held.whole is None:
            if settings.kv.asked:
                return SoloLane(held.model, *about, settings.kv, **how)
            return Lane(held.model, *about, **how)
        return CheckedLane(held.whole, *about, self.tally, **how)


@contextmanager
def typed_errors(of_a_value: type[IFPError]) -> Iterator[None]:
    """Turn the package's builtin errors into the engine's; the sentence stays.

    Args:
        of_a_value: what a ``ValueError`` becomes.
    """
    try:
        yield
    except IFPError:
        raise
    except OSError as error:
        raise ModelNotFound(str(error)) from None
    except ValueError as error:
        raise of_a_value(str(error)) from None


def download_bars(report: Callable[[Progress], None]) -> type:
    """Return a tqdm class for the hub client that reports bytes and shows nothing."""
    furthest = 0

    class Bars(tqdm):
        monitor_interval = 0  # no thread of tqdm's own

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"file": io.StringIO()})

        def display(self, *args: Any, **kwargs: Any) -> None:
            """Show nothing."""

        def update(self, n: float | None = 1) -> bool | None:
            """Report how far the bytes are; the client also counts files."""
            nonlocal furthest
            shown = super().update(n)
            if self.unit == "B" and self.n > furthest:
                furthest = int(self.n)
                report(Progress("download", furthest, int(self.total or 0)))
            return shown

    return Bars


def half_the_memory() -> int:
    """Return half of the machine's memory, in bytes."""
    return physical_memory() // 2
