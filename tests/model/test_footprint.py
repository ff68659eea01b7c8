import json
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import FAMILIES, tiny_config, tiny_model, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from ifp_mlx import load
from ifp_mlx.files.amounts import in_words
from ifp_mlx.model.footprint import (
    Footprint,
    LayerCache,
    folder_bytes,
    model_bytes,
    model_of_config,
)
from ifp_mlx.selection.predictor import SparsityPredictor
from ifp_mlx.slicing.plan import plan_of

# A model of a size that runs nowhere here: 9B to 3B of the paper's Table 4.
PAPER_9B = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 56,
    "intermediate_size": 24576,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "vocab_size": 32000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def quantised(folder, group_size=16, bits=4, **changes):
    """Write a quantised tiny model as mlx-lm does."""
    write_folder(folder, **changes)
    model = tiny_model("llama", **changes)
    how = {"group_size": group_size, "bits": bits}
    nn.quantize(model, **how)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization": how}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compact_model_weighs_what_was_said_before_it_was_loaded(tmp_path, family):
    model, _ = load(write_folder(tmp_path / "m", family, attention_bias=True))
    footprint = Footprint.of(model)
    assert footprint.dense_bytes == model_bytes(model.dense())
    selection = model.select("hello", keep=0.5, allocation="first-layer")
    assert footprint.compact_bytes(selection) == model_bytes(model.compact(selection))


def test_a_quantised_model_is_weighed_with_its_scales(tmp_path):
    folder = quantised(tmp_path / "q", group_size=32, hidden_size=64)
    model, _ = load(folder)
    footprint = Footprint.of(model)
    assert footprint.granularity == 32
    selection = model.select("hello", target_size=32)
    assert footprint.compact_bytes(selection) == model_bytes(model.compact(selection))
    from_config = Footprint.of_config(model.config | {"torch_dtype": "float32"})
    assert from_config == footprint


def test_biases_of_channels_go_with_the_channels(tmp_path):
    model, _ = load(write_folder(tmp_path / "m", "llama", mlp_bias=True))
    footprint = Footprint.of(model)
    selection = model.select("hello", keep=0.25)
    assert footprint.compact_bytes(selection) == model_bytes(model.compact(selection))
    assert footprint.layer_bytes == ((3 * 32 + 2) * 4.0,) * 3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [256, 512])
def test_kv_bytes_are_those_of_mlx_lms_caches(family, tokens):
    from mlx_lm.models.cache import make_prompt_cache

    model = tiny_model(family)
    cache = make_prompt_cache(model)
    for _ in range(0, tokens, 64):
        model(mx.zeros((1, 64), mx.int32), cache=cache)
        mx.eval([c.state for c in cache])
        last = mx.zeros((1, 1), mx.int32)
    said = Footprint.of_module(model, plan_of(model)).kv_bytes(tokens)
    for layer in cache:  # a window is trimmed by the next token, not by the prompt
        layer.trim(1)
    model(last, cache=cache)
    assert sum(layer.nbytes for layer in cache) == said


def test_a_sliding_window_bounds_its_layers():
    footprint = Footprint.of_config(tiny_config("gemma3_text"))
    windows = [cache.window for cache in footprint.caches]
    assert windows == [16, None, 16]
    each = LayerCache(2 * 2 * 8 * 2)
    assert footprint.caches[1] == each  # no dtype is given: two bytes
    assert footprint.kv_bytes(100) == each.token_bytes * (16 + 100 + 16)


def test_a_config_alone_is_enough():
    model = tiny_model("qwen3")
    config = tiny_config("qwen3", torch_dtype="float32")
    assert Footprint.of_config(config) == Footprint.of_module(
        model, plan_of(model, config)
    )


def packed_by_awq(folder, group):
    """Write a folder whose matrices are packed as AutoAWQ does, all zero."""
    write_folder(folder)
    tensors = {}
    for name, weight in mx.load(str(folder / "model.safetensors")).items():
        home, packed = name.removesuffix(".weight"), "proj" in name
        if not packed:
            tensors[name] = weight.astype(mx.float16)
            continue
        wide, deep = weight.shape
        tensors[f"{home}.qweight"] = mx.zeros((deep, wide // 8), mx.int32)
        tensors[f"{home}.qzeros"] = mx.zeros((deep // group, wide // 8), mx.int32)
        tensors[f"{home}.scales"] = mx.zeros((deep // group, wide), mx.float16)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    how = {"quant_method": "awq", "bits": 4, "group_size": group}
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": how, "torch_dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config))
    return config


def test_a_config_alone_weighs_what_another_program_has_packed(tmp_path):
    config = packed_by_awq(tmp_path / "m", 32)
    whole = Footprint.of(load(tmp_path / "m")[0])
    assert Footprint.of_config(config) == whole


@pytest.mark.parametrize(
    ("noted", "meant"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, (32, 4, "affine")),
        ({"quant_method": "mxfp4"}, (32, 4, "mxfp4")),
        (
            {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
            (16, 4, "nvfp4"),
        ),
        (
            {
                "quant_method": "fp8",
                "scale_fmt": "ue8m0",
                "weight_block_size": [32, 32],
            },
            (32, 8, "mxfp8"),
        ),
        ({"quant_method": "fp8"}, None),  # unpacked when it is loaded
    ],
)
def test_each_way_of_packing_is_weighed_as_mlx_lm_holds_it(noted, meant):
    left_out = {"modules_to_not_convert": ["lm_head", "layers.*.self_attn"]}
    config = tiny_config("llama", quantization_config=noted | left_out)
    how = meant and dict(zip(("group_size", "bits", "mode"), meant, strict=True))
    whole = {"model.embed_tokens": False, "lm_head": False}
    for layer in range(3):
        for name in "qkvo":
            whole[f"model.layers.{layer}.self_attn.{name}_proj"] = False
    by_mlx = tiny_config("llama", quantization=how and how | whole)
    assert Footprint.of_config(config) == Footprint.of_config(by_mlx)


@pytest.mark.parametrize(
    "noted",
    [
        {"quant_method": "bitsandbytes"},
        {"quant_method": "gptq", "bits": 3},
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
    ],
)
def test_what_mlx_lm_does_not_read_is_not_weighed(noted):
    method = noted["quant_method"]
    with pytest.raises(ValueError, match=f"quantised by {method} .* take the model"):
        Footprint.of_config(tiny_config("llama", quantization_config=noted))


def test_gemmas_output_layer_is_its_embedding_though_its_config_does_not_say_so():
    silent = tiny_config("gemma3_text", torch_dtype="float32")
    del silent["tie_word_embeddings"]
    found = Footprint.of_config(silent)
    apart = Footprint.of_config(silent | {"tie_word_embeddings": False})
    assert apart.core_bytes - found.core_bytes == 259 * 32 * 4
    assert Footprint.of_config(silent | {"tie_word_embeddings": None}) == found


def test_the_papers_model_is_weighed_without_being_made():
    mx.reset_peak_memory()
    footprint = Footprint.of_config(PAPER_9B, shared=1024)
    assert mx.get_peak_memory() < 1e9 and model_of_config(PAPER_9B) is not None
    without_embeddings = footprint.dense_bytes - 32000 * 2048 * 2
    assert without_embeddings / 2 == pytest.approx(8.98e9, rel=1e-2)  # Table 4
    assert footprint.channel_bytes([6656] * 56) == 56 * 6656 * 3 * 2048 * 2
    assert footprint.shared_bytes == 56 * 1024 * 3 * 2048 * 2


def test_configs_that_mlx_lm_cannot_build_are_refused():
    with pytest.raises(ValueError, match="'no_such_model'"):
        Footprint.of_config({"model_type": "no_such_model"})
    with pytest.raises(ValueError, match="'llama'"):
        Footprint.of_config({"model_type": "llama"})


def test_a_predictor_is_part_of_what_stays_in_memory(tmp_path):
    folder = write_folder(tmp_path / "m")
    backbone = tiny_model("llama", hidden_size=16)
    predictor = SparsityPredictor(
        backbone, 3, 64, 4, config=tiny_config("llama", hidden_size=16)
    )
    predictor.save(folder / "predictor")
    footprint = Footprint.of(load(folder)[0])
    assert footprint.predictor_bytes == model_bytes(predictor)
    assert footprint.predictor_bytes == folder_bytes(folder / "predictor")
    assert footprint.total_bytes([64] * 3, 0) == (
        footprint.dense_bytes + footprint.predictor_bytes
    )


FOOTPRINT = Footprint(
    channels=96,
    hidden_size=16,
    granularity=8,
    shared=0,
    core_bytes=1000,
    layer_bytes=(10.0, 10.0),
    caches=(LayerCache(4), LayerCache(4, window=16)),
    predictor_bytes=300,
)


@settings(deadline=None)
@given(
    st.integers(1, 6000),
    st.integers(0, 64),
    st.sampled_from([1, 8, 32]),
    st.sampled_from([0, 20]),
)
def test_the_largest_size_fits_and_the_next_does_not(memory, tokens, granularity, fix):
    footprint = replace(FOOTPRINT, granularity=granularity, shared=fix)
    try:
        k = footprint.largest_size(memory, tokens)
    except ValueError:
        smallest = [footprint.smallest] * 2
        assert footprint.total_bytes(smallest, tokens) > memory
        return
    assert k % granularity == 0 and fix <= k <= 96
    assert footprint.total_bytes([k] * 2, tokens) <= memory
    larger = [k + granularity] * 2
    assert k == 96 or footprint.total_bytes(larger, tokens) > memory
    assert footprint.largest_keep(memory, tokens) == k / 96


def test_an_allocations_own_sizes_are_added_up():
    def sizes(k):
        return [96, max(8, 2 * k - 96)]  # the first layer whole

    k = FOOTPRINT.largest_size(1000 + 300 + 10 * (96 + 40), 0, sizes)
    assert sizes(k) == [96, 32] and k == 64


def test_refusals_name_the_smallest_memory_that_would_do():
    with pytest.raises(ValueError, match=r"needs 1.54 kB") as refusal:
        FOOTPRINT.largest_size(1400, 10)
    assert "1.40 kB of memory" in str(refusal.value)
    assert "80 bytes for the KV cache of 10 tokens" in str(refusal.value)
    assert FOOTPRINT.largest_size(1540, 10) == 8


def test_a_selection_that_does_not_fit_is_told_the_keep_that_does():
    FOOTPRINT.check_fits([96, 96], 3220, 0)
    with pytest.raises(ValueError, match=r"needs 3.22 kB .* --keep 0.916 fits"):
        FOOTPRINT.check_fits([96, 96], 3219, 0)
    with pytest.raises(ValueError, match="smallest selection needs 1.54 kB"):
        FOOTPRINT.check_fits([96, 96], 1000, 10)


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 bytes"), (999, "999 bytes"), (1001, "1.01 kB"), (12_000_000, "12.0 MB")]
    + [(345_600_001, "346 MB"), (2_000_000_000, "2.00 GB")],
)
def test_bytes_are_rounded_up(count, words):
    assert in_words(count) == words
