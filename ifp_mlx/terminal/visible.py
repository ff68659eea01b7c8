"""Text from models and files, shown so that a terminal obeys none of it.

A terminal takes control characters for orders: to clear the screen, to retitle the
window, to write elsewhere. What a model says, or what stands in a file from elsewhere, is
no order, so these characters are spelled out. In a file or a pipe text stays as it is.
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
    """Return a text with its control characters spelled out."""
    return text.translate(_SPELLED)


def say(text: str) -> None:
    """Print a line on standard error, visibly."""
    print(visible(text), file=sys.stderr, flush=True)


class Visible:
    """A text stream that spells out control characters; all else is the stream's own.

    Args:
        stream: what it writes to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text, visibly."""
        return self._stream.write(visible(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def visible_output() -> Iterator[None]:
    """Let all that is printed on standard output be visible where that is a terminal."""
    if not sys.stdout.isatty():
        yield
        return
    with redirect_stdout(cast(TextIO, Visible(sys.stdout))):
        yield
