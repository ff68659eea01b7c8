"""Hold a conversation: read a line, answer it or do what it asks, until it ends."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from ..engine import CancelToken, Done, IFPError, Token
from .bars import Bars
from .commands import obey
from .conversation import Conversation
from .figures import status
from .reading import Reader
from .visible import say

ENDS = "Ctrl-D or /quit ends the conversation."


def hold(talk: Conversation, reader: Reader, bars: Bars) -> None:
    """Hold a conversation until its lines end.

    A request that cannot be met gives a sentence on standard error, and the
    conversation goes on.

    Args:
        talk: the conversation.
        reader: of its lines.
        bars: show progress.

    Raises:
        EngineClosed: if the engine has ended.
        KeyboardInterrupt: on Ctrl-C, if nobody types the lines.
    """
    while True:
        try:
            _take(talk, reader.read(), bars)
        except EOFError:
            return
        except KeyboardInterrupt:
            if not reader.typed:
                raise
            say(ENDS)
        except BrokenPipeError:  # nobody listens any more
            raise
        except (IFPError, ValueError, OSError) as error:
            if not talk.engine.alive:
                raise
            say(" ".join(str(error).split()))


def _take(talk: Conversation, line: str, bars: Bars) -> None:
    """Answer a line, or do what it asks."""
    if not line.strip():
        return
    with stopped_by_interrupt() as talk.stop:
        try:
            if not line.startswith("/"):
                _answer(talk, line, bars)
            elif line.startswith("//"):
                _answer(talk, line[1:], bars)
            elif reply := obey(talk, line):
                print(reply, flush=True)
        finally:
            bars.close()


def _answer(talk: Conversation, text: str, bars: Bars) -> None:
    begun = False
    try:
        for event in talk.answer(text):
            bars(event)
            if isinstance(event, Token) and event.text:
                print(event.text, end="", flush=True)
                begun = True
            elif isinstance(event, Done):
                talk.status = status(event, talk.engine.memory())
    finally:
        if begun:
            print(flush=True)
    say(talk.status)


@contextmanager
def stopped_by_interrupt() -> Iterator[CancelToken]:
    """Yield what a first Ctrl-C cancels; a second one is a ``KeyboardInterrupt``."""
    stop = CancelToken()

    def interrupt(*_: object) -> None:
        if stop.cancelled:
            raise KeyboardInterrupt
        stop.cancel()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
