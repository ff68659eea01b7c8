"""Progress as commands show it."""

import io
import sys

from ifp_mlx.files.progress import SHOWN, Stage


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_work_that_nobody_asked_for_says_what_it_is_on_a_terminal_alone(monkeypatch):
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        assert list(SHOWN(Stage("measuring", "ab"))) == ["a", "b"]
        assert ("measuring:   0%" in stream.getvalue()) == stream.isatty()
