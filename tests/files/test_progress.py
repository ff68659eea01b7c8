"""Progress as commands show it."""

import io
import sys

from ifp_mlx.files.progress import SHOWN, Stage


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_work_that_nobody_asked_for_says_what_it_is(monkeypatch):
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        assert list(SHOWN(Stage("measuring", "ab"))) == ["a", "b"]
        assert ("measuring:   0%" in stream.getvalue()) == stream.isatty()
        assert (stream.getvalue() == "measuring ...\n") != stream.isatty()


def test_work_that_was_asked_for_is_silent_where_there_is_no_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert list(SHOWN("ab")) == ["a", "b"] and not sys.stderr.getvalue()
