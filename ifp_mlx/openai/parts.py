"""A model's text, as it comes, divided into thoughts, answer and calls of tools."""

import uuid
from dataclasses import dataclass
from typing import Literal

from ..engine import Call, Calling, Dialect
from ..engine.dialect import CALLING, TALKING, THINKING

NAMES: dict[str, Literal["reasoning", "content"]]
NAMES = {THINKING: "reasoning", TALKING: "content"}


@dataclass(frozen=True)
class Piece:
    """A piece of text.

    Attributes:
        kind: ``reasoning`` or ``content``.
        text: never empty.
    """

    kind: Literal["reasoning", "content"]
    text: str


@dataclass(frozen=True)
class Called:
    """A call, whole.

    Attributes:
        id: by which its result refers to it.
        call: the tool and its arguments.
    """

    id: str
    call: Call


Part = Piece | Called


class Parts:
    """Divides one answer into its parts.

    Whitespace between a thought or a call and the answer belongs to neither. If the
    text between the marks of a call cannot be read as one, it stays as it was written.

    Args:
        dialect: of the model.
        state: that the answer begins in.
        calling: the tools; without any, a call is text.

    Attributes:
        called: how many calls there were.
        thinking: whether it is in a thought now.
        over: whether no more is wanted, since it has the one call that it may have.
    """

    def __init__(
        self, dialect: Dialect, state: str, calling: Calling | None = None
    ) -> None:
        self._dialect, self._calling = dialect, calling
        self._state, self._name = dialect.begin(state), state
        self._call = ""  # what was written of a call so far
        self._after_mark = False  # only whitespace came since
        self.called = 0
        self.over = False

    @property
    def thinking(self) -> bool:
        """Whether the answer is in a thought."""
        return self._name == THINKING

    def add(self, text: str) -> list[Part]:
        """Take in text; return the parts that are certain now."""
        if self.over or not text:
            return []
        self._state, found = self._dialect.split(self._state, text)
        return self._taken(found)

    def finish(self) -> list[Part]:
        """Return what is left at the end."""
        if self.over:
            return []
        parts = self._taken([self._dialect.rest(self._state)])
        return parts + self._end_of_call(closed=False)

    def _taken(self, found: list[tuple[str, str]]) -> list[Part]:
        parts: list[Part] = []
        for name, text in found:
            if name != self._name:
                parts += self._end_of_call(closed=True)
                self._name, self._after_mark = name, True
            if self.over:
                break
            if name == CALLING:
                self._call += text
            elif name in NAMES and (shown := self._without_space(text)):
                parts.append(Piece(NAMES[name], shown))
        return parts

    def _without_space(self, text: str) -> str:
        """Leave out the whitespace after a mark."""
        if self._after_mark:
            text = text.lstrip()
            self._after_mark = not text
        return text

    def _end_of_call(self, closed: bool) -> list[Part]:
        if self._name != CALLING:
            return []
        text, self._call = self._call, ""
        tools = self._calling.tools if self._calling else ()
        calls = self._dialect.calls(text, tools) if tools else None
        if calls is None:
            before, after = self._dialect.call_marks
            return [Piece("content", before + text + (after if closed else ""))]
        if self._calling and not self._calling.parallel:
            calls, self.over = calls[:1], True
        self.called += len(calls)
        return [Called(new_id(), call) for call in calls]


def new_id() -> str:
    """Return the id of a call: nine letters and digits, as Mistral's templates insist."""
    return uuid.uuid4().hex[:9]
