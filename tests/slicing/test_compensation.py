import json
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import run_command, swept, tiny_model
from mlx.utils import tree_flatten
from mlx_lm import convert

from ifp_mlx import load
from ifp_mlx.compact import main as compact
from ifp_mlx.generate import main as generate
from ifp_mlx.selection.top_k import select
from ifp_mlx.slicing import compensation, stock
from ifp_mlx.slicing.compensation import (
    WORTH,
    compensated_down,
    correction_of,
    cut_compensated,
    down_correction,
    evidence,
    merit,
    read_channels,
    worth,
)
from ifp_mlx.slicing.plan import plan_of

RNG = np.random.default_rng(0)
D, F = 6, 12
DOWN = mx.array(RNG.normal(size=(D, F)).astype(np.float32))
KEPT = mx.array([0, 2, 3, 7, 8, 9, 11], dtype=mx.int32)


def channels(tokens):
    return mx.array(RNG.normal(size=(tokens, F)).astype(np.float32))


def unit(h):
    """Return rows of length 1, in double precision."""
    h = np.array(h, dtype=np.float64)
    return h / np.linalg.norm(h, axis=1, keepdims=True)


def outputs(h, down, index):
    return h @ DOWN.T, h[:, index] @ down.T


def test_dropped_channels_that_follow_from_kept_ones_are_made_up_for():
    h = np.array(channels(40))
    h[:, 1] = 2 * h[:, 0] - h[:, 7]
    for dropped in (4, 5, 6, 10):
        h[:, dropped] = 0.5 * h[:, 9]
    known = evidence(mx.array(h))._replace(strength=1e-5)
    found = compensated_down(DOWN, known, KEPT)
    whole, part = outputs(mx.array(h), found, KEPT)
    assert mx.allclose(whole, part, atol=1e-3)


@pytest.mark.parametrize("tokens", [3, 7, 30])
def test_the_output_on_the_text_itself_comes_closer(tokens):
    h = channels(tokens)
    whole, plain = outputs(h, DOWN[:, KEPT], KEPT)
    _, better = outputs(h, compensated_down(DOWN, evidence(h), KEPT), KEPT)
    scale = mx.linalg.norm(h, axis=1, keepdims=True)  # every token counts the same
    error = [mx.square((whole - part) / scale).sum().item() for part in (plain, better)]
    assert error[1] < 0.9 * error[0]


def test_it_is_the_ridge_solution_however_many_tokens_there_are():
    for tokens in (4, 25):
        h = channels(tokens)
        rows = unit(h)
        kept, down = rows[:, np.array(KEPT)], np.array(DOWN)
        missing = rows @ down.T - kept @ down[:, np.array(KEPT)].T
        penalty = 0.3 * (kept**2).sum() / tokens  # the kept share of a token's energy
        expected = np.linalg.solve(
            kept.T @ kept + penalty * np.eye(KEPT.size), kept.T @ missing
        )
        found = compensated_down(DOWN, evidence(h), KEPT)
        found = np.array(found - DOWN[:, KEPT]).T
        assert np.allclose(found, expected, atol=1e-4)


def test_a_correction_in_two_factors_is_the_best_of_its_rank_on_the_text():
    inlet = nn.Linear(F, D, bias=False)
    inlet.weight = DOWN
    known = evidence(channels(25))
    kept = known.rows[:, KEPT]
    whole = down_correction(DOWN, known, KEPT)
    reads, writes = correction_of(inlet, known, KEPT)  # no more tokens than its rank
    assert mx.allclose(reads @ writes, whole, atol=1e-4)
    reads, writes = correction_of(inlet, known, KEPT, rank=2)
    assert (reads.shape, writes.shape) == ((7, 2), (2, 6))
    left, sizes, right = np.linalg.svd(np.array(kept @ whole), full_matrices=False)
    best = (left[:, :2] * sizes[:2]) @ right[:2]
    assert np.allclose(np.array(kept @ reads @ writes), best, atol=1e-4)


def test_a_sketch_counts_as_so_many_tokens_beside_the_text():
    h, sketch = channels(5), channels(3).astype(mx.float16)
    rows = np.array(evidence(h, sketch).rows, dtype=np.float64)
    texts = unit(h).T @ unit(h)
    calibration = np.array(sketch, dtype=np.float64)
    expected = texts + WORTH * calibration.T @ calibration
    assert np.allclose(rows.T @ rows, expected, rtol=1e-4, atol=1e-3)


def test_more_tokens_beside_a_sketch_are_trusted_less_each_and_without_one_as_ever():
    sketch = evidence(channels(20)).rows / 20**0.5  # counts as one token
    strengths = []
    for tokens in (30, 2 * WORTH + 60):
        assert evidence(channels(tokens)).strength == 0.3
        strengths.append(float(evidence(channels(tokens), sketch).strength))
    assert strengths == pytest.approx([0.3, 0.3 * (960 / 330) ** 0.5], rel=1e-3)


def at_right_angles(rows):
    """Return a sketch's rows: at right angles, as those of condensed are."""
    turned, _ = np.linalg.qr(RNG.normal(size=(F, rows)))
    return mx.array((turned * RNG.uniform(0.02, 0.1, rows)).T.astype(np.float32))


@pytest.mark.parametrize("sketched", [0, 5])
@pytest.mark.parametrize("tokens", [4, 30])
def test_worth_is_what_the_ridge_of_all_others_leaves_of_a_channel(tokens, sketched):
    sketch = at_right_angles(sketched) if sketched else None
    known = evidence(channels(tokens), sketch)
    rows = np.array(known.rows, dtype=np.float64)
    penalty, found = float(known.strength) * 0.8, np.array(worth(known))
    for channel, value in enumerate(found):
        mine, others = rows[:, channel], np.delete(rows, channel, axis=1)
        gram = others.T @ others + penalty * np.eye(F - 1)
        weights = np.linalg.solve(gram, others.T @ mine)
        error = ((mine - others @ weights) ** 2).sum()
        expected = error + penalty * (1 + (weights**2).sum())
        assert value == pytest.approx(expected, rel=1e-3)


def test_merit_is_worth_of_few_channels_and_energy_of_many():
    known = evidence(channels(9))
    energy, lost = np.array(mx.square(known.rows).sum(axis=0)), np.array(worth(known))
    few, many = (np.array(merit(known, keep)) for keep in (1e-3, 1.0))
    np.testing.assert_allclose(few, lost - 0.3 * 0.8, atol=1e-5)
    np.testing.assert_allclose(many, lost - 0.3 * 0.8 + 4 * energy, atol=1e-5)


def test_of_two_channels_that_say_the_same_neither_is_worth_much():
    h = np.array(channels(40))
    h[:, 8] *= 2  # the most energy
    h[:, 3] = h[:, 8]
    found = np.array(worth(evidence(mx.array(h))))
    energy = (unit(h) ** 2).sum(axis=0)
    alone = [channel for channel in range(F) if channel not in (3, 8)]
    assert energy[3] > energy[alone].max()
    assert max(found[3], found[8]) < 0.5 * found[alone].min()


def test_nothing_changes_where_nothing_is_dropped_or_read():
    everything = mx.arange(F)
    assert mx.array_equal(
        compensated_down(DOWN, evidence(channels(5)), everything), DOWN
    )
    nothing = compensated_down(DOWN, evidence(mx.zeros((0, F))), KEPT)
    assert mx.array_equal(nothing, DOWN[:, KEPT])


def test_an_infinitely_cautious_correction_is_none():
    known = evidence(channels(9))
    cautious = compensated_down(DOWN, known._replace(strength=1e9), KEPT)
    assert mx.allclose(cautious, DOWN[:, KEPT], atol=1e-5)
    half = compensated_down(DOWN.astype(mx.float16), known, KEPT)
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


@pytest.mark.parametrize("selector", ["activation", "blend"])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_sweep_gives_what_selecting_and_then_compensating_gives(
    tiny_folder, monkeypatch, steps, selector
):
    model, _ = load(tiny_folder)
    text = list(range(40, 90))
    monkeypatch.setattr(stock, "PREFILL_STEP", -(-len(text) // steps))
    options = {"keep": 0.5, "selector": selector}
    selection, compact, cache = swept(model, text, **options, compensate=True)
    assert selection.text == tuple(text) and selection.compensates
    # By hand, of the last step's tokens.
    last = len(stock.steps_of(text)[-1])
    dense = model.dense()
    seen = read_channels(dense, plan_of(dense), text)
    pairs = zip(seen, model.sketch(), strict=True)
    known = [evidence(h[-last:], rows) for h, rows in pairs]
    chosen = model.select(text, **options)
    if selector == "blend":  # chooses what the others cannot make up for
        lost = [merit(one, 0.5) for one in known]
        chosen = select(mx.stack(lost), selection.sizes)
    assert selection.mask_id == chosen.mask_id
    chosen = replace(chosen, fingerprint=selection.fingerprint)
    again = weights(model.compact(chosen.compensated(text, "the instruction")))
    assert all(mx.array_equal(w, again[n]) for n, w in weights(compact).items())
    for number, (ffn, index) in enumerate(
        zip(plan_of(dense).modules(dense), chosen.indices, strict=True)
    ):
        down = compensated_down(ffn.down_proj.weight, known[number], index)
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
    monkeypatch.setattr(compensation, "TOKENS", 30)
    monkeypatch.setattr(compensation, "TOKENS_ALONE", 20)
    index = mx.arange(0, 64, 2)
    ffn = model.plan.modules(model.dense())[0]
    seen = read_channels(model.dense(), model.plan, text)
    known = evidence(seen[0])
    assert known.tokens <= 20
    assert mx.array_equal(known.rows, evidence(seen[0][::3]).rows)
    beside = evidence(seen[0], mx.ones((2, 64)))
    again = evidence(seen[0][::2], mx.ones((2, 64)))
    assert mx.array_equal(beside.rows, again.rows)
    assert len(beside.rows) == beside.tokens + 2 <= 32
    expected = compensated_down(ffn.down_proj.weight, known, index)
    cut_compensated(ffn, model.plan.layers[0], index, known)
    assert mx.allclose(ffn.down_proj.weight, expected)


def test_a_mask_of_version_0_1_is_made_up_for_by_its_text_alone(tiny_folder):
    model, _ = load(tiny_folder)
    text, index = list(range(40, 90)), mx.arange(0, 64, 2)
    chosen = model.select(text, keep=0.5, selector="random", allocation="uniform")
    old = replace(chosen, indices=(index,) * 3).compensated(text, sketch=None)
    found = model.plan.modules(model.compact(old))
    seen = read_channels(model.dense(), model.plan, text)
    for h, ffn, dense in zip(
        seen, found, model.plan.modules(model.dense()), strict=True
    ):
        down = compensated_down(dense.down_proj.weight, evidence(h), index)
        assert mx.allclose(ffn.down_proj.weight, down, atol=1e-4)
    assert not (tiny_folder / "prior.safetensors").exists()  # nothing else was read


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
    assert not without["selection"]["compensated"]
    channels = {one["selection"]["mask_id"] for one in (found, again, without)}
    assert len(channels) == 1 and without["text"] != found["text"]
    # Others are chosen where nothing is to be made up for.
    assert plain["selection"]["mask_id"] not in channels


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
