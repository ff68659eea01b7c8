import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from conftest import run_command, swept, tiny_model
from mlx.utils import tree_flatten
from mlx_lm import convert

from ifp_mlx import load
from ifp_mlx.compact import main as compact
from ifp_mlx.generate import main as generate
from ifp_mlx.slicing import compensation, stock
from ifp_mlx.slicing.compensation import (
    compensated_down,
    cut_compensated,
    read_channels,
)
from ifp_mlx.slicing.plan import plan_of

RNG = np.random.default_rng(0)
D, F = 6, 12
DOWN = mx.array(RNG.normal(size=(D, F)).astype(np.float32))
KEPT = mx.array([0, 2, 3, 7, 8, 9, 11], dtype=mx.int32)


def channels(tokens):
    return mx.array(RNG.normal(size=(tokens, F)).astype(np.float32))


def outputs(h, down, index):
    return h @ DOWN.T, h[:, index] @ down.T


def test_dropped_channels_that_follow_from_kept_ones_are_made_up_for():
    h = np.array(channels(40))
    h[:, 1] = 2 * h[:, 0] - h[:, 7]
    for dropped in (4, 5, 6, 10):
        h[:, dropped] = 0.5 * h[:, 9]
    found = compensated_down(DOWN, mx.array(h), KEPT, strength=1e-6)
    whole, part = outputs(mx.array(h), found, KEPT)
    assert mx.allclose(whole, part, atol=1e-3)


@pytest.mark.parametrize("tokens", [3, 7, 30])
def test_the_output_on_the_text_itself_comes_closer(tokens):
    h = channels(tokens)
    whole, plain = outputs(h, DOWN[:, KEPT], KEPT)
    _, better = outputs(h, compensated_down(DOWN, h, KEPT), KEPT)
    scale = mx.linalg.norm(h, axis=1, keepdims=True)  # every token counts the same
    error = [mx.square((whole - part) / scale).sum().item() for part in (plain, better)]
    assert error[1] < 0.9 * error[0]


def test_it_is_the_ridge_solution_however_many_tokens_there_are():
    for tokens in (4, 25):
        h = channels(tokens)
        unit = np.array(h) / np.linalg.norm(np.array(h), axis=1, keepdims=True)
        kept, down = unit[:, np.array(KEPT)].astype(float), np.array(DOWN)
        missing = unit @ down.T - kept @ down[:, np.array(KEPT)].T
        penalty = 0.3 * (kept**2).sum() / tokens
        expected = np.linalg.solve(
            kept.T @ kept + penalty * np.eye(KEPT.size), kept.T @ missing
        )
        found = compensated_down(DOWN, h, KEPT, strength=0.3) - DOWN[:, KEPT]
        assert np.allclose(np.array(found).T, expected, atol=1e-4)


def test_nothing_changes_where_nothing_is_dropped_or_read():
    everything = mx.arange(F)
    assert mx.array_equal(compensated_down(DOWN, channels(5), everything), DOWN)
    nothing = compensated_down(DOWN, mx.zeros((0, F)), KEPT)
    assert mx.array_equal(nothing, DOWN[:, KEPT])


def test_an_infinitely_cautious_correction_is_none():
    cautious = compensated_down(DOWN, channels(9), KEPT, strength=1e9)
    assert mx.allclose(cautious, DOWN[:, KEPT], atol=1e-5)
    half = compensated_down(DOWN.astype(mx.float16), channels(9), KEPT)
    assert half.dtype == mx.float16


@pytest.mark.parametrize("quantised", [False, True])
def test_a_compact_model_comes_closer_to_the_dense_one_on_its_text(
    tiny_folder, tmp_path, quantised
):
    if quantised:
        convert(str(tiny_folder), str(tmp_path / "q"), quantize=True, q_group_size=32)
    model, _ = load(tmp_path / "q" if quantised else tiny_folder)
    text = list(range(40, 90))
    dense = model.dense()(mx.array([text]))
    selection = model.select(text, keep=0.5, allocation="uniform")
    by_text = selection.compensated(text, "a text")
    assert by_text.compensates and not by_text.plain().compensates
    assert by_text.mask_id == selection.mask_id
    error = [
        mx.square(model.compact(chosen)(mx.array([text])) - dense).mean()
        for chosen in (selection, by_text)
    ]
    assert error[1] < 0.7 * error[0]
    everything = model.select(text, keep=1.0).compensated(text, "a text")
    same = model.compact(everything)(mx.array([text]))
    assert mx.allclose(same, dense, atol=1e-5)


def weights(model):
    return dict(tree_flatten(model.parameters()))


@pytest.mark.parametrize("steps", [1, 3])
def test_a_sweep_gives_what_selecting_and_then_compensating_gives(
    tiny_folder, monkeypatch, steps
):
    model, _ = load(tiny_folder)
    text = list(range(40, 90))
    monkeypatch.setattr(stock, "PREFILL_STEP", -(-len(text) // steps))
    selection, compact, cache = swept(model, text, keep=0.5, compensate=True)
    assert selection.text == tuple(text) and selection.compensates
    chosen = model.select(text, keep=0.5)
    assert selection.mask_id == chosen.mask_id
    again = weights(model.compact(chosen.compensated(text, "the instruction")))
    assert all(mx.array_equal(w, again[n]) for n, w in weights(compact).items())
    # By hand, of the last step's tokens.
    last = len(stock.steps_of(text)[-1])
    dense = model.dense()
    seen = read_channels(dense, plan_of(dense), text)
    for number, (ffn, index) in enumerate(
        zip(plan_of(dense).modules(dense), chosen.indices, strict=True)
    ):
        down = compensated_down(ffn.down_proj.weight, seen[number][-last:], index)
        found = model.plan.modules(compact)[number].down_proj.weight
        assert mx.allclose(found, down, atol=1e-4)
    # The keys and values are the dense model's.
    fresh = stock.prefill(model.dense(), text)
    assert [layer.offset for layer in cache] == [len(text)] * 3
    pairs = zip(cache, fresh, strict=True)
    assert all(mx.allclose(a.state[0], b.state[0], atol=1e-5) for a, b in pairs)


def test_no_more_tokens_than_needed_are_looked_at(tiny_folder, monkeypatch):
    model, _ = load(tiny_folder)
    text = list(range(40, 90))
    monkeypatch.setattr(compensation, "TOKENS", 20)
    index = mx.arange(0, 64, 2)
    ffn = model.plan.modules(model.dense())[0]
    seen = read_channels(model.dense(), model.plan, text)
    expected = compensated_down(ffn.down_proj.weight, seen[0][::3], index)
    cut_compensated(ffn, model.plan.layers[0], index, seen[0])
    assert mx.allclose(ffn.down_proj.weight, expected)


def test_gates_are_refused(tiny_folder):
    model, _ = load(tiny_folder)
    selection = model.select("Hello", keep=0.5)
    gates = tuple(mx.ones(index.size) for index in selection.indices)
    gated = replace(selection.compensated([5, 6], "a text"), gates=gates)
    with pytest.raises(ValueError, match=f"{gated.mask_id} has gates"):
        model.compact(gated)  # as a mask file might have it
    with pytest.raises(ValueError, match=f"{gated.mask_id} has gates"):
        gated.plain().compensated([5, 6], "a text")


def test_core_is_shared_with_a_model_beside_a_compensated_one(tiny_folder):
    model, _ = load(tiny_folder)
    first, compact, _ = swept(model, "One thing.", keep=0.5, compensate=True)
    other = model.select("Another.", keep=0.5)
    for selection in (other, other.compensated([5, 6, 7], "a text")):
        beside = weights(model.compact(selection, beside=(compact, first)))
        alone = weights(model.compact(selection))
        assert all(mx.array_equal(w, alone[name]) for name, w in beside.items())
        core = [name for name in beside if ".mlp." not in name]
        assert all(beside[name] is weights(compact)[name] for name in core)


def test_reading_leaves_the_model_as_it_was():
    model = tiny_model("qwen3")
    before = [type(layer.mlp) for layer in model.layers]
    channels = read_channels(model, plan_of(model), [5, 6, 7])
    assert [h.shape for h in channels] == [(3, 64)] * 3
    assert [type(layer.mlp) for layer in model.layers] == before


def test_generate_compensates_where_the_instruction_is_read_anyway(
    tiny_folder, tmp_path, capsys
):
    given = ["--model", tiny_folder, "--keep", "0.5", "--prompt", "hello", "-m", "8"]

    def said(*options):
        status, out, err = run_command(generate, capsys, *given, "--json", *options)
        assert status == 0, err
        return json.loads(out.splitlines()[-1])

    mask = tmp_path / "mask.safetensors"
    found = said("--save-mask", mask)
    assert found["selection"]["compensated"]
    plain = said("--no-compensate", "--prefill", "compact")
    assert not plain["selection"]["compensated"] and plain["text"] != found["text"]
    assert not said("--selector", "random")["selection"]["compensated"]
    assert said("--selector", "random", "--compensate")["selection"]["compensated"]
    # A mask file brings it along.
    del given[2:4]
    again = said("--mask-file", mask, "--prefill", "dense")
    assert again["selection"]["compensated"] and again["text"] == found["text"]
    without = said("--mask-file", mask, "--no-compensate", "--prefill", "compact")
    assert without["text"] == plain["text"]


def test_compact_compensates_by_the_instruction_and_says_so(
    tiny_folder, tmp_path, capsys
):
    given = ["--model", tiny_folder, "--keep", "0.5", "--instruction", "hello"]

    def card(name, *options):
        command = [*given, *options, "--mlx-path", tmp_path / name]
        status, _, err = run_command(compact, capsys, *command)
        assert status == 0, err
        return err, (tmp_path / name / "README.md").read_text()

    err, text = card("default")
    assert "tokens of the instruction" in err and "tokens of the instruction" in text
    for name, option in (("no", ["--no-compensate"]), ("r", ["--selector", "random"])):
        err, text = card(name, *option)
        assert "ompensated" not in err + text


def test_a_mask_without_a_text_cannot_be_compensated(tiny_folder, tmp_path, capsys):
    model, _ = load(tiny_folder)
    mask = tmp_path / "mask.safetensors"
    model.select("hello", keep=0.5, allocation="uniform").save(mask)
    given = ["--model", tiny_folder, "--mask-file", mask, "--mlx-path", tmp_path / "o"]
    status, _, err = run_command(compact, capsys, *given, "--compensate")
    assert status == 2 and "carries no text that could show how" in err
