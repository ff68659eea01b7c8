"""Progress of an engine, as bars with names."""

import io
import sys

from ifp_mlx.engine import Progress, Token
from ifp_mlx.terminal.bars import Bars


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(monkeypatch, stream, *events):
    monkeypatch.setattr(sys, "stderr", stream)
    bars = Bars()
    for event in events:
        bars(event)
    bars.close()
    return stream.getvalue()


STEPS = [Progress("card", n, 4) for n in range(5)]
STEPS += [Progress("select", 0, 0), Token("a", 1, 1)]


def test_each_stage_is_a_bar_with_a_name_that_goes_away(monkeypatch):
    text = shown(monkeypatch, Terminal(), *STEPS)
    assert "measuring the model's card, once:   0%" in text and "0/4" in text
    assert text.index("selecting: 0") > text.index("once:")
    assert text.endswith(" \r")  # nothing of it is left


def test_where_nobody_looks_what_was_not_asked_for_is_named_and_nothing_else(
    monkeypatch,
):
    card, select = "measuring the model's card, once ...\n", STEPS[5:]
    assert shown(monkeypatch, io.StringIO(), *STEPS) == card
    assert shown(monkeypatch, io.StringIO(), *select) == ""
