"""How far compact and dense model say the same on the text that selected."""

import json

import mlx.core as mx
import pytest
from conftest import relative_error, run_command, swept, write_family, write_folder

from ifp_mlx import Selection, load
from ifp_mlx.compact import main as compact
from ifp_mlx.generate import main as answer
from ifp_mlx.model.agreement import PLACES, places_of
from ifp_mlx.model.compact_cache import CompactCache, prepare_once
from ifp_mlx.model.decide import decide
from ifp_mlx.model.fit import Limits
from ifp_mlx.selection.request import Request
from ifp_mlx.slicing import reading, stock

TEXT = "Say hello to everyone."


def by_hand(model, compact_model, tokens, *, whole=False):
    """Return agreement and KL from both models' logits at the last tokens, of a compact
    model that goes on from the dense one's cache, or reads the whole text.
    """
    count, dense = len(places_of(tokens)), model.dense()
    p = stock.log_softmax(dense(mx.array([tokens]))[0])[-count:]
    before, last = tokens[:-count], tokens[-count:]
    cache = stock.prefill(compact_model if whole else dense, before)
    q = stock.log_softmax(compact_model(mx.array([last]), cache=cache)[0])
    same = (p.argmax(axis=-1) == q.argmax(axis=-1)).astype(mx.float32).mean()
    return float(same), float((mx.exp(p) * (p - q)).sum(axis=-1).mean())


@pytest.mark.parametrize(
    "name, whole, changes",
    [
        ("qwen3_moe", False, {}),
        ("deepseek_v3", False, {}),
        ("gemma3_text", False, {"sliding_window": 512}),
        ("llama", False, {}),
        ("gemma3_text", True, {}),  # a window that has wrapped around cannot go back
        ("gpt_oss", True, {}),
        ("lfm2", True, {}),  # nor can a state
    ],
)
def test_it_is_what_both_models_say_at_the_same_tokens(name, whole, changes, tmp_path):
    model, _ = load(write_family(tmp_path / "m", name, **changes))
    selection, small, _ = swept(model, TEXT, keep=0.25)
    tokens = model.instruction_tokens(TEXT)
    same, kl = by_hand(model, small, tokens, whole=whole)
    assert selection.origin.agreement == pytest.approx(same)
    assert selection.origin.kl == pytest.approx(kl, rel=1e-3)
    assert 0 <= same <= 1 and kl > 1e-4, "or nothing was compared"


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "deepseek_v3", "lfm2"])
def test_comparing_leaves_the_dense_models_cache_as_it_was(name, tmp_path):
    model, _ = load(write_family(tmp_path / "m", name))
    _, _, kv = swept(model, TEXT, keep=0.5)
    dense = model.dense()
    clean = stock.prefill(dense, model.instruction_tokens(TEXT))
    more = mx.array([[3, 1, 2]])
    assert relative_error(dense(more, cache=kv), dense(more, cache=clean)) < 1e-5


def test_nothing_dropped_agrees_in_everything(tmp_path):
    model, _ = load(write_family(tmp_path / "m", "qwen3_moe"))
    request = Request(instruction=TEXT, target_size=model.channels, selector="blend")
    made = model.prepare(decide(request, model))
    assert made.selection.origin.selector == "all"  # nothing to compare
    almost = model.select(TEXT, target_size=model.channels - 1)
    assert 0.5 < almost.origin.agreement and 0.5 < almost.origin.router_mass <= 1


def test_a_long_text_is_compared_in_its_last_step(tmp_path, monkeypatch):
    monkeypatch.setattr(stock, "PREFILL_STEP", 20)
    monkeypatch.setattr(reading, "FFN_STEP", 8)
    model, _ = load(write_family(tmp_path / "m", "qwen3_moe"))
    selection, small, _ = swept(model, TEXT, keep=0.5)
    tokens = model.instruction_tokens(TEXT)
    last = len(stock.steps_of(tokens)[-1])
    assert last == 20 < len(tokens)
    _, kl = by_hand(model, small, tokens)
    assert selection.origin.kl == pytest.approx(kl, rel=1e-3)


def test_places_are_the_last_tokens_and_more_of_a_longer_text():
    assert places_of(range(3)).tolist() == [0, 1, 2]
    assert places_of(range(200)).tolist() == list(range(175, 200))
    assert len(places_of(range(1000))) == PLACES


def test_the_command_says_it_and_refuses_by_it(tmp_path, capsys):
    folder = write_family(tmp_path / "m", "qwen3_moe")
    mask, given = tmp_path / "mask", ("--model", folder, "--keep", 0.25)
    status, out, err = run_command(
        answer, capsys, *given, "-p", TEXT, "-m", 2, "--json", "--save-mask", mask
    )
    said = json.loads(out.splitlines()[-1])["selection"]
    assert status == 0
    assert f"next token at {said['agreement']:.0%} (KL {said['kl']:.2f} nats)" in err
    assert f"had {said['router_mass']:.0%} of the gate weights" in err
    assert ("Warning: below 70%" in err) == (said["agreement"] < 0.7)
    origin = Selection.load(mask).origin
    for name in ("agreement", "kl", "router_mass"):
        assert getattr(origin, name) == pytest.approx(said[name], rel=1e-3)
    more = said["agreement"] + 0.01
    for main, rest in (
        (answer, ("-p", TEXT)),
        (compact, ("--instruction", TEXT, "--mlx-path", tmp_path / "out")),
        (answer, ("-p", TEXT, "--memory-gb", 1, "--cache-folder", tmp_path / "c")),
    ):
        status, _, err = run_command(
            main, capsys, *given, *rest, "--min-agreement", more
        )
        assert status == 2 and f"min_agreement={more} is asked for" in err, err
    assert not (tmp_path / "out").exists() and not (tmp_path / "c").exists()
    for selector in ("random", "prior"):
        more = ("--selector", selector, "--min-agreement", 0.5)
        status, _, err = run_command(answer, capsys, *given, "-p", TEXT, *more)
        assert status == 2 and f"the selector {selector} does without" in err
    status, _, err = run_command(
        answer, capsys, *given, "-p", TEXT, "--min-agreement", 50
    )
    assert status == 2 and "min_agreement=50.0 is not a share of tokens" in err


def test_a_cached_model_is_held_to_it_too(tmp_path):
    model, _ = load(write_family(tmp_path / "m", "qwen3_moe"))
    cache, limits = CompactCache(tmp_path / "cache"), Limits(64, 10**8)
    request = Request(instruction=TEXT, keep=0.25, memory_bytes=10**8)
    first = prepare_once(model, decide(request, model, limits=limits), cache, iter)
    again = prepare_once(model, decide(request, model, limits=limits), cache, iter)
    assert (first.cache, again.cache) == ("miss", "hit")
    found = again.selection.origin.agreement
    assert found == pytest.approx(first.selection.origin.agreement, rel=1e-3)
    asked = Request(
        instruction=TEXT, keep=0.25, memory_bytes=10**8, min_agreement=found + 0.01
    )
    with pytest.raises(ValueError, match="is asked for"):
        prepare_once(model, decide(asked, model, limits=limits), cache, iter)


def test_a_mask_that_was_never_compared_does_not_pass(tmp_path):
    model, _ = load(write_folder(tmp_path / "m"))
    given = model.select(TEXT, selector="random")
    with pytest.raises(ValueError, match="known only where the dense model reads"):
        decide(Request(selection=given, min_agreement=0.1), model)
