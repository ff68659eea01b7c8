"""The app without its window: an engine, tasks, conversations.

The window calls the methods below on its event loop, and draws the attributes whenever
it is told to. Nothing here imports Toga or MLX: only the engine's own thread uses MLX.
"""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

import numpy as np

from ifp_mlx.engine import (
    Cancelled,
    CancelToken,
    Chat,
    Done,
    Engine,
    IFPError,
    Progress,
    Task,
    Token,
)

FRAMES_PER_SECOND = 25
WORDS = {
    "download": "Downloading",
    "load": "Opening the folder",
    "card": "Measuring the model, once",
    "calibrate": "Calibrating, once",
    "select": "Selecting channels",
    "channels": "Reading channels",
    "prefill": "Reading the prompt",
    "decode": "Answering",
}
SUGGESTIONS = {
    "Facts": "Answer questions about countries, cities, nature and science.",
    "Code": "Write a short Python function.",
    "Stories": "Write a story about an animal for children at bedtime.",
    "Letters": "Write a polite letter.",
}


@dataclass
class Line:
    """Something said: by whom, what, and, under an answer, its figures."""

    speaker: str
    text: str
    figures: str = ""


@dataclass
class Assignment:
    """An instruction under a name.

    Attributes:
        task: what the engine selected for it, once it has.
        chat: the conversation held with that selection.
        mask: bool ``[L, F]``, the channels it keeps.
        lines: what was said.
    """

    name: str
    instruction: str
    task: Task | None = None
    chat: Chat | None = None
    mask: np.ndarray | None = None
    lines: list[Line] = field(default_factory=list)


def alone(can_stop: bool) -> Callable[[Any], Any]:
    """Return a decorator of methods that do not run while another one does.

    An error becomes the status.

    Args:
        can_stop: whether the user may stop the method.
    """

    def decorate(work: Callable[..., Awaitable[None]]) -> Callable[..., Any]:
        @wraps(work)
        async def run(self: "Controller", *args: Any, **options: Any) -> None:
            if self.busy:
                self._say_status("Wait for the work in progress, or stop it.")
                return
            self.busy, self.fraction, self.can_stop = True, None, can_stop
            self._stop = CancelToken()
            self._touch()
            try:
                await work(self, *args, **options)
            except Cancelled:
                self.status = "Stopped."
            except IFPError as error:
                self.status = str(error)
            finally:
                self.busy, self.fraction, self.can_stop = False, 0.0, False
                self._touch()

        return run

    return decorate


class Controller:
    """One engine, its tasks, and a conversation with each.

    One thing is done at a time; an error is shown in ``status``. All methods are called
    on one event loop.

    Args:
        redraw: called on the loop, at most 25 times a second, after something changed.
        open_engine: ``Engine.open``; a test gives its own.

    Attributes:
        assignments: by name, in the order of the table.
        current: the name of the one being talked to.
        keep: the share of the channels that the next selection keeps; ``None``: the
            model's own share, else the smallest that agrees enough with the whole
            model.
        tell: whether the next conversation has the instruction as its system message;
            otherwise it selects, and the model does not see it.
        status: one sentence for the user.
        fraction: how far the stage is, 0 to 1; ``None`` if that is not known.
        busy: whether something is being done.
        can_stop: whether it can be stopped, and has not been yet.
        memory: the engine's report in bytes, empty while there is no engine.
        speed: tokens per second of the newest answer; 0 before there is one.
    """

    def __init__(
        self,
        redraw: Callable[[], None] = lambda: None,
        open_engine: Callable[..., Engine] = Engine.open,
    ) -> None:
        self.redraw, self._open_engine = redraw, open_engine
        self._engine: Engine | None = None
        self._stop = CancelToken()
        # Threads of our own, to wait for the engine: Qt's event loop would not end
        # those it makes.
        self._threads = ThreadPoolExecutor(max_workers=4)
        self._changed = asyncio.Event()
        self.assignments = {n: Assignment(n, text) for n, text in SUGGESTIONS.items()}
        self.current = next(iter(self.assignments))
        self.keep: float | None = None
        self.tell = False
        self.status = "Open a model folder, or a Hugging Face Hub id."
        self.fraction: float | None = 0.0
        self.busy = self.can_stop = False
        self.memory: dict[str, int] = {}
        self.speed = 0.0

    @property
    def ready(self) -> bool:
        """Whether a model is open and nothing is being done."""
        return self._engine is not None and not self.busy

    @property
    def assignment(self) -> Assignment:
        """The one being talked to."""
        return self.assignments[self.current]

    async def frames(self) -> None:
        """Redraw after changes until cancelled: many tokens may share one frame."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            self.redraw()
            await asyncio.sleep(1 / FRAMES_PER_SECOND)

    async def watch_memory(self, seconds: float = 1.0) -> None:
        """Ask the engine for its memory, again and again, until cancelled."""
        while True:
            await self._look_at_memory()
            await asyncio.sleep(seconds)

    @alone(can_stop=False)
    async def open(self, path: str) -> None:
        """Open a model folder or hub id in place of the one that is open."""
        self._say_status(f"Opening {path} ...")
        await self._let_go()
        engine = self._engine = await self._wait_for(
            self._open_engine, path, progress=self._reporter()
        )
        self.status = (
            f"{engine.name}: {engine.layers} layers of {engine.channels} {engine.unit}s. "
            "Choose a task and ask something, or write a task of your own."
        )
        await self._look_at_memory()

    def choose(self, name: str) -> None:
        """Talk to another assignment; its conversation is as it was left."""
        if name in self.assignments and not self.busy:
            self.current = name
            self._touch()

    @alone(can_stop=True)
    async def select(self, name: str, instruction: str) -> None:
        """Select channels by an instruction, under a name, and begin a conversation."""
        name, instruction = name.strip(), instruction.strip()
        if not (name and instruction):
            self.status = "A task needs a name and an instruction."
            return
        await self._prepare(Assignment(name, instruction))

    @alone(can_stop=True)
    async def say(self, text: str, **options: Any) -> None:
        """Say something to the current assignment and stream the answer.

        If its channels are not selected yet, they are selected first.

        Args:
            text: what the user wrote.
            options: of decoding, as of ``Engine.stream``.
        """
        text = text.strip()
        if not text:
            return
        if self.assignment.chat is None:
            await self._prepare(self.assignment)
        answer = Line(self.current, "")
        lines = self.assignment.lines
        lines += [Line("You", text), answer]
        try:
            await self._stream(text, answer, options)
        finally:
            if not answer.text:  # without an answer, forget the question
                del lines[-2:]

    def stop(self) -> None:
        """Stop the work in progress, at its next step."""
        if self.can_stop:
            self._stop.cancel()
            self.can_stop = False
            self._say_status("Stopping ...")

    def restart(self) -> None:
        """Begin the current conversation anew, with the same channels."""
        assignment = self.assignment
        if self.ready and assignment.chat is not None:
            assignment.chat = self._chat(assignment)
            assignment.lines = []
            self._touch()

    @alone(can_stop=False)
    async def unload(self) -> None:
        """Give the memory back; the next question reads the channels again."""
        self._say_status("Unloading ...")
        await self._wait_for(self._opened().unload)
        await self._refresh_tasks()
        self.status = "Unloaded. The next question reads its channels again."

    async def close(self) -> None:
        """Stop what is being done and end the engine; there is nothing after it."""
        self.stop()
        await self._let_go()
        self._threads.shutdown(wait=False)

    def shares(self) -> list[tuple[float, float]]:
        """Return, for each layer of the current selection, two shares of its channels.

        The first is what is kept; the second is the part of it that every other
        selection of this model keeps as well.
        """
        mask = self.assignment.mask
        if mask is None:
            return []
        others = [a.mask for a in self.assignments.values() if a.mask is not None]
        common = np.logical_and.reduce(others)
        return list(zip(mask.mean(1).tolist(), common.mean(1).tolist(), strict=True))

    async def _prepare(self, assignment: Assignment) -> None:
        engine = self._opened()
        task = await self._wait_for(
            engine.prepare,
            assignment.instruction,
            name=assignment.name,
            keep=self.keep,
            progress=self._reporter(),
            stop=self._stop,
        )
        mask = await self._wait_for(engine.mask, assignment.name)
        assignment.task, assignment.mask = task, mask > 0
        assignment.chat = self._chat(assignment)
        self.assignments[assignment.name] = assignment
        self.current = assignment.name
        await self._refresh_tasks()
        self.status = (
            f"{task.name} keeps {task.kept_channels / task.total_channels:.0%} of the "
            f"{task.unit}s ({task.bytes / 1e6:.0f} MB): {task.seconds['select']:.1f} s to "
            f"select, {task.seconds['load']:.1f} s to read{quality(task)}."
        )

    def _chat(self, assignment: Assignment) -> Chat:
        system = assignment.instruction if self.tell else None
        return self._opened().chat(system=system, task=assignment.name)

    async def _stream(self, text: str, answer: Line, options: dict[str, Any]) -> None:
        chat = self.assignment.chat
        assert chat is not None
        async for event in chat.astream(text, stop=self._stop, **options):
            if isinstance(event, Progress):
                self._progress(event)
            elif isinstance(event, Token):
                answer.text += event.text
                self._touch()
            elif isinstance(event, Done):
                self._done(event, answer)
        await self._refresh_tasks()

    def _done(self, done: Done, answer: Line) -> None:
        self.speed = done.tokens_per_second
        self.status = {
            "stop": "Answered.",
            "length": "The answer has reached its greatest length.",
            "cancelled": "Stopped.",
        }[done.finish_reason]
        if done.generation_tokens:
            answer.figures = (
                f"{done.generation_tokens} tokens, {done.tokens_per_second:.1f} "
                f"tokens/s; the first after {done.seconds['ttft']:.1f} s"
            )

    def _reporter(self) -> Callable[[Progress], None]:
        """Return what the engine may call on its own thread."""
        loop = asyncio.get_running_loop()

        def report(event: Progress) -> None:
            try:
                loop.call_soon_threadsafe(self._progress, event)
            except RuntimeError:  # the app is gone
                pass

        return report

    def _progress(self, event: Progress) -> None:
        if not self.busy or self._stop.cancelled:
            return  # a report that arrives late
        self.fraction = event.done / event.total if event.total else None
        amount = f" {event.done} of {event.total}" if event.total > 1 else ""
        if event.stage == "download":
            amount = f" {event.done / 1e6:.0f} of {event.total / 1e6:.0f} MB"
        if event.stage == "decode":
            self.fraction, amount = None, ""
        self._say_status(f"{WORDS[event.stage]}{amount} ...")

    async def _refresh_tasks(self) -> None:
        """Ask which models are in memory: preparing one may have freed another."""
        for task in await self._wait_for(self._opened().tasks):
            if task.name in self.assignments:
                self.assignments[task.name].task = task
        await self._look_at_memory()

    async def _look_at_memory(self) -> None:
        engine = self._engine
        if engine is not None:
            try:
                memory = await self._wait_for(engine.memory)
            except IFPError:  # it was closed or has died; the next request will say so
                memory = {}
            if memory != self.memory:
                self.memory = memory
                self._touch()

    async def _let_go(self) -> None:
        engine, self._engine = self._engine, None
        self.memory = {}
        for assignment in self.assignments.values():
            assignment.task = assignment.chat = assignment.mask = None
        if engine is not None:
            await self._wait_for(engine.close)

    async def _wait_for(
        self, call: Callable[..., Any], *args: Any, **named: Any
    ) -> Any:
        """Call the engine on a thread that may wait, so that the window does not."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, partial(call, *args, **named))

    def _opened(self) -> Engine:
        if self._engine is None:
            raise IFPError("Open a model first.")
        return self._engine

    def _say_status(self, sentence: str) -> None:
        self.status = sentence
        self._touch()

    def _touch(self) -> None:
        self._changed.set()


def quality(task: Task) -> str:
    """Return how far a task's model agrees with the whole one, as far as that is known."""
    words = ""
    if task.agreement is not None:
        words += f"; at the instruction's end {task.agreement:.0%} as the whole model"
    if task.promise is not None:
        words += f"; in answers {task.promise:.0%}, by its card"
    return words
