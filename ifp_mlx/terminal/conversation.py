"""A conversation in a terminal: its messages, and what selects for its answers."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..engine import CancelToken, Chat, Done, Engine, Event, InvalidRequest, Task
from ..selection.masks import find_mask
from ..selection.prompts import Message

HERE = "here"  # what the engine calls the task that selects beforehand
# What a task has decided on, once it is prepared.
DECIDED = (
    "keep",
    "target_size",
    "selector",
    "allocation",
    "granularity",
    "min_agreement",
)


class Source(NamedTuple):
    """What selects before the first message, for all answers.

    Attributes:
        words: what it is, for people.
        mask_file: the mask file to use, or ``None``.
        instruction: the text that selects, or ``None`` with a mask file.
    """

    words: str
    mask_file: str | None = None
    instruction: str | None = None


class Conversation:
    """Messages, what selects for the next answer, and the cost of the answers.

    Args:
        engine: answers.
        libraries: folders of task masks.
        system: the system message.
        reselect: as of :meth:`Engine.chat`.
        choosing: how much is kept and how it is found, as of :meth:`Engine.prepare`.
        decoding: how answers are decoded, as of :meth:`Engine.stream`.
        report: told of progress.

    Attributes:
        stop: cancels the work in progress; the reader of the next line sets a new one.
        source: what selects before the first message; ``None`` if that message selects.
        found: the current selection, if there is one.
        last: the figures of the last answer.
        answers: how many there were.
        read, generated: tokens of all answers; those from the KV cache do not count as
            read.
        status: one line on the last answer.
        saved: files that hold the conversation.

    Raises:
        InvalidRequest: on options that cannot be had.
    """

    def __init__(
        self,
        engine: Engine,
        libraries: Sequence[Path] = (),
        *,
        system: str | None = None,
        reselect: Any = "off",
        choosing: dict[str, Any] | None = None,
        decoding: dict[str, Any] | None = None,
        report: Callable[[Event], None] = lambda event: None,
    ) -> None:
        self.engine, self.libraries, self.report = engine, libraries, report
        self.stop = CancelToken()
        self._reselect = reselect
        self._choosing, self._decoding = choosing or {}, decoding or {}
        self.source: Source | None = None
        self.found: Done | Task | None = None
        self.last: Done | None = None
        self.answers = self.read = self.generated = 0
        self.status = ""
        self.saved: set[Path] = set()
        self._chat = self._new_chat(system)

    @property
    def messages(self) -> list[Message]:
        """What was said, the system message first if there is one."""
        return self._chat.messages

    @property
    def system(self) -> str | None:
        """The system message."""
        said = (m["content"] for m in self.messages[:1] if m["role"] == "system")
        return next(said, None)

    def say_before(self, system: str | None) -> None:
        """Put another system message before what was said, or none."""
        self._follow(self._new_chat(system))
        self._forget_found()

    def answer(self, text: str) -> Iterator[Event]:
        """Say ``text`` and stream the answer, as :meth:`Chat.stream` does."""
        for event in self._chat.stream(text, stop=self.stop):
            if isinstance(event, Done):
                self.last, self.answers = event, self.answers + 1
                self.found = event if event.total_channels else self.found
                self.read += event.prompt_tokens - event.cached_tokens
                self.generated += event.generation_tokens
            yield event

    def reset(self) -> None:
        """Forget what was said; the system message and all choices stay."""
        self._chat = self._new_chat(self.system)
        self._forget_found()

    def select_by(self, source: Source | None) -> None:
        """Select by this from now on, and load what it needs; ``None`` lets messages
        select.

        Raises:
            IFPError: if it cannot be had; then nothing changes.
        """
        self._change(source, self._choosing)

    def select_by_task(self, name: str) -> None:
        """Select by a task of the library from now on.

        Raises:
            FileNotFoundError: if there is none of that name.
        """
        file = find_mask(name, self.libraries)
        self.select_by(Source(f"the task {name}", mask_file=str(file)))

    def keep(self, share: Any) -> None:
        """Keep a share of the units from now on, or ``auto``.

        Raises:
            InvalidRequest: if that is no share, or a mask has decided on it.
        """
        if self.source is not None and self.source.mask_file is not None:
            raise InvalidRequest(
                f"How much is kept is fixed by {self.source.words}; /task off lets messages "
                "select again."
            )
        others = {n: o for n, o in self._choosing.items() if n != "target_size"}
        self._change(self.source, others | {"keep": share})

    def tasks(self) -> list[str]:
        """Return the names of the library's tasks."""
        files = [file for home in self.libraries for file in home.glob("*.safetensors")]
        return sorted({file.stem for file in files})

    def _change(self, source: Source | None, choosing: dict[str, Any]) -> None:
        before = self.source, self._choosing
        self.source, self._choosing = source, choosing
        try:
            chat = self._new_chat(self.system)
            self.found = None if source is None else self._prepared(source)
        except BaseException:
            self.source, self._choosing = before
            raise
        self._follow(chat)

    def _forget_found(self) -> None:
        """Forget what messages selected, along with the messages."""
        if self.source is None:
            self.found = None

    def _prepared(self, source: Source) -> Task:
        how = dict(self._choosing)
        if source.mask_file is not None:
            how = _undecided(how) | {"mask_file": source.mask_file}
        about: Any = {"name": HERE, "progress": self.report, "stop": self.stop}
        return self.engine.prepare(source.instruction, **about, **how)

    def _new_chat(self, system: str | None) -> Chat:
        how = self._choosing
        if self.source is not None:
            how = _undecided(how) | {"task": HERE}
        options = how | self._decoding
        return self.engine.chat(system=system, reselect=self._reselect, **options)

    def _follow(self, chat: Chat) -> None:
        """Go on in another chat, with what was said so far."""
        chat.messages += [m for m in self.messages if m["role"] != "system"]
        self._chat = chat


def _undecided(choosing: dict[str, Any]) -> dict[str, Any]:
    return {name: how for name, how in choosing.items() if name not in DECIDED}
