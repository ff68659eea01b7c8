"""Decoding options mean what they mean in mlx-lm, at every door."""

import json

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from conftest import run_command, write_folder
from mlx_lm import sample_utils

from ifp_mlx import load, stream_generate
from ifp_mlx.decoding.options import BOUNDS, Decoding
from ifp_mlx.decoding.stops import Stops
from ifp_mlx.engine import Engine, InvalidRequest
from ifp_mlx.engine.sampling import Sampling
from ifp_mlx.generate import main

SAMPLED = [
    {"top_p": 0.7},
    {"min_p": 0.7, "min_tokens_to_keep": 3},
    {"top_k": 5},
    {"xtc_probability": 0.6, "xtc_threshold": 0.004},
]
PENALISED = [
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 1.8, "repetition_context_size": 2},
    {"presence_penalty": 1.5, "presence_context_size": 3},
    {"frequency_penalty": 1.5},
    {"logit_bias": {65: 3.0, 66: 2.5}},
]
LENGTH = 12


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    return load(write_folder(tmp_path_factory.mktemp("options") / "tiny"))


@pytest.fixture(scope="module")
def stock(opened):
    return opened[0].dense()


def expected(stock, tokenizer, tokens, seed=3, **how):
    """Return what mlx-lm says with an option, made by its own makers."""
    own = {name for some in PENALISED for name in some}
    penalties = {name: how[name] for name in how.keys() & own}
    draws = {name: how[name] for name in how.keys() - own}
    special = [*tokenizer.encode("\n"), *tokenizer.eos_token_ids]
    sampler = sample_utils.make_sampler(**draws, xtc_special_tokens=special)
    processors = sample_utils.make_logits_processors(**penalties)
    mx.random.seed(seed)
    steps = mlx_lm.stream_generate(
        stock,
        tokenizer,
        tokens,
        max_tokens=LENGTH,
        sampler=sampler,
        logits_processors=processors,
    )
    return [step.token for step in steps]


@pytest.mark.parametrize("how", [{"temp": 0.9} | some for some in SAMPLED] + PENALISED)
def test_keeping_everything_chooses_mlx_lms_own_tokens(how, opened, stock):
    model, tokenizer = opened
    tokens = model.instruction_tokens("Hello")
    steps = stream_generate(
        model, tokenizer, "Hello", keep=1.0, seed=3, max_tokens=LENGTH, **how
    )
    found = [step.token for step in steps]
    assert found == expected(stock, tokenizer, tokens, **how)
    plain = {"temp": how["temp"]} if "temp" in how else {}
    assert found != expected(stock, tokenizer, tokens, **plain)


@pytest.mark.parametrize("how", PENALISED)
def test_an_engine_penalises_as_mlx_lm_does(how, opened, stock):
    model, tokenizer = opened
    tokens = model.instruction_tokens("Hello")
    with Engine.open(model.path) as engine:
        found = engine.generate("Hello", keep=1.0, max_tokens=LENGTH, **how)
    said = expected(stock, tokenizer, tokens, **how)
    assert found == tokenizer.decode(said)


@pytest.mark.parametrize("prefill", ["compact", "dense", "auto"])
@pytest.mark.parametrize("check", ["off", "exact"])
def test_penalties_see_the_prompt_whoever_read_it(prefill, check, opened):
    if (prefill, check) == ("compact", "exact"):
        pytest.skip("excluded")
    model, tokenizer = opened
    seen = []

    def note(tokens, logits):
        seen.append(tokens.tolist())
        return logits

    options = {"keep": 0.5, "prefill": prefill, "check": check, "max_tokens": 2}
    list(stream_generate(model, tokenizer, "Hello", processors=[note], **options))
    tokens = model.instruction_tokens("Hello")
    assert seen[0] == tokens and all(some[: len(tokens)] == tokens for some in seen)


@pytest.mark.parametrize("threshold", [0.02, 0.2])
def test_the_chances_of_xtc_are_those_of_its_two_sides(threshold):
    logits = mx.random.normal((2, 9), key=mx.random.key(1))
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    how = {"xtc_threshold": threshold, "xtc_special_tokens": (2,)}
    found = Decoding(temp=0.8, xtc_probability=0.3, **how).chances(logits)
    sides = [
        mx.softmax(
            sample_utils.apply_xtc(logprobs, always, threshold, [2]) / 0.8, axis=-1
        )
        for always in (0.0, 1.0)
    ]
    expected = 0.7 * np.array(sides[0]) + 0.3 * np.array(sides[1])
    assert np.abs(found - expected).max() < 1e-6
    assert np.abs(sides[0] - sides[1]).max() > 0.05 or threshold == 0.2


def test_stop_strings_end_the_text_before_them(opened, capsys):
    model, tokenizer = opened
    given = ["--model", model.path, "-p", "Hello", "--keep", "1", "-m", "30"]
    _, out, _ = run_command(main, capsys, *given)
    text = out.removesuffix("\n")
    stop = text[7:10]
    more = ["--stop", "never there", "--stop", stop, "--json"]
    for check in ([], ["--check", "0.5"]):
        status, out, err = run_command(main, capsys, *given, *more, *check)
        assert status == 0, err
        report = json.loads(out.splitlines()[-1])
        assert report["text"] == text[: text.index(stop)]
        assert report["finish_reason"] == "stop"
    with Engine.open(model.path) as engine:
        said = engine.generate("Hello", keep=1.0, max_tokens=30, stop_strings=(stop,))
    assert said == report["text"]


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_stop_string_is_found_wherever_the_pieces_end(cut):
    text = "say abab abac then"
    pieces = [text[at : at + cut] for at in range(0, len(text), cut)]
    stops = Stops(("abac", "never"))
    said = "".join(stops.add(piece) for piece in pieces)
    assert said + stops.finish() == "say abab " and stops.stopped
    open_end = Stops(("then all",))
    assert "".join(open_end.add(p) for p in pieces) + open_end.finish() == text


def test_the_chat_template_takes_options(tmp_path, capsys):
    template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% if thinks is defined %}[{{ thinks }}]{% endif %}"
    )
    folder = write_folder(tmp_path / "tiny")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    given = ["--model", folder, "-p", "Hello", "-m", "1", "--keep", "0.5", "--json"]
    counts = []
    for more in ([], ["--chat-template-config", '{"thinks": "no"}']):
        status, out, err = run_command(main, capsys, *given, *more)
        assert status == 0, err
        counts.append(json.loads(out.splitlines()[-1])["prompt_tokens"])
    assert counts[1] == counts[0] + len("[no]")
    with Engine.open(folder) as engine:
        events = engine.stream(
            "Hello", keep=0.5, max_tokens=1, chat_template_config={"thinks": "no"}
        )
        assert [*events][-1].prompt_tokens == counts[1]
    for wrong in ('{"tokenize": true}', "[1]", "no json"):
        status, _, err = run_command(
            main, capsys, *given, "--chat-template-config", wrong
        )
        assert status == 2 and ("leave it out" in err or "no JSON object" in err)


WRONG = [(name, low - 1) for name, (low, _) in BOUNDS.items()]
WRONG += [(name, high + 1) for name, (_, high) in BOUNDS.items() if high < 1e9]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_value_out_of_its_bounds_is_one_sentence(name, value, opened, capsys):
    kind = int if isinstance(getattr(Decoding(), name), int) else float
    flags = ["--model", opened[0].path, "-p", "Hi", f"--{name.replace('_', '-')}"]
    status, out, err = run_command(main, capsys, *flags, kind(value))
    assert status == 2 and f"error: {name}=" in err and "must be" in err
    with pytest.raises(InvalidRequest, match=f"{name}="):
        Sampling(**{name: value})


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--logit-bias", '{"x": 1}'), "a number for each token id"),
        (("--logit-bias", "5"), "no JSON object"),
        (("--logit-bias", '{"1000": 1}'), "logit_bias names the token 1000"),
        (("--logit-bias", '{"5": NaN}'), "logit_bias=nan of the token 5 must be"),
        (("--logit-bias", '{"5": 1e999}'), "logit_bias=inf of the token 5 must be"),
        (("--chat-template-config", '{"messages": []}'), "leave it out"),
        (("--chat-template-config", "[" * 9999), "no JSON object"),
        (("--stop", ""), "A stop string is empty"),
        (("--prefill-step-size", "0"), "at least 1"),
    ],
)
def test_a_bad_value_is_one_sentence(flags, words, opened, capsys):
    status, out, err = run_command(
        main, capsys, "--model", opened[0].path, "-p", "Hi", *flags
    )
    assert (status, out) == (2, "") and words in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("kind", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("how", [{"top_p": 1e-3}, {"top_p": 1e-9}, {"temp": 1e-40}])
def test_as_little_as_can_be_is_the_most_likely_token(how, kind):
    found = nn.log_softmax(mx.array([[0.0, 3.0, 1.0, 2.0]] * 99)).astype(kind)
    decoding = Decoding(**{"temp": 1.0} | how)
    assert decoding.sampler()(found).tolist() == [1] * 99
    if not decoding.greedy:
        assert decoding.chances(found[:1]).tolist() == [[0, 1, 0, 0]]


def test_more_tokens_to_draw_from_than_there_are_are_all_of_them(opened):
    model, tokenizer = opened
    fitted = Decoding(top_k=10_000, min_tokens_to_keep=10_000).fitted(tokenizer, 259)
    assert (fitted.top_k, fitted.min_tokens_to_keep) == (0, 259)


def test_what_does_not_go_with_checking_is_named(opened):
    model, tokenizer = opened
    with pytest.raises(ValueError, match="'sampler' does not go with checking"):
        next(stream_generate(model, tokenizer, "Hi", check="exact", sampler=None))
