import mlx.core as mx
import numpy as np
import pytest

from ifp_mlx.compensation import compensated_down

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
