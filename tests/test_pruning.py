import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import FAMILIES, relative_error, tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from ifp_mlx.masks import Selection, layer_sizes, select
from ifp_mlx.pruning import (
    MaskedFFN,
    dense_shape,
    ffn_layers,
    fill_model,
    group_size,
    mask_model,
    set_masks,
    slice_ffn,
    slice_model,
)

TOKENS = mx.array([[5, 9, 77, 200, 13], [1, 1, 2, 3, 250]])


@st.composite
def selections(draw, channels, layers=3):
    """Draw random scores, widths (equal or not), gates and granularity."""
    seed = draw(st.integers(0, 10**6))
    granularity = draw(st.sampled_from([1, 2, 4, 8]))
    blocks = st.integers(1, channels // granularity)
    if draw(st.booleans()):
        sizes = [draw(blocks) * granularity] * layers
    else:
        sizes = [draw(blocks) * granularity for _ in range(layers)]
    scores = np.random.default_rng(seed).normal(size=(layers, channels))
    return select(
        mx.array(scores.astype(np.float32)),
        sizes,
        granularity=granularity,
        gates=draw(st.sampled_from(["binary", "soft"])),
    )


def masked_logits(model, selection, tokens=TOKENS):
    set_masks(mask_model(model), selection.mask())
    return model(tokens)


def sliced_logits(model, selection, tokens=TOKENS):
    slice_model(model, selection)
    return model(tokens)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_sliced_model_equals_masked_model(family, data):
    channels = data.draw(st.sampled_from([8, 24, 64]), label="channels")
    width = data.draw(st.sampled_from([32, 64]), label="width")
    seed = data.draw(st.integers(0, 99), label="seed")
    selection = data.draw(selections(channels), label="selection")
    shape = {"intermediate_size": channels, "hidden_size": width}
    masked = masked_logits(tiny_model(family, seed, **shape), selection)
    sliced = sliced_logits(tiny_model(family, seed, **shape), selection)
    assert relative_error(sliced, masked) <= 1e-5


def test_sliced_biases_equal_masked_biases():
    changes = {"mlp_bias": True}
    selection = select(mx.array(np.random.default_rng(0).random((3, 64))), [64, 8, 16])
    masked = masked_logits(tiny_model("llama", **changes), selection)
    sliced = sliced_logits(tiny_model("llama", **changes), selection)
    assert relative_error(sliced, masked) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_changes_nothing(family):
    everything = select(mx.zeros((3, 64)), [64] * 3)
    dense = tiny_model(family)(TOKENS)
    assert mx.array_equal(sliced_logits(tiny_model(family), everything), dense)
    assert mx.array_equal(masked_logits(tiny_model(family), everything), dense)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_uniform_slice_is_a_stock_model_of_the_smaller_size(family):
    model = tiny_model(family)
    selection = select(mx.array(np.random.default_rng(1).random((3, 64))), [24] * 3)
    slice_model(model, selection)
    small = tiny_model(family, intermediate_size=24)
    shapes = {name: w.shape for name, w in tree_flatten(small.parameters())}
    assert {n: w.shape for n, w in tree_flatten(model.parameters())} == shapes
    assert type(model) is type(small) and model.args.intermediate_size == 24


def test_masks_of_a_batch_or_of_every_token_are_rows_of_single_masks():
    masks = [
        select(mx.array(np.random.default_rng(i).random((3, 64))), [20] * 3).mask()
        for i in range(2)
    ]
    model = tiny_model("llama")
    masked = mask_model(model)
    assert all(isinstance(m, MaskedFFN) for m in masked)
    alone = []
    for row, mask in enumerate(masks):
        set_masks(masked, mask)
        alone.append(model(TOKENS[row : row + 1]))
    per_row = mx.stack(masks, axis=1)[:, :, None]
    for rows in (per_row, mx.repeat(per_row, TOKENS.shape[1], axis=2)):
        set_masks(masked, rows)
        assert relative_error(model(TOKENS), mx.concatenate(alone)) <= 1e-5


def test_masking_keeps_parameter_names_and_gradients_reach_the_mask():
    model = tiny_model("qwen3")
    names = {name for name, _ in tree_flatten(model.parameters())}
    masked = mask_model(model)
    assert {name for name, _ in tree_flatten(model.parameters())} == names

    def loss(masks):
        set_masks(masked, masks)
        return mx.square(model(TOKENS)).mean()

    gradient = mx.grad(loss)(mx.ones((3, 64)))
    assert gradient.shape == (3, 64) and float(mx.abs(gradient).min()) > 0


def test_a_masked_model_can_be_sliced():
    selection = select(mx.array(np.random.default_rng(2).random((3, 64))), [16] * 3)
    model = tiny_model("llama")
    masked = masked_logits(model, selection)
    slice_model(model, selection)
    set_masks([block.mlp for block in model.layers], mx.ones((3, 1)))
    assert relative_error(model(TOKENS), masked) <= 1e-5


@pytest.mark.parametrize(
    ("bits", "group", "mode"),
    [(b, g, "affine") for b in (2, 3, 4, 5, 6, 8) for g in (32, 64)]
    + [(4, 32, "mxfp4"), (8, 32, "mxfp8"), (4, 16, "nvfp4")],
)
def test_a_quantised_model_is_sliced_by_whole_groups_without_loss(bits, group, mode):
    def quantised():
        model = tiny_model("llama", intermediate_size=256, hidden_size=64, head_dim=16)
        nn.quantize(model, group, bits, mode=mode)
        return model

    assert group_size(quantised()) == group
    scores = mx.array(np.random.default_rng(3).random((3, 256)))
    selection = select(scores, [256, 128, 64], granularity=group)
    masked = masked_logits(quantised(), selection)
    assert relative_error(sliced_logits(quantised(), selection), masked) <= 1e-5


def test_soft_gates_fold_into_affine_quantisation_and_are_refused_elsewhere():
    def quantised(mode):
        model = tiny_model("llama", intermediate_size=64, hidden_size=64)
        nn.quantize(model, 32, 4, mode=mode)
        return model

    scores = mx.array(np.random.default_rng(4).normal(size=(3, 64)).astype(np.float32))
    selection = select(scores, [32] * 3, granularity=32, gates="soft")
    masked = masked_logits(quantised("affine"), selection)
    sliced = sliced_logits(quantised("affine"), selection)
    assert relative_error(sliced, masked) <= 1e-5
    with pytest.raises(ValueError, match="cannot be folded into mxfp4 weights"):
        slice_model(quantised("mxfp4"), selection)


def test_a_cut_through_a_quantisation_group_is_refused():
    model = tiny_model("llama", intermediate_size=64, hidden_size=64)
    nn.quantize(model, 32, 4)
    for index in (mx.arange(16), mx.arange(16, 48), mx.arange(0, 64, 2)):
        with pytest.raises(ValueError, match="groups of 32 channels.*granularity 32"):
            slice_model(model, Selection((index,) * 3, None, 64))


def test_progress_sees_every_layer():
    seen = []

    def progress(parts):
        for part in parts:
            seen.append(part)
            yield part

    selection = select(mx.zeros((3, 64)), layer_sizes(8, 3, 64, "uniform"))

    def fill(ffn, layer, index):
        slice_ffn(ffn, index)

    fill_model(tiny_model("llama"), fill, selection, progress=progress)
    assert len(seen) == 3


def test_a_model_without_gated_ffn_is_refused_by_its_class():
    from mlx_lm.models import gpt2, olmoe

    gpt = gpt2.Model(
        gpt2.ModelArgs(
            model_type="gpt2",
            n_ctx=8,
            n_embd=8,
            n_head=2,
            n_layer=2,
            n_positions=8,
            layer_norm_epsilon=1e-5,
            vocab_size=8,
        )
    )
    with pytest.raises(ValueError, match=r"gpt2.Model has no plain gated FFN.*llama"):
        ffn_layers(gpt)
    assert olmoe  # a mixture of experts has no single FFN per layer
    moe = olmoe.Model(
        olmoe.ModelArgs(
            model_type="olmoe",
            hidden_size=8,
            num_hidden_layers=1,
            intermediate_size=8,
            num_attention_heads=2,
            rms_norm_eps=1e-5,
            vocab_size=8,
            num_experts=2,
            num_experts_per_tok=1,
        )
    )
    with pytest.raises(ValueError, match="olmoe.Model .* layer 0 has only"):
        ffn_layers(moe)


def test_an_ffn_that_mixes_its_channels_is_refused():
    class Mixing(nn.Module):
        def __init__(self, ffn):
            super().__init__()
            for name, child in ffn.children().items():
                self[name] = child

        def __call__(self, x):
            h = nn.silu(self.gate_proj(x)) * self.up_proj(x)
            return self.down_proj(h - h.mean(axis=-1, keepdims=True))

    model = tiny_model("llama")
    for block in model.layers:
        block.mlp = Mixing(block.mlp)
    with pytest.raises(ValueError, match="Mixing mixes its channels"):
        ffn_layers(model)


def test_layers_of_different_widths_have_no_dense_shape():
    model = tiny_model("llama")
    assert dense_shape(model) == (3, 64)
    slice_model(model, select(mx.zeros((3, 64)), [64, 8, 8]))
    with pytest.raises(ValueError, match=r"widths \[8, 64\]"):
        dense_shape(model)
