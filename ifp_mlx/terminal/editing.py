"""The prompt at which a line is edited, by prompt_toolkit."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import (
    CompleteEvent,
    Completer,
    Completion,
    PathCompleter,
)
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from ..files.atomic import writing
from .commands import COMMANDS, OFF
from .conversation import Conversation


class CommandCompleter(Completer):
    """Completes commands, and what follows them: tasks, shares, files.

    Args:
        talk: its tasks are offered.
    """

    def __init__(self, talk: Conversation) -> None:
        self._talk, self._files = talk, PathCompleter(expanduser=True)

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterator[Completion]:
        """Yield what the text before the cursor may become."""
        text = document.text_before_cursor
        name, space, begun = text.partition(" ")
        if not text.startswith("/"):
            return
        if name == "/save" and space:
            yield from self._files.get_completions(Document(begun), complete_event)
            return
        begun = begun if space else name
        for word in self._words(name) if space else COMMANDS:
            if word.startswith(begun):
                about = "" if space else COMMANDS[word].about
                yield Completion(word, -len(begun), display_meta=about)

    def _words(self, name: str) -> list[str]:
        if name == "/task":
            return [*self._talk.tasks(), OFF]
        own = {"/keep": ["auto"], "/select": [OFF], "/system": [OFF]}
        return own.get(name, [])


def editor_of(
    talk: Conversation, prompt: str, history: Path | None = None, **more: Any
) -> Callable[[], str]:
    """Return a function that reads a line that is typed and edited.

    Args:
        talk: its tasks are completed, and its status stands below.
        prompt: stands before the line.
        history: the file that keeps what was typed.
        more: for prompt_toolkit's session.

    Raises:
        OSError: if the history cannot be kept there.
    """
    past = InMemoryHistory() if history is None else FileHistory(_private(history))
    session: PromptSession[str] = PromptSession(
        prompt,
        history=past,
        completer=CommandCompleter(talk),
        key_bindings=_keys(),
        bottom_toolbar=lambda: _toolbar(talk),
        **more,
    )
    return session.prompt


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("escape", "enter")  # which is Alt-Enter
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _toolbar(talk: Conversation) -> str:
    who = talk.source.words if talk.source else "the first message"
    return f"{talk.engine.name} · selected by {who} {talk.status or '· /help'}"


def _private(history: Path) -> str:
    """Return the name of a file that only its owner reads, and make it."""
    with writing(history):
        history.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(history, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600))
    return str(history)
