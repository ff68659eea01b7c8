"""Checked answers beside the dense model's own, and their speed beside streaming."""

import json
import threading
import time
from types import SimpleNamespace

import mlx.core as mx
import pytest
from conftest import run_command, write_folder, write_quantised
from mlx_lm.models.cache import make_prompt_cache

from ifp_mlx import benchmark, evaluate, generate, load
from ifp_mlx.checking.whole import Whole
from ifp_mlx.evaluation import checked, checked_speed
from ifp_mlx.evaluation.checked_speed import CheckedContest, Disk
from ifp_mlx.storage.writer import write_store

PROMPT = [9, 40, 33, 7, 81, 22, 5, 60]


def test_an_answer_is_compared_with_the_dense_models_place_by_place():
    found = checked.compare([1, 2, 9, 4], [1, 2, 3, 4, 5])
    assert found == {"same": 0.0, "before": 2 / 5, "alike": 3 / 5}
    assert checked.compare([1, 2], [1, 2]) == {"same": 1, "before": 1, "alike": 1}
    assert checked.compare([1, 2, 3], [1, 2]) == {"same": 0, "before": 1, "alike": 1}


def test_a_summary_weighs_answers_alike_and_checks_by_tokens():
    equal = {"same": 1.0, "before": 1.0, "alike": 1.0}
    lines = [
        equal | {"nats": 1.0, "tokens": 3, "checks": 1, "bytes_read": 30},
        dict.fromkeys(equal, 0.0) | {"nats": 2, "tokens": 1, "checks": 1}
        | {"bytes_read": 30},
    ]  # fmt: skip
    found = checked.summary(lines)
    assert found["same"] == found["alike"] == 0.5
    assert (found["nats"], found["tokens_per_check"]) == (1.25, 2)
    assert found["bytes_per_token"] == 15


def test_nats_are_those_of_the_dense_model(tiny_folder):
    dense = load(tiny_folder)[0].dense()
    logits = dense(mx.array([PROMPT]))[0, 4:7].astype(mx.float32)
    said = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    expected = -sum(float(said[n, token]) for n, token in enumerate(PROMPT[5:])) / 3
    assert checked.nats(dense, PROMPT[:5], PROMPT[5:]) == pytest.approx(expected, 1e-4)


# The disk


def test_a_disk_gives_one_after_the_other_and_reads_while_nobody_waits(monkeypatch):
    now, slept = [100.0], []
    clock = SimpleNamespace(perf_counter=lambda: now[0], sleep=slept.append)
    monkeypatch.setattr(checked_speed, "time", clock)
    disk = Disk(10.0)
    disk(20, 100.0)  # has come at 102
    disk(10, 100.0)  # was asked for too, and comes after: at 103
    now[0] = 103.5
    disk(10, 103.0)  # has come at 104
    now[0] = 110.0
    disk(30, 105.0)  # had come at 108, while something was computed
    assert slept == pytest.approx([2.0, 3.0, 0.5, 0.0])


@pytest.fixture(params=["folder", "store", "quantised", "whole groups"])
def whole(request, tmp_path):
    """A whole model beside a compact one, read in each of the ways there are."""
    groups = request.param == "whole groups"
    if groups or request.param == "quantised":
        folder = write_quantised(tmp_path / "m")
    else:
        folder = write_folder(tmp_path / "m")
    if request.param == "store":
        folder = write_store(folder, tmp_path / "store")
    model, _ = load(folder)
    about = {"selector": "random", "allocation": "uniform", "keep": 0.5}
    granularity = model.granularity if groups else 1
    selection = model.select(granularity=granularity, **about)
    return Whole(model.source, model.apart(selection))


def test_a_throttle_is_told_of_every_byte(whole):
    told, lock = [], threading.Lock()

    def throttle(nbytes, began):
        with lock:
            told.append(nbytes)

    whole.throttle = throttle
    whole(mx.array([PROMPT]), make_prompt_cache(whole.model))
    assert sum(told) == whole.bytes_read > 0


def test_a_pass_takes_as_long_as_its_disk(whole):
    whole(mx.array([PROMPT]), make_prompt_cache(whole.model))
    whole.throttle = Disk(whole.bytes_read / 0.2)
    begun = time.perf_counter()
    whole(mx.array([PROMPT]), make_prompt_cache(whole.model))
    assert time.perf_counter() - begun >= 0.2


# The benchmark


@pytest.fixture
def store(tmp_path):
    return write_store(write_folder(tmp_path / "tiny"), tmp_path / "store")


def test_streaming_reads_all_but_one_channel_and_a_check_what_is_dropped(store):
    model, _ = load(store)
    contest = CheckedContest(model, {"keep": 0.5}, PROMPT, 6, draft_tokens=4)
    every = contest.model.footprint.channel_bytes([64] * 3)
    streamed, exact = contest.run("streaming"), contest.run("exact")
    assert streamed.bytes_read / streamed.tokens == every * 63 / 64
    assert streamed.checks == streamed.tokens == 6
    assert exact.bytes_read / exact.checks == every / 2
    assert exact.tokens == 6 and 2 <= exact.checks <= 6
    assert contest.run("dense").bytes_read == 0


@pytest.mark.parametrize("turns", [1, 2])
def test_the_command_has_a_row_for_each_way_and_a_column_for_each_disk(
    store, capsys, turns
):
    keeps, keep = ["--keep", 0.5], 0.5
    if turns == 2:
        mask = store.parent / "a.safetensors"
        load(store)[0].select("Hi", selector="random", keep=0.75).save(mask)
        keeps, keep = ["--mask-file", mask], 0.75
    status, out, err = run_command(
        benchmark.main, capsys, "--model", store, *keeps, "--check", "exact", "off", 0.3,
        "--read-gb-per-s", 0.5, "--turns", turns, "--prompt-tokens", 9,
        "--max-tokens", 3, "--json",
    )  # fmt: skip
    assert status == 0, err
    assert "at 0.5 GB/s" in out
    (case,) = json.loads(out.splitlines()[-1])["cases"]
    assert case["keep"] == pytest.approx(keep, abs=0.01)
    names = [row["row"] for row in case["rows"]]
    ways = ["dense", "compact alone", "streaming", "check exact", "check 0.3"]
    assert names == ways
    runs = [len(row["runs"]) for row in case["rows"]]
    assert runs == [turns, turns, 2 * turns, 2 * turns, 2 * turns]
    found = {run["bandwidth"] for run in case["rows"][-1]["runs"]}
    assert found == {None, 5e8}


def test_a_dense_model_larger_than_memory_is_left_out(store, monkeypatch):
    model, _ = load(store)
    monkeypatch.setattr(checked_speed, "physical_memory", lambda: 1000)
    contest = CheckedContest(model, {"keep": 0.5}, PROMPT, 2)
    case = checked_speed.measure(contest, ["exact"])
    assert case.rows == ["compact alone", "streaming", "check exact"]
    assert "dense" not in checked_speed.table([case])


def test_mistakes_are_one_line_and_exit_status_2(tiny_folder, capsys):
    for mistake, sentence in (
        (["--read-gb-per-s", 1], "give --check too"),
        (["--check", "exact", "--cold"], "leave out --cold"),
        (["--check", "exact", "--read-gb-per-s", 0], "--read-gb-per-s 0"),
        (["--check", "well"], "check='well' is not a way of checking"),
        (["--check", "exact", "--keep", 1], "nothing to check"),
    ):
        given = ["--model", tiny_folder, "--max-tokens", 2, *mistake]
        status, _, err = run_command(benchmark.main, capsys, *given)
        assert status == 2 and sentence in err


# Answers


@pytest.fixture
def asked(tmp_path):
    model = write_folder(tmp_path / "tiny")
    questions = [
        {"prompt": f"Is {n} odd?", "check": {"kind": "yes-no", "expected": "no"}}
        for n in (2, 4)
    ]
    (tmp_path / "odd.jsonl").write_text("\n".join(map(json.dumps, questions)))
    return ["--model", model, "--answers", tmp_path / "odd.jsonl", "--max-tokens", "6"]


def lines_of(folder):
    lines = map(json.loads, (folder / "rows.jsonl").read_text().splitlines())
    return {(line["arm"], line["question"]): line for line in lines}


def test_exactly_checked_answers_are_the_dense_models_and_others_nearer_or_not(
    asked, tmp_path, capsys
):
    out = tmp_path / "out"
    given = [*asked, "--check", "exact", 0.5, "off", "--output", out, "--json"]
    status, text, err = run_command(evaluate.main, capsys, *given)
    assert status == 0, err
    found = json.loads(text.splitlines()[-1])["results"]["odd"]
    dense, exact, half, off = found.values()
    assert [arm.rpartition(", check ")[2] for arm in list(found)[1:]] == [
        "exact, dense prompt", "0.5, dense prompt", "off, dense prompt",
    ]  # fmt: skip
    assert dense["same"] == exact["same"] == exact["alike"] == 1
    assert exact["nats"] == pytest.approx(dense["nats"])
    assert off["alike"] < 1 and off["tokens_per_check"] is None
    assert half["bytes_per_token"] <= exact["bytes_per_token"] > 0
    assert off["bytes_per_token"] == 0
    assert "| odd" in text and "tokens/check" in text


def test_unchecked_ones_are_what_generate_says(asked, tmp_path, capsys):
    out = tmp_path / "out"
    run_command(evaluate.main, capsys, *asked, "--check", "off", "--output", out)
    lines = lines_of(out)
    model, tokenizer = load(asked[1])
    asked = {"selector": "activation", "keep": 0.5, "max_tokens": 6}
    said = {generate(model, tokenizer, f"Is {n} odd?", **asked) for n in (2, 4)}
    assert {line["text"] for (arm, _), line in lines.items() if arm != "dense"} == said


def test_a_stopped_run_goes_on_and_takes_more_ways(asked, tmp_path, capsys):
    out = tmp_path / "out"
    given = [*asked, "--output", out, "--json", "--check"]
    _, text, _ = run_command(evaluate.main, capsys, *given, "exact")
    rows = (out / "rows.jsonl").read_text().splitlines(keepends=True)
    (out / "rows.jsonl").write_text("".join(rows[:3]))
    _, again, _ = run_command(evaluate.main, capsys, *given, "exact")
    assert again.splitlines()[-1] == text.splitlines()[-1]
    run_command(evaluate.main, capsys, *given, "exact", 0.5)
    assert len(lines_of(out)) == len(rows) + 2
    status, _, err = run_command(evaluate.main, capsys, *asked, "--output", out)
    assert status == 2 and "was begun with compared" in err


def test_a_way_that_there_is_not_is_refused_before_anything_is_loaded(asked, capsys):
    status, _, err = run_command(evaluate.main, capsys, *asked, "--check", "2")
    assert status == 2 and "check=2.0 is not a way of checking" in err
    given = ["--model", "nowhere", "--data", "x.jsonl", "--check", "exact"]
    status, _, err = run_command(evaluate.main, capsys, *given)
    assert status == 2 and "goes with --answers" in err
