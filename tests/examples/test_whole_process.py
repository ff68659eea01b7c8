"""The bench of whole processes times what is printed, and takes ratios within a turn."""

from pathlib import Path

import pytest

from examples.benchmarks.speed.whole import Ran, Row, figures, in_turns, rolled, run

SLOW = "import time; print('==========', flush=True); time.sleep(0.3); "
SLOW += "print('Blue', flush=True); time.sleep(0.2); print('==========\\nPrompt: 3')"


def test_the_first_text_is_no_header_and_what_follows_the_text_is_left_out(tmp_path):
    found = run(["-c", SLOW], tmp_path)
    assert found.text == "Blue"
    assert 0.3 < found.first < found.whole


def test_a_command_that_fails_ends_the_bench(tmp_path):
    with pytest.raises(SystemExit, match="ended with 3"):
        run(["-c", "raise SystemExit(3)"], tmp_path)


def rows(*texts):
    """Return rows that print a text each."""
    here = Path(__file__).parent
    command = [["-c", f"print({text!r})"] for text in texts]
    return [Row("m", "now", "folder", "", "1", here, one) for one in command]


def test_each_turn_begins_with_another_row_and_the_first_is_not_counted(capsys):
    turns = list(in_turns(rows("a", "b"), 1))
    assert [[ran.text for ran in turn] for turn in turns] == [["a", "b"]]
    assert [rolled(rows("a", "b", "c"), n) for n in (0, 1)] == [[0, 1, 2], [1, 2, 0]]


def test_ratios_are_taken_within_a_turn():
    turns = [[Ran(1, 2, "x"), Ran(1, 1, "x")], [Ran(2, 10, "x"), Ran(1, 5, "y")]]
    first, second = figures(rows("a", "b"), turns)
    assert first["whole / mlx_lm"] == 1 and first["same text"]
    assert second["whole / mlx_lm"] == 0.5 and not second["same text"]
    assert (second["first"], second["whole"]) == (1, 3)
