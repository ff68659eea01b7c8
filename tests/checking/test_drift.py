"""Other channels for an answer that has moved on: exact still, and at no reading."""

import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import (
    by_turns,
    run_command,
    write_family,
    write_folder,
    write_quantised,
)
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step

from ifp_mlx import load
from ifp_mlx.checking import drift
from ifp_mlx.checking.loop import CheckedRun, DraftLength
from ifp_mlx.checking.rule import Rule
from ifp_mlx.decoding.options import Decoding
from ifp_mlx.generate import main
from ifp_mlx.model.decide import decide
from ifp_mlx.selection.masks import Selection
from ifp_mlx.selection.request import Request
from ifp_mlx.storage.folder import SHIPPED
from ifp_mlx.storage.writer import write_store

PROMPT = [5, 9, 77, 200, 13, 40, 41, 8, 120, 121, 7, 6]


@pytest.fixture
def restless(monkeypatch):
    """Exchange channels at every second check, whatever it gains."""
    monkeypatch.setattr(drift, "FLOOR", 3)
    monkeypatch.setattr(drift, "GAIN", -1.0)


def run_of(model, *, follow=True, room=0, **options):
    options = {"keep": 0.5, "check": "exact", "allocation": "uniform"} | options
    if follow:
        options["reselect"] = "drift"
    decision = decide(Request(instruction=PROMPT, **options), model)
    whole = model.prepare(decision).whole
    if room:
        whole = type(whole)(model.source, whole.model, room)
    run = CheckedRun(
        whole, PROMPT, Rule("exact", Decoding()), DraftLength(3), follow=follow
    )
    for _ in run.prefill():
        pass
    return run


def answer(run, count):
    tokens = []
    while len(tokens) < count:
        tokens += [one.token for one in run.check(count - len(tokens))]
    return tokens


def said_by(model, count):
    steps = generate_step(mx.array(PROMPT), model.dense(), max_tokens=count)
    return [token for token, _ in steps]


def plain(path):
    return write_folder(path, hidden_size=64, head_dim=16, intermediate_size=256)


def store(path):
    write_store(plain(path.with_name("plain")), path)
    return path


def fused(path):  # gate and up in one matrix
    return write_family(path, "phi3")


def biased(path):  # starcoder2's linears have biases
    return write_family(path, "starcoder2")


@pytest.mark.parametrize(
    ("write", "roomy"), by_turns([plain, store, fused, biased, write_quantised])
)
def test_an_answer_stays_exact_while_channels_are_exchanged(
    write, roomy, tmp_path, restless
):
    model, _ = load(write(tmp_path / "model"))
    run = run_of(model, room=roomy << 30)
    assert answer(run, 16) == said_by(model, 16)
    assert len(run.figures.moves) > 3


@pytest.mark.parametrize(
    ("write", "roomy"), by_turns([plain, store, fused, write_quantised])
)
def test_the_exchanged_channels_are_those_that_loading_gives(
    write, roomy, tmp_path, restless
):
    model, _ = load(write(tmp_path / "model"))
    run = run_of(model, room=roomy << 30)
    before = [part.index for part in run.whole.parts]
    answer(run, 12)
    indices = tuple(part.index for part in run.whole.parts)
    assert any(not mx.array_equal(a, b) for a, b in zip(before, indices, strict=True))
    fresh = model.apart(Selection(indices, None, model.channels))
    found = tree_flatten(run.whole.model.parameters(), destination={})
    expected = tree_flatten(fresh.parameters(), destination={})
    assert found.keys() == expected.keys()
    assert all(mx.array_equal(found[name], expected[name]) for name in found)


def test_exchanging_reads_nothing(tmp_path, restless):
    model, _ = load(store(tmp_path / "model"))
    moving, staying = run_of(model), run_of(model, follow=False)
    for run in (moving, staying):
        answer(run, 12)
    assert moving.figures.moves and not staying.figures.moves
    figures = [run.figures for run in (moving, staying)]
    read = {(f.bytes_read - f.prompt_bytes_read) / f.checks for f in figures}
    assert len(read) == 1


def test_channels_are_exchanged_when_the_text_uses_others(tmp_path, monkeypatch):
    monkeypatch.setattr(drift, "FLOOR", 4)
    model, _ = load(plain(tmp_path / "model"))
    run = run_of(model, selector="random")
    answer(run, 12)
    move = run.figures.moves[0]
    assert move.token == 0 and move.kept < 0.6 < move.best
    # What fits the text stays.
    assert all(later.best - later.kept < 0.3 for later in run.figures.moves[1:])


def test_a_rejected_token_is_not_remembered(tmp_path):
    model, _ = load(plain(tmp_path / "model"))
    run = run_of(model, selector="random")
    for _ in range(4):
        run.check(10)
        assert run.figures.accepted < run.figures.drafted
        # All but the last token of the answer have been read, and stay.
        read = min(len(run.tokens) - 1, drift.RECENT)
        assert {len(part.recent) for part in run.whole.parts} == {read}


def test_what_makes_up_for_dropped_channels_fits_the_latest_tokens(tmp_path, restless):
    model, _ = load(plain(tmp_path / "model"))
    run = run_of(model, compensate=False)
    answer(run, 16)
    part, plan = run.whole.parts[1], model.plan
    assert part.correction is not None and part.recent is not None
    dense = plan.inlets(model.dense())[1].weight
    h = np.array(part.recent)
    kept, dropped = np.array(part.index), np.array(part.dropped_index)
    missing = h[:, dropped] @ np.array(dense)[:, dropped].T
    reads, writes = map(np.array, part.correction)
    left = missing - h[:, kept] @ reads @ writes
    assert np.square(left).sum() < 0.5 * np.square(missing).sum()


@pytest.mark.parametrize(
    ("write", "options", "words"),
    [
        (write_quantised, {"granularity": 64}, "whole quantisation groups"),
        (lambda path: SHIPPED, {"keep": 0.25}, "soft gates"),
    ],
)
def test_what_cannot_be_exchanged_is_refused(write, options, words, tmp_path):
    model, _ = load(write(tmp_path / "model"))
    with pytest.raises(ValueError, match=words):
        run_of(model, **options)


def test_a_type_that_loops_over_its_layers_is_refused(tmp_path):
    model, _ = load(write_family(tmp_path / "model", "iquestloopcoder"))
    with pytest.raises(
        ValueError, match="iquestloopcoder, which goes through its layers several"
    ):
        run_of(model)


def test_the_command_says_when_channels_were_exchanged(tmp_path, capsys, restless):
    about = ("--model", plain(tmp_path / "model"), "--prompt", "Hello", "--json")
    how = ("--check", "exact", "--max-tokens", 12, "--reselect", "drift")
    status, out, _ = run_command(main, capsys, *about, *how)
    check = json.loads(out.splitlines()[-1])["check"]
    assert status == 0 and check["moves"]
    assert {*check["moves"][0]} == {"token", "kept", "best"}


def test_it_needs_checks(tmp_path, capsys):
    about = ("--model", plain(tmp_path / "model"), "--prompt", "Hello")
    status, _, err = run_command(main, capsys, *about, "--reselect", "drift")
    assert status == 2 and "reselect=drift chooses by what a check has computed" in err
