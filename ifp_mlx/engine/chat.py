"""A conversation on an engine, and which mask each of its turns is answered with."""

from collections.abc import AsyncIterator, Iterator
from typing import Any, Protocol

from ..selection.prompts import Message
from .errors import InvalidRequest
from .events import Event, Token


class Streams(Protocol):
    """What answers the turns: an :class:`~ifp_mlx.engine.Engine`."""

    def stream(self, messages: list[Message], **options: Any) -> Iterator[Event]:
        """Answer, as events."""

    def astream(self, messages: list[Message], **options: Any) -> AsyncIterator[Event]:
        """Answer, as events for ``async for``."""


class Chat:
    """A conversation whose first instruction's mask stays (the paper's rule).

    Args:
        engine: where it is held.
        system: the system message.
        reselect: ``"turn"`` selects again with every user message, as if it were the
            first; the conversation is then prefilled again wherever the mask changes.
        options: defaults of every turn, as of :meth:`Engine.stream`.

    Raises:
        InvalidRequest: on another ``reselect``, or on one beside a fixed task, mask
            file or instruction.

    Source: Hou et al. 2025 (arXiv:2501.02086) sec. 3.
    """

    def __init__(
        self,
        engine: Streams,
        system: str | None,
        reselect: str | None,
        options: dict[str, Any],
    ) -> None:
        if reselect not in (None, "turn"):
            raise InvalidRequest(
                f"reselect={reselect!r} is unknown; use 'turn', 'drift' or 'off'."
            )
        if reselect and options.keys() & {"task", "mask_file", "instruction"}:
            raise InvalidRequest("reselect='turn' goes with no fixed task or mask.")
        self._engine, self._options, self._reselect = engine, options, reselect
        said = [] if system is None else [{"role": "system", "content": system}]
        self._system: list[Message] = said
        self.messages: list[Message] = list(said)

    def stream(self, text: str, **options: Any) -> Iterator[Event]:
        """Say ``text`` and stream the answer; ``messages`` gets as much of it as
        came.
        """
        events = self._engine.stream(self._turn(text), **self._choose(text, options))
        answer = ""
        try:
            for event in events:
                answer += event.text if isinstance(event, Token) else ""
                yield event
        finally:
            self._said(text, answer)

    async def astream(self, text: str, **options: Any) -> AsyncIterator[Event]:
        """As :meth:`stream`, for ``async for``."""
        events = self._engine.astream(self._turn(text), **self._choose(text, options))
        answer = ""
        try:
            async for event in events:
                answer += event.text if isinstance(event, Token) else ""
                yield event
        finally:
            self._said(text, answer)

    def generate(self, text: str, **options: Any) -> str:
        """Say ``text`` and return the whole answer."""
        return text_of(self.stream(text, **options))

    def _turn(self, text: str) -> list[Message]:
        return [*self.messages, _asked(text)]

    def _choose(self, text: str, options: dict[str, Any]) -> dict[str, Any]:
        own = {"instruction": [*self._system, _asked(text)]} if self._reselect else {}
        return self._options | own | options

    def _said(self, text: str, answer: str) -> None:
        if answer:  # a turn that failed or was cancelled at once is forgotten
            answered = {"role": "assistant", "content": answer}
            self.messages = [*self._turn(text), answered]


def _asked(text: str) -> Message:
    return {"role": "user", "content": text}


def text_of(events: Iterator[Event]) -> str:
    """Return the text of a stream."""
    return "".join(event.text for event in events if isinstance(event, Token))
