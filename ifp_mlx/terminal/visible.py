"""Text from models and files, shown so that it cannot control a terminal.

A terminal obeys control characters: they clear the screen, change the window's title,
or write elsewhere. Text from a model or a foreign file must not do that, so these
characters are shown as text. In a file or a pipe the text stays as it is.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO, cast

# Line ends and tabs stay; the others are written as keyboards name them, ^[ for escape.
_SPELLED: dict[int, str] = {code: f"^{chr(code ^ 64)}" for code in (*range(32), 127)}
_SPELLED |= {code: f"\\x{code:02x}" for code in range(128, 160)}
_SPELLED |= {ord("\r"): ""}  # with a line end it says nothing, alone it hides a line
del _SPELLED[ord("\n")], _SPELLED[ord("\t")]


def visible(text: str) -> str:
    """Return a text with its control characters shown as text."""
    return text.translate(_SPELLED)


def say(text: str) -> None:
    """Print a line on standard error, its control characters shown as text."""
    print(visible(text), file=sys.stderr, flush=True)


class Visible:
    """A text stream that shows control characters as text, and else acts as its stream.

    Args:
        stream: the stream it writes to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text, its control characters shown as text."""
        return self._stream.write(visible(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def visible_output() -> Iterator[None]:
    """Show control characters as text on standard output, where that is a terminal."""
    if not sys.stdout.isatty():
        yield
        return
    with redirect_stdout(cast(TextIO, Visible(sys.stdout))):
        yield
