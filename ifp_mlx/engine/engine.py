"""A model for apps: one thread owns MLX, callers on any thread get plain events."""

import asyncio
import os
import queue
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Any, Literal

import numpy as np

from ..decoding.kv import KVOptions
from ..selection.prompts import Prompt, ids_of
from ..selection.request import RESELECTS, Keep, Request
from .calling import Calling
from .chat import Chat, text_of
from .checked import Tally
from .dialect import Dialect
from .errors import (
    EngineClosed,
    InvalidRequest,
)
from .events import CancelToken, Done, Event, Progress, Task, Token
from .host import Host, Settings, typed_errors
from .lanes import Ticket
from .sampling import Sampling
from .worker import Worker

# The fields of a Request that apply here: memory is the engine's own, and the compact
# model reads the prompt unless the answer is checked.
CHOOSING = (
    "task",
    "mask_file",
    "instruction",
    "keep",
    "target_size",
    "selector",
    "allocation",
    "granularity",
    "compensate",
    "min_agreement",
    "seed",
    "check",
    "draft_tokens",
    "reselect",
    "chat_template_config",
)

OnProgress = Callable[[Progress], None]


class Engine:
    """A large model on disk, served from one worker thread; make one with `open`.

    Every method may be called from any thread, and the async ones from any event loop.
    What they hand out is plain Python data. Their errors are this module's `IFPError`
    and its subclasses.

    Requests with one mask decode in one batch; several masks take turns, step by step.
    KV caches are kept for the next turn of a conversation, each for the mask that made
    it and no other. A request with ``check`` is answered by the whole model, exactly or
    within a tolerance: the compact one drafts, and dropped channels are read anew for
    each check. Its KV cache is the whole model's and serves any mask.

    Attributes:
        name: the hub id it was opened by, else the folder's name.
        layers: ``L``.
        unit: what is kept or dropped, ``channel`` or ``expert``.
        channels: ``F``, how many of them a layer has.
        context_length: tokens that prompt and answer may have together.
        keep: share of the units that is kept by default, or ``auto``.
        dialect: how the model writes thoughts and calls of tools.
    """

    def __init__(self, worker: Worker, about: dict[str, Any]) -> None:
        self._worker = worker
        self._close = weakref.finalize(self, worker.stop)
        self.name: str = about["name"]
        self.layers: int = about["layers"]
        self.unit: str = about["unit"]
        self.channels: int = about["channels"]
        self.context_length: int = about["context_length"]
        self.keep: Keep = about["keep"]
        self.dialect: Dialect = about["dialect"]
        self._tally: Tally = about["tally"]
        self._max_queue: int = about["max_queue"]

    @staticmethod
    def open(
        path: str | os.PathLike[str],
        *,
        adapter_path: str | os.PathLike[str] | None = None,
        memory_limit: int | None = None,
        cache_bytes: int | None = None,
        prompt_cache_bytes: int = 256 << 20,
        context_length: int | None = None,
        max_queue: int = 64,
        batch: int = 16,
        prefill_step: int = 256,
        progress: OnProgress = lambda event: None,
        kv_bits: int | None = None,
        kv_group_size: int = 64,
        quantized_kv_start: int = 5000,
        max_kv_size: int | None = None,
    ) -> "Engine":
        """Open a model folder or hub id; weights stay on disk until a task needs them.

        Args:
            path: as for :func:`ifp_mlx.load`.
            adapter_path: as for :func:`ifp_mlx.load`; of all requests.
            memory_limit: bytes; a request that would exceed it is refused before it
                starts, and MLX's own limit (of the process) is set to it while the
                engine is open. Default: none.
            cache_bytes: of compact models kept in memory, the least recently used
                let go first. Default: the memory limit, else half of the machine's
                memory.
            prompt_cache_bytes: of KV caches kept for the next turn; 0 keeps none.
            context_length: tokens; default: the model's own.
            max_queue: requests that may wait before others are refused as `Busy`.
            batch: most requests of one mask that decode together.
            prefill_step: prompt tokens between two chances to cancel.
            progress: called with ``download`` and ``load``, on the worker thread.
            kv_bits, kv_group_size, quantized_kv_start, max_kv_size: how KV caches are
                kept, see :class:`ifp_mlx.decoding.kv.KVOptions`. With ``kv_bits`` or
                ``max_kv_size`` a request's ``check`` is refused, and requests take turns
                instead of decoding in a batch.

        Raises:
            InvalidRequest: if mlx-lm cannot keep the model's KV cache like that.
            ModelNotFound: if there is no such folder or hub id.
            IncompatibleModel: if its content is damaged or of an unsupported type.
        """
        with typed_errors(InvalidRequest):
            how = kv_bits, kv_group_size, quantized_kv_start, max_kv_size
            kv = KVOptions(*how)
        settings = Settings(
            path=str(path),
            adapter_path=None if adapter_path is None else str(adapter_path),
            memory_limit=memory_limit,
            cache_bytes=cache_bytes,
            prompt_cache_bytes=prompt_cache_bytes,
            context_length=context_length,
            batch=batch,
            prefill_step=prefill_step,
            kv=kv,
        )
        worker = Worker(partial(Host, settings, progress))
        try:
            worker.ready.result()
            about = worker.submit(_about).result()
        except BaseException:
            worker.stop()
            raise
        return Engine(worker, about | {"max_queue": max_queue})

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """Whether the worker still serves."""
        return self._worker.alive

    def close(self) -> None:
        """End the worker and give its memory back; twice is fine.

        What is still running ends with `EngineClosed`.
        """
        self._close()

    def prepare(
        self,
        instruction: Prompt | None = None,
        *,
        name: str | None = None,
        load: bool = True,
        progress: OnProgress = lambda event: None,
        stop: CancelToken | None = None,
        **options: Any,
    ) -> Task:
        """Select and load the units of a task, and keep them under a name.

        Args:
            instruction: what selects; or give ``mask_file``.
            name: of the task; default: its identity. An existing one is replaced.
            load: ``False`` leaves loading to the first request, unless selecting loads
                anyway.
            progress: called with ``card``, ``calibrate``, ``select`` and ``channels``,
                on the worker thread.
            stop: cancels at the next layer or calibration text.
            options: the fields of :class:`Request` that are in ``CHOOSING``. A task
                serves requests with and without ``check``; here ``check`` says for
                which of them the model is loaded now.

        Raises:
            InvalidRequest: on a choice that cannot be had.
            OutOfMemory: if the compact model would exceed the memory limit.
            Cancelled: by ``stop``.
        """
        request, sampling = split_options(options | {"instruction": instruction})
        if sampling or not (request.instruction or request.mask_file):
            raise InvalidRequest(
                f"A task is prepared from an instruction or a mask_file, not {options}."
            )
        stop = stop or CancelToken()
        return self._call(
            lambda host: host.shelf.prepare(name, request, progress, stop, load)
        ).result()

    def tasks(self) -> list[Task]:
        """Return the prepared tasks, by name."""
        return self._call(lambda host: host.shelf.tasks()).result()

    def task(self, name: str) -> Task:
        """Return one prepared task; raises `UnknownTask`."""
        return self._call(lambda host: host.shelf.task(name)).result()

    def forget(self, name: str) -> None:
        """Take a task's name away; raises `UnknownTask`."""
        self._call(lambda host: host.shelf.forget(name)).result()

    def save(self, name: str, path: str | os.PathLike[str]) -> None:
        """Write a task's mask file, which ``mask_file=`` and the commands read."""
        self._call(lambda host: host.shelf.save(name, path)).result()

    def mask(
        self, name: str | None = None, *, mask_id: str | None = None
    ) -> np.ndarray:
        """Return a mask, float32 ``[L, F]``: 0 where a unit is left out.

        Args:
            name: of a task; or give ``mask_id``.
            mask_id: of any selection that is still known, as of the latest answers.

        Raises:
            UnknownTask: if no task has that name, or no known selection that mask id.
        """
        return self._call(lambda host: host.shelf.mask(name, mask_id)).result()

    def stream(
        self,
        messages: Prompt,
        *,
        stop: CancelToken | None = None,
        chat_template: bool = True,
        calling: Calling | None = None,
        **options: Any,
    ) -> Iterator[Event]:
        """Generate, as events; closing the iterator cancels.

        Args:
            messages: a user's text, the messages of a conversation (an assistant's at
                the end is continued), or token ids, taken as they are.
            stop: cancels within one prefill step or one token, or check; the stream
                then ends with ``Done("cancelled")``.
            chat_template: ``False`` leaves the chat template out.
            calling: the tools that the chat template shows; they select together with
                the messages. What the model writes comes as text, which ``dialect``
                divides.
            options: the fields of :class:`Request` (``task``,
                ``instruction``, ``mask_file``, ``keep``, ``check``, ...; by default
                the messages up to the first user message select) and of
                :class:`Sampling` (``max_tokens``, ``temp``, ...).

        Yields:
            `Progress` of each stage, a `Token` a step, and `Done` at the end.

        Raises:
            InvalidRequest: on a choice that cannot be had; `UnknownTask` and
                `ContextTooLong` are of that kind.
            OutOfMemory: if the request would exceed the memory limit.
            Busy: if ``max_queue`` requests are waiting.
            CheckFailed: if the whole model can no longer be read to check.
            EngineClosed: if the worker has ended, also in the midst of a stream.
        """
        options |= {"stop": stop, "chat_template": chat_template, "calling": calling}
        return self._events(self._request(messages, **options))

    def astream(self, messages: Prompt, **options: Any) -> AsyncIterator[Event]:
        """Generate as :meth:`stream` does, with the same options, for ``async for``;
        cancellation cancels.
        """
        return self._aevents(self._request(messages, **options))

    def generate(self, messages: Prompt, **options: Any) -> str:
        """Return the whole text of :meth:`stream`, which takes the same options."""
        return text_of(self.stream(messages, **options))

    async def agenerate(self, messages: Prompt, **options: Any) -> str:
        """Return the whole text of :meth:`astream`."""
        events = self.astream(messages, **options)
        return "".join([e.text async for e in events if isinstance(e, Token)])

    def chat(
        self,
        *,
        system: str | None = None,
        reselect: Literal["turn", "drift", "off"] | None = None,
        **options: Any,
    ) -> "Chat":
        """Begin a conversation; see :class:`Chat`, and for ``reselect`` other than
        ``turn`` see :class:`Request`.
        """
        if reselect in RESELECTS:
            options, reselect = options | {"reselect": reselect}, None
        _, sampling = split_options(options)
        Sampling(**sampling)  # a mistake is refused now, not at every turn
        return Chat(self, system, reselect, options)

    def memory(self) -> dict[str, int]:
        """Report bytes: MLX's ``active``, ``peak`` and ``freed_but_cached`` (all of
        the process), and of them ``compact_models``, ``prompt_cache``, ``kv_in_use``.
        """
        return self._call(lambda host: host.memory()).result()

    def checking(self) -> dict[str, Any]:
        """Report what checking took since the engine was opened: ``checks``, tokens
        ``drafted`` and ``accepted``, the share ``acceptance`` of drafted ones that were
        accepted (``None`` before any was drafted), and ``bytes_read`` of dropped
        channels. It does not wait for the worker.
        """
        return self._tally.report()

    def unload(self) -> None:
        """Cancel what runs and give all weights and caches back.

        Tasks stay known; the next request reads its units again.
        """
        self._call(lambda host: host.unload()).result()

    def _call(self, job: Callable[[Host], Any]) -> Future:
        def typed(host: Host) -> Any:
            with typed_errors(InvalidRequest):
                return job(host)

        return self._worker.submit(typed)

    def _request(
        self,
        messages: Prompt,
        *,
        stop: CancelToken | None = None,
        chat_template: bool = True,
        calling: Calling | None = None,
        **options: Any,
    ) -> Callable[..., Ticket]:
        if not self.alive:
            raise EngineClosed("The engine is closed; open another one.")
        if calling and not (chat_template and self.dialect.tools):
            raise InvalidRequest(
                "There is no chat template that shows tools to the model."
            )
        request, sampling = split_options(options)
        with typed_errors(InvalidRequest):
            tokens = ids_of(messages)  # an array may belong to the caller's thread
        return partial(
            Ticket,
            tokens or messages,
            request,
            Sampling(**sampling),
            CancelToken(stop),
            chat_template=chat_template,
            calling=calling,
        )

    def _enqueue(self, ticket: Ticket) -> Future:
        return self._call(lambda host: host.add(ticket, self._max_queue))

    def _events(self, asking: Callable[..., Ticket]) -> Iterator[Event]:
        events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        ticket = asking(emit=events.put)
        self._enqueue(ticket).result()
        try:
            while True:
                event = events.get()
                if isinstance(event, BaseException):
                    raise event
                yield event
                if isinstance(event, Done):
                    return
        finally:
            ticket.stop.cancel()

    async def _aevents(self, asking: Callable[..., Ticket]) -> AsyncIterator[Event]:
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Any] = asyncio.Queue()

        def emit(event: Any) -> None:
            try:
                loop.call_soon_threadsafe(events.put_nowait, event)
            except RuntimeError:  # the caller's loop is closed: nobody listens
                ticket.stop.cancel()

        ticket = asking(emit=emit)
        try:
            await asyncio.wrap_future(self._enqueue(ticket))
            while True:
                event = await events.get()
                if isinstance(event, BaseException):
                    raise event
                yield event
                if isinstance(event, Done):
                    return
        finally:
            ticket.stop.cancel()


def _about(host: Host) -> dict[str, Any]:
    own = host.model.ifp.target_size
    return {
        "name": host.model.name,
        "layers": host.model.layers,
        "unit": host.model.plan.unit,
        "channels": host.model.channels,
        "context_length": host.context_length,
        "keep": own / host.model.channels if own else "auto",
        "dialect": host.dialect,
        "tally": host.tally,
    }


def split_options(options: dict[str, Any]) -> tuple[Request, dict[str, Any]]:
    """Split options into the request for a selection and those that decode.

    Raises:
        InvalidRequest: on an unknown option, or a value that cannot be had.
    """
    sampling = {*Sampling.names()} - {"processors"}
    if unknown := options.keys() - {*CHOOSING} - sampling:
        raise InvalidRequest(
            f"{min(unknown)!r} is no option; there are "
            f"{', '.join(sorted({*CHOOSING} | sampling))}."
        )
    choosing = {name: options[name] for name in options.keys() & {*CHOOSING}}
    # Only the selector random depends on the seed; None is no seed.
    if choosing.get("selector") != "random" or choosing.get("seed") is None:
        choosing.pop("seed", None)
    with typed_errors(InvalidRequest):
        request = Request(**choosing)
    return request, {name: options[name] for name in options.keys() & sampling}
