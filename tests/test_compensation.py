import mlx.core as mx
import numpy as np
import pytest
from conftest import run_command, tiny_model

from ifp_mlx import load
from ifp_mlx.compact import main as compact
from ifp_mlx.compensation import compensated_down, read_channels
from ifp_mlx.generate import main as generate

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


def test_a_compact_model_comes_closer_to_the_dense_one_on_its_text(tiny_folder):
    model, _ = load(tiny_folder)
    text = list(range(40, 90))
    selection = model.select(text, keep=0.5, allocation="uniform")
    dense = model.dense()(mx.array([text]))
    error = [
        mx.square(model.compact(selection, compensate=by)(mx.array([text])) - dense)
        for by in (None, text)
    ]
    assert error[1].mean() < 0.7 * error[0].mean()
    whole = model.select(text, keep=1.0)
    same = model.compact(whole, compensate=text)(mx.array([text]))
    assert mx.allclose(same, dense, atol=1e-5)


def test_reading_leaves_the_model_as_it_was():
    model = tiny_model("qwen3")
    before = [type(layer.mlp) for layer in model.layers]
    channels = read_channels(model, [5, 6, 7])
    assert [h.shape for h in channels] == [(3, 64)] * 3
    assert [type(layer.mlp) for layer in model.layers] == before


def test_the_commands_compensate_and_say_so(tiny_folder, tmp_path, capsys):
    given = ["--model", tiny_folder, "--keep", "0.5", "--compensate"]
    status, plain, _ = run_command(
        generate, capsys, *given[:-1], "--prompt", "hello", "-m", "8"
    )
    status, text, _ = run_command(
        generate, capsys, *given, "--prompt", "hello", "-m", 8
    )
    assert status == 0 and text != plain
    out = tmp_path / "out"
    made = [*given, "--instruction", "hello", "--mlx-path", out]
    status, _, _ = run_command(compact, capsys, *made)
    assert (
        status == 0 and "tokens of the instruction" in (out / "README.md").read_text()
    )


def test_what_cannot_be_compensated_is_refused(tiny_folder, tmp_path, capsys):
    from mlx_lm import convert

    model, _ = load(tiny_folder)
    mask = tmp_path / "mask.safetensors"
    model.select("hello", keep=0.5, allocation="uniform").save(mask)
    given = ["--model", tiny_folder, "--mask-file", mask, "--mlx-path", tmp_path / "o"]
    status, _, err = run_command(compact, capsys, *given, "--compensate")
    assert status == 2 and "needs the text of an instruction" in err
    small = tmp_path / "small"
    convert(str(tiny_folder), str(small), quantize=True, q_group_size=32)
    capsys.readouterr()
    given = ["--model", small, "--prompt", "hello", "--keep", "0.5", "--compensate"]
    status, _, err = run_command(generate, capsys, *given)
    assert status == 2 and "is quantised here" in err
