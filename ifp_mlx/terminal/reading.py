"""Where the lines of a conversation come from.

On a terminal they are typed, in an editor if the extra ``chat`` is installed; from
anything else each line of input is one.
"""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from ..files.texts import decoded
from .conversation import Conversation
from .visible import say

PROMPT = "> "
WITHOUT_EDITOR = (
    "History, completion and editing of several lines need prompt_toolkit: "
    "pip install 'ifp-mlx[chat]'."
)


class Reader(NamedTuple):
    """What reads the next line.

    Attributes:
        read: returns it; raises ``EOFError`` at the end.
        typed: whether a person types it.
    """

    read: Callable[[], str]
    typed: bool


def reader_of(talk: Conversation, history: Path | None = None) -> Reader:
    """Return what reads the lines of a conversation.

    Args:
        talk: its tasks are completed, and its status is shown.
        history: keeps what was typed; ``None`` forgets it at the end.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return Reader(_plain_line, typed=sys.stdin.isatty())
    if find_spec("prompt_toolkit") is None:
        say(WITHOUT_EDITOR)
        return Reader(_typed_line, typed=True)
    from .editing import editor_of

    return Reader(editor_of(talk, PROMPT, history), typed=True)


def _typed_line() -> str:
    try:
        return input(PROMPT)
    except EOFError:
        print()  # Ctrl-D leaves the cursor behind the prompt
        raise


def _plain_line() -> str:
    line = sys.stdin.buffer.readline()
    if not line:
        raise EOFError
    return decoded(line, "The line").removesuffix("\n")
