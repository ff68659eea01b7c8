"""MLX's quantised values in Core ML's forms."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import tiny_model

pytest.importorskip("coremltools")
from coremltools.converters.mil.mil.ops.defs.iOS18.compression import (
    constexpr_blockwise_shift_scale,
    constexpr_lut_to_dense,
)

from ifp_mlx.convert.coreml.weights import (
    Quantised,
    array,
    lookup_tables,
    quantise,
    shift_scale,
)
from ifp_mlx.slicing.plan import plan_of

pytestmark = pytest.mark.coreml


def quantised(bits: int, group: int = 32, dtype=mx.float16, weight=None):
    """Return a quantised 24 x 128 module and the values MLX reads from it."""
    rng = np.random.default_rng(bits)
    if weight is None:
        weight = rng.normal(0, 0.1, (24, 128)).astype(np.float32)
    linear = nn.Linear(128, 24, bias=False)
    linear.weight = mx.array(weight).astype(dtype)
    module = linear.to_quantized(group, bits)
    values = mx.dequantize(
        module.weight,
        module.scales.astype(mx.float32),
        module.biases.astype(mx.float32),
        group,
        bits,
    )
    return module, np.array(values)


def restored(data, scale, offset) -> np.ndarray:
    """Evaluate Core ML's formula in float32, by coremltools' own code."""
    parts = [np.asarray(part).astype(np.float32) for part in (data, scale, offset)]
    return constexpr_blockwise_shift_scale.decompress(*parts)


def error_in_steps(found: np.ndarray, expected: np.ndarray, w: Quantised) -> float:
    step = np.abs(np.repeat(w.scales, w.q.shape[1] // w.scales.shape[1], axis=1))
    return float((np.abs(found - expected) / np.maximum(step, 1e-9)).max())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_values_are_mlxs_own_with_positive_scales_and_integer_offsets(bits):
    module, values = quantised(bits)
    w = Quantised.of(module)
    assert (w.scales < 0).any() and (w.scales > 0).any()
    data, scale, offset = shift_scale(w)
    assert (scale > 0).all() and scale.dtype == np.float16
    assert offset.dtype == data.dtype
    assert error_in_steps(restored(data, scale, offset), values, w) <= 0.11
    assert data.astype(np.uint8).max() == 2**bits - 1


@pytest.mark.parametrize("group", [32, 64])
def test_four_bit_offsets_are_hardly_rounded(group):
    module, values = quantised(4, group)
    w = Quantised.of(module)
    assert error_in_steps(restored(*shift_scale(w)), values, w) <= 0.02


def test_groups_without_a_step_are_exact():
    weight = np.random.default_rng(1).normal(0, 0.1, (24, 128)).astype(np.float32)
    weight[0] = 0
    weight[1, :32], weight[1, 32:64] = 0.3125, -0.3125
    module, _ = quantised(4, weight=weight)
    module.scales[2, 0], module.biases[2, 0] = 0, 0
    module.scales[3, 0], module.biases[3, 0] = 0, -0.5
    found = restored(*shift_scale(Quantised.of(module)))
    assert np.isfinite(found).all()
    assert (found[0] == 0).all() and (found[2, :32] == 0).all()
    np.testing.assert_array_equal(found[1, :64], weight[1, :64])
    np.testing.assert_array_equal(found[3, :32], -0.5)


def test_zero_points_between_integers_stay_there():
    module, _ = quantised(4, dtype=mx.float32)
    module.biases = module.biases + 0.37 * module.scales
    w = Quantised.of(module)
    values = w.scales.repeat(32, 1) * w.q + w.biases.repeat(32, 1)
    data, scale, offset = shift_scale(w)
    assert offset.dtype == np.float16
    assert error_in_steps(restored(data, scale, offset), values, w) <= 0.02


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lookup_tables_are_exact(bits):
    module, values = quantised(bits)
    indices, tables = lookup_tables(Quantised.of(module))
    assert tables.shape == (24, 4, 2**bits, 1)
    found = constexpr_lut_to_dense.decompress(indices.astype(np.uint8), tables, None)
    np.testing.assert_array_equal(found, values.astype(np.float16))


def test_lookup_tables_as_large_as_the_weights_are_refused():
    with pytest.raises(ValueError, match="8 bits in groups of 32"):
        lookup_tables(Quantised.of(quantised(8)[0]))


def test_weights_that_are_not_affine_are_refused():
    module = nn.Linear(64, 8, bias=False).to_quantized(32, 4, "mxfp4")
    with pytest.raises(ValueError, match="no mxfp4 weights"):
        Quantised.of(module)


@pytest.mark.parametrize("value", [70000.0, float("nan"), float("-inf")])
def test_what_float16_cannot_hold_is_refused_by_name(value):
    with pytest.raises(ValueError, match="lm_head reaches"):
        array(mx.array([1.0, value]), "lm_head")


def test_quantising_for_core_ml_leaves_nothing_to_round():
    model = tiny_model("llama", intermediate_size=80)
    quantise(model, plan_of(model), 4, 32)
    assert model.layers[0].mlp.down_proj.weight.shape == (32, 96 * 4 // 32)
    for _, module in model.named_modules():
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            w = Quantised.of(module)
            values = w.scales.repeat(32, 1) * w.q + w.biases.repeat(32, 1)
            found = restored(*shift_scale(w))
            np.testing.assert_allclose(found, values, atol=1e-6)


def test_quantising_for_core_ml_moves_mlxs_values_by_a_fraction_of_a_step():
    plain, snapped = tiny_model("llama"), tiny_model("llama")
    nn.quantize(plain, 32, 8)
    quantise(snapped, plan_of(snapped), 8, 32)
    matrices = [Quantised.of(m.layers[0].mlp.up_proj) for m in (plain, snapped)]
    values = [w.scales.repeat(32, 1) * w.q + w.biases.repeat(32, 1) for w in matrices]
    assert error_in_steps(*values, matrices[0]) <= 0.13
