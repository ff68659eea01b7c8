"""The one thread that owns MLX: everything an engine computes happens here."""

import gc
import queue
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

import mlx.core as mx

from .errors import EngineClosed, IFPError

Job = tuple[Callable[[Any], Any], Future]


class Resident(Protocol):
    """What lives on the worker: it is made, used and freed there."""

    @property
    def busy(self) -> bool:
        """Whether there is work to take turns at."""

    def turn(self) -> None:
        """Do one step of it."""

    def fail(self, error: BaseException) -> None:
        """End all work with ``error``."""


class Worker:
    """A thread that makes one :class:`Resident`, runs jobs on it, and takes turns.

    MLX's streams belong to the thread that made them, so arrays are made, evaluated
    and let go on this thread alone. It ends with ``mx.clear_streams()`` and is
    joined; without that the process may abort at exit.

    Args:
        make: returns the resident; called on the thread.
    """

    def __init__(self, make: Callable[[], Resident]) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._ended: BaseException | None = None
        self.ready: Future[None] = Future()
        # A daemon, so that a caller who forgets to close does not hang at exit; the
        # engine's finalizer stops and joins it even then.
        self._thread = threading.Thread(
            target=self._main, args=(make,), name="ifp_mlx", daemon=True
        )
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether jobs are still taken."""
        return self._ended is None

    def submit(self, job: Callable[[Any], Any]) -> Future:
        """Run ``job(resident)`` on the thread; its result or error is the future's.

        Raises:
            EngineClosed: if the worker has ended.
        """
        future: Future = Future()
        with self._lock:
            if self._ended is not None:
                raise closed(self._ended)
            self._jobs.put((job, future))
        return future

    def stop(self) -> None:
        """End the thread and wait for it; what is running ends with an error."""
        self._jobs.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _main(self, make: Callable[[], Resident]) -> None:
        ended: BaseException = EngineClosed("The engine is closed; open another one.")
        try:
            self._serve(make)
        except BaseException as error:  # waiting callers must be told of any end
            ended = error
        with self._lock:
            self._ended = ended
        self._refuse_rest(closed(ended))
        detached(ended)
        gc.collect()
        mx.clear_cache()
        mx.clear_streams()

    def _serve(self, make: Callable[[], Resident]) -> None:
        try:
            resident = make()
        except BaseException as error:
            self.ready.set_exception(error)
            raise
        self.ready.set_result(None)
        try:
            while self._run_jobs(resident):
                if resident.busy:
                    resident.turn()
        except BaseException as error:
            resident.fail(closed(error))
            raise
        resident.fail(EngineClosed("The engine was closed before this was done."))

    def _run_jobs(self, resident: Resident) -> bool:
        """Run queued jobs, waiting if there is nothing else; return whether to go
        on.
        """
        while not (resident.busy and self._jobs.empty()):
            job = self._jobs.get()
            if job is None:
                return False
            function, future = job
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(resident))
                except Exception as error:
                    future.set_exception(detached(error))
            del job, function, future
        return True

    def _refuse_rest(self, error: EngineClosed) -> None:
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return
            if job is not None and job[1].set_running_or_notify_cancel():
                job[1].set_exception(error)


def detached(error: BaseException) -> BaseException:
    """Return ``error`` without its frames, which hold arrays of this thread.

    An error that is no :class:`IFPError` keeps its traceback as a note.
    """
    if not isinstance(error, IFPError) and error.__traceback__ is not None:
        error.add_note("".join(traceback.format_tb(error.__traceback__)))
    error.__traceback__ = None
    return error


def closed(error: BaseException) -> EngineClosed:
    """Return the error that callers get once the worker has ended with ``error``."""
    if isinstance(error, EngineClosed):
        return error
    return EngineClosed(
        f"The engine's worker died of {type(error).__name__}: {error}; open another."
    )
