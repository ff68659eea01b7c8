import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import (
    FAMILIES,
    families,
    family_units,
    randomised,
    relative_error,
    tiny_model,
)

from ifp_mlx.selection.calibration import calibration_chats
from ifp_mlx.selection.scores import blend_scores, random_scores
from ifp_mlx.slicing import stock
from ifp_mlx.slicing.plan import plan_of
from ifp_mlx.slicing.reading import scores as use_scores

TOKENS = [5, 9, 77, 200, 13, 40, 41]


def channels_of_layer_0(model, tokens):
    """Compute act(gate) * up of the first layer by hand, for a llama."""
    block = model.layers[0]
    x = model.model.embed_tokens(mx.array([tokens]))
    mask = nn.MultiHeadAttention.create_additive_causal_mask(len(tokens))
    h = x + block.self_attn(block.input_layernorm(x), mask=mask.astype(x.dtype))
    y = block.post_attention_layernorm(h)
    return (nn.silu(block.mlp.gate_proj(y)) * block.mlp.up_proj(y))[0]


def test_activation_is_griffins_statistic_over_all_tokens():
    model = tiny_model("llama")
    h = np.array(channels_of_layer_0(model, TOKENS))
    unit = h / np.linalg.norm(h, axis=1, keepdims=True)
    expected = np.linalg.norm(unit, axis=0)
    scores = use_scores(model, plan_of(model), [(TOKENS,)])
    assert scores.shape == (3, 64) and scores.dtype == mx.float32
    np.testing.assert_allclose(np.array(scores[0]), expected, rtol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_recording_leaves_the_model_as_it_was(family):
    model = tiny_model(family)
    before = [ffn for ffn in plan_of(model).modules(model)]
    logits = model(mx.array([TOKENS]))
    use_scores(model, plan_of(model), [(TOKENS,)])
    assert all(
        a is b for a, b in zip(before, plan_of(model).modules(model), strict=True)
    )
    assert mx.array_equal(model(mx.array([TOKENS])), logits)


def test_the_model_is_restored_when_a_run_breaks(monkeypatch):
    model = tiny_model("llama")
    plan = plan_of(model)
    before = plan.modules(model)
    monkeypatch.setattr(mx, "eval", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        use_scores(model, plan, [(TOKENS,)])
    assert plan.modules(model) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_long_texts_are_read_in_steps_with_the_same_result(family, monkeypatch):
    model, tokens = tiny_model(family), list(range(40))
    whole = np.array(use_scores(model, plan_of(model), [(tokens,)]))
    monkeypatch.setattr(stock, "PREFILL_STEP", 7)
    np.testing.assert_allclose(
        np.array(use_scores(model, plan_of(model), [(tokens,)])), whole, rtol=1e-4
    )


def test_the_prior_counts_every_token_of_every_text_alike():
    model, texts = tiny_model("llama"), [TOKENS, [3, 4], [250]]
    energies = [
        np.array(use_scores(model, plan_of(model), [(text,)])) ** 2 for text in texts
    ]
    prior = np.array(use_scores(model, plan_of(model), [(text,) for text in texts]))
    np.testing.assert_allclose(prior, np.sqrt(sum(energies)), rtol=1e-5)


def test_blend_is_the_mean_of_the_ranks():
    local = mx.array([[0.1, 9.0, 0.5, 0.2]])
    prior = mx.array([[5.0, 7.0, 6.0, 8.0]])
    blended = np.array(blend_scores(local, prior))[0]
    np.testing.assert_allclose(blended, [0.0, 2.5 / 3, 1.5 / 3, 2 / 3], rtol=1e-6)
    assert np.array_equal(
        np.array(blend_scores(local, prior, 0.0)).argsort(), [[0, 3, 2, 1]]
    )


def test_blended_experts_have_the_mean_of_their_shares():
    local, prior = mx.array([[3.0, 0, 0, 1]]), mx.array([[1.0, 2, 2, 1]])
    blended = np.array(blend_scores(local, prior, unit="expert"))[0] ** 2
    np.testing.assert_allclose(blended, [0.5, 0.2, 0.2, 0.1], rtol=1e-6)


def test_random_scores_depend_on_the_seed_alone():
    assert mx.array_equal(random_scores(2, 8, 1), random_scores(2, 8, 1))
    assert not mx.array_equal(random_scores(2, 8, 1), random_scores(2, 8, 2))


def test_an_instruction_without_tokens_is_refused():
    with pytest.raises(ValueError, match="no tokens"):
        use_scores(tiny_model("llama"), plan_of(tiny_model("llama")), [([],)])


def test_the_calibration_text_ships_with_the_package():
    chats = calibration_chats()
    words = sum(len(m["content"].split()) for chat in chats for m in chat)
    assert len(chats) >= 30 and words >= 4000
    assert all(chat[-1]["role"] == "assistant" for chat in chats)


@pytest.mark.parametrize("name", family_units())
def test_logits_of_some_tokens_are_those_of_all_in_every_type(name):
    model = randomised(stock.build(families()[name]))
    expected = model(mx.array([TOKENS]))
    with stock.logits_at(model, mx.array([1, 4])) as some:
        found = some(model(mx.array([TOKENS])))
    assert relative_error(found, expected[:, [1, 4]]) <= 1e-6
    assert mx.array_equal(model(mx.array([TOKENS])), expected)
