import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import FAMILIES, families, randomised, relative_error, tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from ifp_mlx.selection.masks import Selection
from ifp_mlx.selection.top_k import select
from ifp_mlx.selection.widths import layer_sizes
from ifp_mlx.slicing.masked import is_masked, mask_model, masked_inlets, set_masks
from ifp_mlx.slicing.plan import plan_of
from ifp_mlx.slicing.shapes import Slice, Unsliceable
from ifp_mlx.slicing.sliced import (
    count_units,
    cut,
    cuts_groups,
    elements,
    fill_model,
    group_size,
    group_sizes,
    pad,
    slice_model,
    twin,
)
from ifp_mlx.slicing.stock import build

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
    set_masks(mask_model(model, plan_of(model)), selection.mask())
    return model(tokens)


def sliced_logits(model, selection, tokens=TOKENS):
    slice_model(model, plan_of(model), selection)
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
    slice_model(model, plan_of(model), selection)
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
    masked = mask_model(model, plan_of(model))
    assert all(map(is_masked, masked)) and all(m.channels == 64 for m in masked)
    assert masked_inlets(model) == masked
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
    masked = mask_model(model, plan_of(model))
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
    slice_model(model, plan_of(tiny_model("llama")), selection)
    set_masks(masked_inlets(model), mx.ones((3, 1)))
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

    model = quantised()
    assert group_size(model, plan_of(model)) == group
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
        slice_model(quantised("mxfp4"), plan_of(quantised("mxfp4")), selection)


AFFINE = [(b, g, "affine") for b in (2, 3, 4, 5, 6, 8) for g in (32, 64, 128)]
OTHER_MODES = [(4, 32, "mxfp4"), (8, 32, "mxfp8"), (4, 16, "nvfp4")]


def random_ffn(seed, channels, width=128):
    ffn = tiny_model("llama").layers[0].mlp
    rng = np.random.default_rng(seed)
    for name in ("gate_proj", "up_proj", "down_proj"):
        shape = (width, channels) if name == "down_proj" else (channels, width)
        # Groups of very different sizes, or a mix-up of their scales would not show.
        values = rng.normal(size=shape) * np.exp(rng.normal(size=(shape[0], 1)))
        ffn[name].weight = mx.array(values.astype(np.float32))
    return ffn


# Of the only layer of tiny llamas, whatever they are quantised to.
LAYER = plan_of(tiny_model("llama")).layers[0]


def parameters_of(module):
    return dict(tree_flatten(module.parameters()))


def assert_bit_identical(found, expected):
    found, expected = parameters_of(found), parameters_of(expected)
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert weight.dtype == expected[name].dtype
        assert mx.array_equal(weight, expected[name]), name


@pytest.mark.parametrize(("bits", "group", "mode"), AFFINE + OTHER_MODES)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_slicing_whole_groups_and_quantising_commute_bit_for_bit(
    bits, group, mode, data
):
    groups = data.draw(st.integers(2, 6), label="groups")
    kept = data.draw(
        st.lists(st.integers(0, groups - 1), min_size=1, max_size=groups - 1, unique=1),
        label="kept groups",
    )
    blocks = np.array(sorted(kept))[:, None] * group + np.arange(group)
    index = mx.array(blocks.ravel().astype(np.int32))
    dtype = data.draw(st.sampled_from([mx.float32, mx.bfloat16]), label="dtype")
    seed = data.draw(st.integers(0, 99), label="seed")
    ffns = [random_ffn(seed, groups * group) for _ in range(2)]
    for ffn in ffns:
        ffn.set_dtype(dtype)
    nn.quantize(ffns[0], group, bits, mode=mode)
    cut(ffns[0], LAYER, index, groups * group)
    cut(ffns[1], LAYER, index, groups * group)
    nn.quantize(ffns[1], group, bits, mode=mode)
    assert_bit_identical(*ffns)


@pytest.mark.parametrize(("bits", "group", "mode"), AFFINE[-3:] + OTHER_MODES)
def test_a_selection_that_cuts_groups_quantises_down_proj_again(bits, group, mode):
    ffn = random_ffn(0, 2 * group)
    nn.quantize(ffn, group, bits, mode=mode)
    index = mx.arange(0, 2 * group, 2)
    assert cuts_groups(index, group, 2 * group)
    rows = [ffn.gate_proj.weight[index], ffn.up_proj.scales[index]]
    how = {"group_size": group, "bits": bits, "mode": mode}
    down = ffn.down_proj
    whole = mx.dequantize(down.weight, down.scales, down.get("biases"), **how)
    expected = mx.quantize(whole[:, index], **how)
    cut(ffn, LAYER, index, 2 * group)
    assert mx.array_equal(ffn.gate_proj.weight, rows[0])
    assert mx.array_equal(ffn.up_proj.scales, rows[1])
    found = [down[name] for name in ("weight", "scales", "biases") if name in down]
    assert len(found) == len(expected)
    assert all(map(mx.array_equal, found, expected))


def test_a_cut_down_proj_can_stay_dequantised():
    ffn = random_ffn(0, 64)
    nn.quantize(ffn, 32, 4)
    down, index = ffn.down_proj, mx.arange(3, 8)
    whole = mx.dequantize(down.weight, down.scales, down.biases, 32, 4)
    cut(ffn, LAYER, index, 64, requantise=False)
    assert type(ffn.down_proj) is nn.Linear
    assert mx.array_equal(ffn.down_proj.weight, whole[:, index])


def test_channels_that_fill_no_whole_group_are_refused_with_the_nearest_number():
    model = tiny_model("llama", intermediate_size=128, hidden_size=64)
    nn.quantize(model, 32, 4)
    for size, valid in ((16, "32"), (40, "32 or 64"), (100, "96 or 128")):
        with pytest.raises(ValueError, match=f"target_size={size} .*; use {valid}."):
            slice_model(
                model, plan_of(model), Selection((mx.arange(size),) * 3, None, 128)
            )


def test_only_what_takes_a_group_apart_cuts_it():
    whole = mx.concatenate([mx.arange(32, 64), mx.arange(96, 128)])
    assert not cuts_groups(whole, 32, 128) and cuts_groups(whole, 64, 128)
    assert not cuts_groups(mx.array([3, 5, 9]), 1, 128)
    assert cuts_groups(mx.arange(16, 48), 32, 128)
    assert not cuts_groups(mx.arange(100), 64, 100)  # everything is kept


def test_layers_may_be_quantised_in_groups_of_their_own():
    model = tiny_model("llama", intermediate_size=256, hidden_size=128)
    groups = {0: 32, 1: 128}

    def params(path, module):
        layer = int(path.split(".")[2]) if ".layers." in path else -1
        if layer in groups and path.endswith("_proj") and ".mlp." in path:
            return {"group_size": groups[layer], "bits": 4}
        return False

    nn.quantize(model, class_predicate=params)
    plan = plan_of(model)
    assert group_sizes(model, plan) == [32, 128, 1] and group_size(model, plan) == 128


def test_progress_sees_every_layer():
    seen = []

    def progress(parts):
        for part in parts:
            seen.append(part)
            yield part

    selection = select(mx.zeros((3, 64)), layer_sizes(8, 3, 64, "uniform"))

    model = tiny_model("llama")
    plan = plan_of(model)
    layers = zip(plan.modules(model), plan.layers, selection.indices, strict=True)
    fills = (cut(module, layer, index, 64) for module, layer, index in layers)
    fill_model(model, plan, fills, selection, progress=progress)
    assert len(seen) == 3


def test_a_model_without_an_ffn_is_refused_by_its_class():
    from mlx_lm.models import mamba2

    config = families()["mamba2"]
    model = mamba2.Model(mamba2.ModelArgs.from_dict(config))
    with pytest.raises(Unsliceable, match=r"mamba2.Model \(model type mamba2\) cannot"):
        plan_of(model, config)


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
        plan_of(model)


def test_layers_of_different_widths_are_refused_with_the_widths():
    config = families()["gemma4_text, double wide"]
    with pytest.raises(Unsliceable, match=r"widths \[64, 128\]"):
        plan_of(build(config), config)


def test_units_of_a_fused_axis_lie_in_blocks_or_side_by_side():
    index = mx.array([0, 2])
    blocks = elements(Slice("", "weight", 0, 2), index, 3)
    assert blocks.tolist() == [0, 2, 3, 5]
    side_by_side = elements(Slice("", "weight", 0, 2, interleaved=True), index, 3)
    assert side_by_side.tolist() == [0, 1, 4, 5]


@pytest.mark.parametrize("name", ["llama", "phi3", "starcoder2"])
def test_padding_changes_nothing_but_the_width(name):
    config = families()[name]
    model = randomised(build(config))
    plan, expected = plan_of(model, config), model(TOKENS)
    for module, layer in zip(plan.modules(model), plan.layers, strict=True):
        pad(module, layer, 96)
        assert count_units(module, layer) == 96
    assert relative_error(model(TOKENS), expected) <= 1e-5


def test_what_is_set_in_a_twin_does_not_reach_the_other():
    model = tiny_model("llama")
    other = twin(model)
    assert other.model.norm.weight is model.model.norm.weight
    slice_model(other, plan_of(model), select(mx.zeros((3, 64)), [8] * 3))
    assert model.layers[0].mlp.gate_proj.weight.shape == (64, 32)
    assert model.args.intermediate_size == 64 and other.args.intermediate_size == 8
