"""Text that ends before a stop string."""

from collections.abc import Sequence


class Stops:
    """Passes text on, piece by piece, held back where a stop string may have begun.

    Args:
        strings: the text ends before the first of these.

    Attributes:
        stopped: whether it has ended.
    """

    def __init__(self, strings: Sequence[str] = ()) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.stopped = False

    def add(self, piece: str) -> str:
        """Return the text that this piece makes certain."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [at for stop in self._strings if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        possible = (
            size
            for stop in self._strings
            for size in range(min(len(stop) - 1, len(text)), 0, -1)
            if text.endswith(stop[:size])
        )
        cut = len(text) - max(possible, default=0)
        self._held = text[cut:]
        return text[:cut]

    def finish(self) -> str:
        """Return what was held back, at the end of the text."""
        rest, self._held = self._held, ""
        return rest
