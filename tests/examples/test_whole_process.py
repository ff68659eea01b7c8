"""The bench of whole processes times what is printed, and takes ratios within a turn."""

import json
from pathlib import Path

import pytest

from examples.benchmarks.speed import sweep
from examples.benchmarks.speed.whole import (
    FIGURES,
    PAGE,
    Ran,
    Row,
    figures,
    in_turns,
    rolled,
    run,
    table,
)

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


def test_a_line_has_both_checkouts_and_mlx_lm_has_none():
    here = {"model": "m", "source": "folder", "chosen": "prior", "keep": "1"}
    times = {"first": 1.0, "whole": 3.0, "whole / mlx_lm": 1.5}
    stock = here | times | {"checkout": "mlx_lm", "chosen": "", "keep": ""}
    found = [stock, *(here | times | {"checkout": at} for at in ("now", "before"))]
    head, _, first, second = table(found).splitlines()
    assert head.count("now") == head.count("before") == 3
    assert [cell.strip() for cell in first.split("|")[5:-1]] == [
        *("1.00", "3.00", "1.50"),
        *("", "", ""),
    ]
    assert second.count("1.50") == 2


def test_the_page_has_the_figures_that_were_measured():
    found = json.loads(FIGURES.read_text())
    assert table(found) in PAGE.read_text()
    assert all(one["same text"] for one in found if one["keep"] == "1")
    assert sweep.table(json.loads(sweep.FIGURES.read_text())) in PAGE.read_text()


def test_what_the_page_concludes_of_whole_commands_is_so():
    found = [one for one in json.loads(FIGURES.read_text()) if one["checkout"] == "now"]
    ratios = {
        (one["model"], one["source"], one["chosen"], one["keep"]): one["whole / mlx_lm"]
        for one in found
    }
    small = {way: ratio for way, ratio in ratios.items() if way[3] != "1"}
    for (model, _, chosen, _), ratio in small.items():
        if model == "smollm2":
            assert ratio < 0.9 if chosen == "mask file" else 0.9 < ratio < 1.1
        else:
            assert ratio > 0.95


def test_the_sweeps_ratios_are_taken_within_a_turn():
    dense, other = [(1, 1), (2, 1), (1, 1)], [(2, 3), (6, 1), (9, 2)]
    turns = [{"dense": a, "sweep": b} for a, b in zip(dense, other, strict=True)]
    row = sweep.table({"m": turns}).splitlines()[-1]
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        *("m, sweep", "6.00", "3.00", "2.00", "2.00")
    ]
