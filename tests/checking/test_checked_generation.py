"""Checked generation as one asks for it: the command, and the function."""

import json
import re
import sys

import mlx_lm
import pytest
from conftest import fetch, run_command, write_family, write_folder

from ifp_mlx import generate, load, stream_generate
from ifp_mlx.generate import main
from ifp_mlx.model import checkpoint
from ifp_mlx.model.decide import decide
from ifp_mlx.model.fit import Limits, room_beside
from ifp_mlx.selection.prompts import as_messages, tokenize
from ifp_mlx.selection.request import MIN_AGREEMENT, Request

SHAPE = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 512}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    path = write_folder(tmp_path_factory.mktemp("checked") / "model", **SHAPE)
    return load(path)


@pytest.fixture(scope="module")
def dense_text(opened):
    model, tokenizer = opened
    tokens = tokenize(tokenizer, as_messages("Hello"))
    return mlx_lm.generate(model.dense(), tokenizer, tokens, max_tokens=12)


@pytest.fixture
def command(opened, capsys):
    """Run the command on the small model; return its report and stderr."""

    def run(*options, status=0, model=None):
        given = ["--model", model or opened[0].path, "-p", "Hello", "-m", 12]
        found, out, err = run_command(main, capsys, *given, "--json", *options)
        assert found == status, err
        if status:
            # The card that is measured first is announced.
            said = [line for line in err.splitlines() if not line.endswith(" ...")]
            assert out == "" and len(said) == 1 and "Traceback" not in err
            return err
        text, _, line = out.rstrip("\n").rpartition("\n")
        report = json.loads(line)
        assert report["text"] == text
        return report, err

    return run


def test_the_answer_is_the_dense_models_and_the_report_says_what_it_took(
    command, dense_text
):
    report, err = command("--keep", 0.75, "--check", "exact", "--draft-tokens", 4)
    assert report["text"] == dense_text
    check = report["check"]
    assert check["mode"] == "exact" and report["generation_tokens"] == 12
    assert check["accepted"] + check["checks"] == 12
    assert check["accepted"] <= check["drafted"] <= 4 * check["checks"]
    assert check["prompt_bytes_read"] == 0  # it was read to select
    read = check["bytes_read"] / 12 / 1e6
    assert (
        f"Checked (exact): {check['accepted']} of {check['drafted']} drafted tokens "
        f"stood, {12 / check['checks']:.2f} tokens a check, {read:.1f} MB of dropped "
        "channels read a token.\n"
    ) in err


def test_a_prompt_that_did_not_select_is_read_by_the_whole_model_too(
    command, dense_text
):
    options = ["--keep", 0.75, "--check", "exact", "--instruction", "French."]
    report, _ = command(*options)
    check = report["check"]
    assert report["text"] == dense_text
    assert 0 < check["prompt_bytes_read"] == check["bytes_read"] / (check["checks"] + 1)


def test_without_checking_nothing_is_said_of_it(command, dense_text):
    for options in ([], ["--check", "off"]):
        report, err = command("--keep", 0.5, *options)
        assert report["check"] is None and "Checked" not in err
        assert report["text"] != dense_text


def test_a_tolerance_is_its_own_mode(command, dense_text):
    report, err = command("--keep", 0.5, "--check", "1e-30", "--draft-tokens", 3)
    assert report["check"]["mode"] == 1e-30 and "Checked (1e-30): 9 of 9" in err
    assert report["text"] != dense_text
    report, _ = command("--keep", 0.5, "--check", 0.99999)
    assert report["text"] == dense_text


def test_draws_follow_the_seed_and_keep_the_length(command):
    options = ["--keep", 0.5, "--check", "exact", "--temp", 1.0, "--top-p", 0.9]
    one, again, other = (command(*options, "--seed", seed)[0] for seed in (3, 3, 4))
    assert one["text"] == again["text"] != other["text"]
    assert one["check"] == again["check"]


NO_WAY = (
    "is not a way of checking; choose exact, off, or a tolerance above 0 and below 1"
)
MISTAKES = {
    "not a number": (["--check", "nan"], f"check=nan {NO_WAY}"),
    "nothing": (["--check", "0"], f"check=0.0 {NO_WAY}"),
    "all": (["--check", "1"], f"check=1.0 {NO_WAY}"),
    "more than all": (["--check", "2"], f"check=2.0 {NO_WAY}"),
    "less than nothing": (["--check", "-1"], f"check=-1.0 {NO_WAY}"),
    "infinite": (["--check", "inf"], f"check=inf {NO_WAY}"),
    "a word": (["--check", "exactly"], f"check='exactly' {NO_WAY}"),
    "a word in capitals": (["--check", "Exact"], f"check='Exact' {NO_WAY}"),
    "empty": (["--check", ""], f"check='' {NO_WAY}"),
    "no draft": (["--draft-tokens", "0"], "draft_tokens=0 must be 1 or more"),
    "a compact prefill": (
        ["--check", "exact", "--prefill", "compact"],
        "check=exact has the whole model read the prompt, and prefill=compact the",
    ),
    "nothing to follow": (
        ["--reselect", "drift"],
        "reselect=drift chooses by what a check has computed; it goes with check=exact",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_before_any_model_is_opened(
    mistake, command, monkeypatch
):
    monkeypatch.setattr(sys.modules[main.__module__], "load", None)
    options, sentence = MISTAKES[mistake]
    assert sentence in command("--keep", 0.5, *options, status=2)


@pytest.mark.parametrize("check", [None, [], True, False, "", 0, 1, -0.5, float("nan")])
def test_the_function_refuses_what_the_command_refuses(check):
    with pytest.raises(ValueError, match="is not a way of checking; choose exact, off"):
        Request(instruction="Hi", check=check)


def test_a_mixture_is_refused(command, tmp_path):
    folder = write_family(tmp_path / "mixture", "qwen3_moe")
    for check in ("exact", "0.5"):
        err = command("--check", check, model=folder, status=2)
        assert f"does not go with the experts of {folder}" in err
        assert "leave check out" in err


def test_a_model_whose_cache_cannot_go_back_is_refused_before_it_is_read(
    command, tmp_path, monkeypatch
):
    folder = write_family(tmp_path / "hybrid", "lfm2")
    report, _ = command("--keep", 0.5, model=folder)
    whole, _ = command("--keep", 1, "--check", "exact", model=folder)
    assert whole["check"] is None  # there is nothing to check
    assert whole["text"] != report["text"]
    monkeypatch.setattr(checkpoint, "sweep", None)
    err = command("--keep", 0.5, "--check", "exact", model=folder, status=2)
    assert "the cache ArraysCache of this model cannot go back; generate without" in err


def test_keeping_everything_leaves_nothing_to_check(command, dense_text):
    report, err = command("--keep", 1, "--check", "exact")
    assert report["check"] is None and "Checked" not in err
    assert report["text"] == dense_text
    draws = ["--keep", 1, "--temp", 0.9, "--top-k", 40, "--seed", 5]
    plain, checked = command(*draws)[0], command(*draws, "--check", "exact")[0]
    assert checked["text"] == plain["text"] != dense_text
    assert checked["text"] == command(*draws, "--check", "0.5")[0]["text"]


@pytest.mark.parametrize("keep", [0.5, 1.0])
def test_a_sampler_of_ones_own_is_refused_with_what_there_is(keep, opened):
    for name in ("sampler", "logits_processors"):
        steps = stream_generate(
            *opened, "Hello", check="exact", keep=keep, **{name: None}
        )
        with pytest.raises(
            ValueError,
            match=f"'{name}' does not go with checking, which has to know how tokens are "
            "chosen; there are temp, top_p, min_p, .*, seed, processors",
        ):
            next(steps)


def test_the_function_gives_the_tokens_of_mlx_lm_one_by_one(opened, dense_text):
    model, tokenizer = opened
    options = {"check": "exact", "keep": 0.75, "max_tokens": 12}
    steps = list(stream_generate(*opened, "Hello", **options, prefill_step_size=5))
    tokens = tokenize(tokenizer, as_messages("Hello"))
    expected = list(
        mlx_lm.stream_generate(model.dense(), tokenizer, tokens, max_tokens=12)
    )
    assert [step.token for step in steps] == [step.token for step in expected]
    assert "".join(step.text for step in steps) == dense_text
    assert [step.generation_tokens for step in steps] == list(range(1, 13))
    assert {step.prompt_tokens for step in steps} == {len(tokens)}
    assert [step.finish_reason for step in steps] == [None] * 11 + ["length"]
    checks = [step.check.checks for step in steps]
    assert checks == sorted(checks) and checks[0] == 1
    assert generate(*opened, "Hello", **options) == dense_text
    with pytest.raises(ValueError, match="max_tokens=0 asks for no answer"):
        generate(*opened, "Hello", **options | {"max_tokens": 0})


def test_processors_are_an_option_of_the_function(opened):
    penalty = mlx_lm.sample_utils.make_logits_processors(repetition_penalty=1.4)
    options = {"check": "exact", "max_tokens": 12, "processors": penalty}
    model, tokenizer = opened
    tokens = tokenize(tokenizer, as_messages("Hello"))
    expected = mlx_lm.generate(
        model.dense(), tokenizer, tokens, max_tokens=12, logits_processors=penalty
    )
    for keep in (0.75, 1.0):
        assert generate(*opened, "Hello", keep=keep, **options) == expected


# Memory


def test_dropped_channels_stay_where_there_is_memory_for_them(opened, command):
    model = opened[0]
    model.known_prior()  # making it would need room of its own
    options = ["--keep", 0.25, "--check", "exact", "--allocation", "uniform"]
    context = len(tokenize(opened[1], as_messages("Hello"))) + 12
    request = Request(
        instruction="Hello",
        keep=0.25,
        check="exact",
        allocation="uniform",
        memory_bytes=10**9,
    )
    room = room_beside(model, decide(request, model), Limits(context, 10**9))
    needed = 10**9 - room
    layer = 0.75 * model.footprint.layer_bytes[0] * model.channels
    read, texts = [], set()
    for more in (0, 1.1, 2.1, 3.1):
        gigabytes = (needed + more * layer) / 1e9
        report, _ = command(*options, "--memory-gb", f"{gigabytes:.9f}")
        check = report["check"]
        read.append(check["bytes_read"] / (1 + check["checks"]))
        texts.add(report["text"])
    assert read == [read[0], read[0] * 2 / 3, read[0] / 3, 0] and len(texts) == 1
    err = command(*options, "--memory-gb", f"{needed / 1e9 - 0.0001:.9f}", status=2)
    assert re.search(r"MB are allowed; --keep 0\.\d+ fits", err)


def test_memory_chooses_how_much_is_kept(opened, command, dense_text):
    opened[0].known_prior()
    shares = []
    for gigabytes in (0.0075, 0.008):
        report, _ = command("--check", "exact", "--memory-gb", gigabytes)
        assert report["text"] == dense_text
        assert report["cache"] is None  # nothing is kept for the next time
        shares.append(report["selection"]["kept_channels"])
    assert 0 < shares[0] < shares[1]


def test_what_fits_is_refused_where_it_would_agree_too_little(opened, command):
    opened[0].known_prior()
    fits = ["--keep", "auto", "--memory-gb", 0.0057]
    err = command(*fits, status=2)
    assert re.search(r"No more than \d+% of the channels .* fit\. by the card of", err)
    assert (
        f"min_agreement={MIN_AGREEMENT} is asked for, which takes 100%. Give more memory"
        in err
    )
    report, _ = command(*fits, "--min-agreement", 0.01)
    selection = report["selection"]
    assert selection["agreement"] < MIN_AGREEMENT
    assert selection["kept_channels"] < 0.75 * selection["total_channels"]


# Masks


@pytest.mark.parametrize("compensated", [True, False])
def test_a_mask_file_is_checked_like_what_it_was_made_of(
    compensated, command, dense_text, tmp_path
):
    mask = tmp_path / "mask.safetensors"
    how = "--compensate" if compensated else "--no-compensate"
    first, _ = command("--keep", 0.75, "--check", "exact", how, "--save-mask", mask)
    again, _ = command("--mask-file", mask, "--check", "exact")
    assert first["text"] == again["text"] == dense_text
    for report in (first, again):
        assert report["selection"]["compensated"] == compensated
    assert again["selection"]["mask_id"] == first["selection"]["mask_id"]
    # The same drafts, from the same compact model.
    assert again["check"]["accepted"] == first["check"]["accepted"]


def test_agreement_is_still_asked_for(command):
    options = ["--keep", 0.5, "--check", "exact", "--min-agreement"]
    report, _ = command(*options, "0.0001")
    found = report["selection"]["agreement"]
    plain, _ = command("--keep", 0.5, "--min-agreement", "0.0001")
    assert plain["selection"]["agreement"] == pytest.approx(found, abs=0.05)
    err = command(*options, found + 0.01, status=2)
    assert "next token at" in err and "which keeps 50% of the channels" in err


# The package's own checkpoint, and real models


def test_the_shipped_checkpoint_says_what_its_whole_model_says(capsys):
    model, tokenizer = load()
    prompt = "What is Germany called in French?"
    tokens = tokenize(tokenizer, as_messages(prompt))
    expected = mlx_lm.generate(model.dense(), tokenizer, tokens, max_tokens=20)
    _, out, err = run_command(main, capsys, "-p", prompt, "--check", "exact", "-m", 20)
    assert out == expected + "\n"
    stood, drafted = map(int, re.search(r"(\d+) of (\d+) drafted", err).groups())
    assert 0 < stood <= drafted


@pytest.mark.long
@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("smollm2", "What is the capital of France?"),
        ("gemma3", "The capital of France is"),
    ],
)
def test_real_models_say_what_they_say_alone(name, prompt):
    model, tokenizer = load(fetch(name))
    tokens = tokenize(tokenizer, as_messages(prompt))
    expected = mlx_lm.generate(model.dense(), tokenizer, tokens, max_tokens=16)
    options = {"check": "exact", "keep": 0.75, "max_tokens": 16}
    *_, last = steps = list(stream_generate(model, tokenizer, prompt, **options))
    assert "".join(step.text for step in steps) == expected
    assert last.check.accepted > 0
