"""A few rows stand for a long text's channels: nearly the same second moment."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import write_family, write_folder

from ifp_mlx import load
from ifp_mlx.model import sweep
from ifp_mlx.slicing import sketch
from ifp_mlx.slicing.compensation import read_channels
from ifp_mlx.slicing.sketch import condensed, unit_rows

RNG = np.random.default_rng(0)
TOKENS, F = 90, 40
# A few directions are strong, and the others fade, as a layer's channels do.
STRENGTHS = 0.8 ** np.arange(F)
TURN = np.linalg.qr(RNG.normal(size=(F, F)))[0]
H = unit_rows(mx.array(RNG.normal(size=(TOKENS, F)) * STRENGTHS @ TURN))


def moment(rows, tokens=1):
    rows = np.array(rows, dtype=np.float64)
    return rows.T @ rows / tokens


def test_tokens_count_alike_and_none_without_channels_divides_by_zero():
    rows = unit_rows(mx.array([[3.0, 4.0], [0.0, 0.0], [0.0, 1e3]], mx.float16))
    assert rows.dtype == mx.float32
    assert np.allclose(np.array(rows), [[0.6, 0.8], [0, 0], [0, 1]])


def test_all_directions_together_are_the_second_moment_of_one_token():
    found = condensed([H])
    assert found.shape == (F, F) and found.dtype == mx.float32
    assert np.allclose(moment(found), moment(H, TOKENS), atol=1e-5)
    assert np.trace(moment(found)) == pytest.approx(1, abs=1e-4), "it counts as one"


@pytest.mark.parametrize("rank", [4, 12])
def test_few_rows_lose_hardly_more_than_the_best_that_could_be_kept(rank, monkeypatch):
    monkeypatch.setattr(sketch, "SPARE", 4)  # or so few channels would be found whole
    found = condensed([H], rank)
    assert found.shape == (rank, F)
    values, sides = np.linalg.eigh(moment(H, TOKENS))
    best = (sides[:, -rank:] * values[-rank:]) @ sides[:, -rank:].T
    lost = [np.linalg.norm(moment(H, TOKENS) - m) for m in (moment(found), best)]
    assert lost[0] <= 1.01 * lost[1]
    lengths = np.linalg.norm(np.array(found), axis=1)
    assert (np.diff(lengths) <= 1e-6).all(), "the strongest comes first"
    assert np.allclose(lengths**2, values[::-1][:rank], rtol=0.01)


def test_it_is_the_same_in_parts_and_to_the_bit_a_second_time():
    parts = [H[:7].astype(mx.float16), H[7:8], H[8:]]
    whole = moment(condensed([H]))
    assert np.allclose(moment(condensed(parts)), whole, atol=1e-3)
    mx.random.seed(7)  # it draws from no state that others change
    assert mx.array_equal(condensed(parts), condensed(parts))


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_text_shorter_than_its_sketch_has_a_row_for_each_token(tokens):
    found = condensed([H[:tokens]])
    assert found.shape == (tokens, F)
    assert np.allclose(moment(found), moment(H[:tokens], tokens), atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gemma2"])
def test_a_calibration_text_is_scored_and_condensed_in_one_pass(family, tmp_path):
    model, _ = load(write_folder(tmp_path / "m", family))
    texts = [[5, 9, 77], [200, 13, 40, 41, 42, 43, 44], list(range(30, 70))]
    scores, found = sweep.calibration(model.source, texts)
    expected = sweep.scores(model.source, [(text,) for text in texts])
    assert mx.allclose(scores, expected, rtol=1e-4, atol=1e-6)
    dense, count = model.dense(), sum(map(len, texts))  # padding is no token
    seen = [read_channels(dense, model.plan, text) for text in texts]
    for layer, rows in enumerate(found):
        together = unit_rows(mx.concatenate([text[layer] for text in seen]))
        assert np.allclose(moment(rows), moment(together, count), atol=1e-3)


def prior_file(model):
    return mx.load(str(model.path / "prior.safetensors"))


def test_it_is_kept_with_the_prior_and_made_once(tiny_folder, monkeypatch):
    model, _ = load(tiny_folder)
    made = model.sketch()
    assert len(made) == 3 and {rows.dtype for rows in made} == {mx.float16}
    assert {*prior_file(model)} == {"scores", *(f"sketch.{n}" for n in range(3))}
    monkeypatch.setattr(sweep, "calibration", None)
    again = load(tiny_folder)[0].sketch()
    assert all(mx.array_equal(a, b) for a, b in zip(made, again, strict=True))


def test_a_prior_of_an_earlier_version_gets_one(tiny_folder):
    model, _ = load(tiny_folder)
    scores = model.compute_prior()
    mx.save_safetensors(str(tiny_folder / "prior.safetensors"), {"scores": scores})
    model, _ = load(tiny_folder)
    assert mx.array_equal(model.prior, scores) and len(prior_file(model)) == 1
    assert len(model.sketch()) == 3 and len(prior_file(model)) == 4
    assert mx.array_equal(load(tiny_folder)[0].prior, scores)


def test_experts_have_a_prior_without_one(tmp_path):
    model, _ = load(write_family(tmp_path / "m", "qwen3_moe"))
    model.compute_prior()
    assert {*prior_file(model)} == {"scores"}
