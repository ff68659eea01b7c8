"""Mixtures as the Hub has them, every expert's matrices alone, become stock folders."""

import json
import tracemalloc
import weakref

import mlx.core as mx
import numpy as np
import pytest
from conftest import families, randomised, relative_error, write_tokenizer
from mlx.utils import tree_flatten

from ifp_mlx import load
from ifp_mlx.convert.from_pytorch import convert
from ifp_mlx.convert.gguf import shards
from ifp_mlx.slicing.stock import build
from ifp_mlx.storage import writer
from ifp_mlx.storage.folder import source_of
from ifp_mlx.storage.writer import fill_store, write_store

TOKENS = mx.array([[5, 9, 77, 200, 13, 40]])
MIB = 1 << 20

WIDE = {"hidden_size": 64, "q_lora_rank": 32, "kv_lora_rank": 32}

# What each type calls the matrices of an expert, where the name is another one.
MATRICES = {
    "qwen3_moe": {},
    "deepseek": {},
    "deepseek_v2": {},
    "mixtral": {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
}


def small(name, **changes):
    """Return a config.json, wide enough to be quantised, and its random model."""
    config = families()[name] | WIDE | {"eos_token_id": 258} | changes
    return config, randomised(build(config))


def taken_apart(model, matrices):
    """Return a stock model's weights with every expert's matrices alone."""
    found = {}
    for name, value in tree_flatten(model.parameters()):
        home, stacked, rest = name.partition(".switch_mlp.")
        matrix, _, tensor = rest.partition(".")
        if stacked:
            matrix = matrices.get(matrix, matrix)
            for number, expert in enumerate(value):
                found[f"{home}.experts.{number}.{matrix}.{tensor}"] = expert
        else:
            found[name] = value
    return found


def write_sharded(folder, config, weights, save, end, count=3):
    """Write a folder whose weights are in several files, neighbours in different ones."""
    folder.mkdir()
    stem, weight_map = ("model", "pytorch_model")[end == "bin"], {}
    for number in range(count):
        file = f"{stem}-{number + 1:05d}-of-{count:05d}.{end}"
        part = {name: weights[name] for name in sorted(weights)[number::count]}
        save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.{end}.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return folder


def save_safetensors(part, file):
    mx.save_safetensors(str(file), part, metadata={"format": "pt"})


def write_hub(folder, name, **changes):
    """Write a small mixture as the Hub has it; return the folder and its model."""
    config, model = small(name, **changes)
    weights = taken_apart(model, MATRICES[name])
    return write_sharded(
        folder, config, weights, save_safetensors, "safetensors"
    ), model


def weights_in(folder):
    return dict(tree_flatten(source_of(folder).dense().parameters()))


def same_weights(found, expected):
    assert found.keys() == expected.keys()
    return all(
        found[name].dtype == expected[name].dtype
        and mx.array_equal(found[name], expected[name])
        for name in found
    )


@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("name", MATRICES)
def test_a_converted_mixture_computes_what_the_folder_of_the_hub_does(
    tmp_path, name, store
):
    hub, model = write_hub(tmp_path / "hub", name)
    out = convert(hub, tmp_path / "out", channel_store=store)
    for folder in (hub, out):
        assert mx.array_equal(source_of(folder).dense()(TOKENS), model(TOKENS))


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize(
    "options", [{"dtype": "float16"}, {"quantize": True, "q_group_size": 32}]
)
def test_experts_are_cast_and_quantised_as_those_of_a_stock_folder(
    tmp_path, name, options
):
    hub, model = write_hub(tmp_path / "hub", name, dtype="float32")
    stock = tmp_path / "stock"
    weights = dict(tree_flatten(model.parameters()))
    config = json.loads((hub / "config.json").read_text())
    write_sharded(stock, config, weights, save_safetensors, "safetensors")
    found, expected = (
        convert(folder, tmp_path / f"{folder.name}_out", **options)
        for folder in (hub, stock)
    )
    assert same_weights(weights_in(found), weights_in(expected))
    assert source_of(found).config == source_of(expected).config
    if "dtype" in options:  # said once, by the name that every version knows
        config = source_of(found).config
        assert config["torch_dtype"] == "float16" and "dtype" not in config


def test_gpt_oss_in_mxfp4_is_taken_as_it_is(tmp_path):
    config, model = small("gpt_oss")
    weights = {}
    for name, value in tree_flatten(model.parameters()):
        matrix, _, tensor = name.rpartition(".")
        if ".experts." not in name:
            weights[name] = value
        elif tensor == "bias":
            weights[f"{matrix}_bias"] = value
        else:
            packed, scales = mx.quantize(value, 32, 4, mode="mxfp4")
            weights[f"{matrix}_scales"] = scales
            blocks = packed.view(mx.uint8).reshape(*scales.shape, 16)
            weights[f"{matrix}_blocks"] = blocks
    for name in [name for name in weights if "gate_proj" in name]:
        up = weights.pop(name.replace("gate_proj", "up_proj"))
        both = mx.stack([weights.pop(name), up], axis=2).flatten(1, 2)
        weights[name.replace("gate_proj", "gate_up_proj")] = both
    config |= {"quantization_config": {"quant_method": "mxfp4"}}
    hub = tmp_path / "hub"
    write_sharded(hub, config, weights, save_safetensors, "safetensors")
    out = convert(hub, tmp_path / "out")
    assert same_weights(weights_in(out), weights_in(hub))
    assert source_of(out).config["quantization"]["mode"] == "mxfp4"
    expert = "model.layers.1.mlp.experts.up_proj"
    found, before = weights_in(out), dict(tree_flatten(model.parameters()))
    packed, scales = mx.quantize(before[f"{expert}.weight"], 32, 4, mode="mxfp4")
    assert mx.array_equal(found[f"{expert}.weight"], packed)
    assert mx.array_equal(found[f"{expert}.scales"], scales)
    assert mx.array_equal(found[f"{expert}.bias"], before[f"{expert}.bias"])


@pytest.mark.parametrize("name", MATRICES)
def test_a_folder_of_the_hub_is_cut_without_being_converted(tmp_path, name):
    hub, _ = write_hub(tmp_path / "hub", name)
    model, _ = load(hub)
    selection = model.select([5, 9], keep=0.5, selector="random")
    converted, _ = load(convert(hub, tmp_path / "out"))
    assert mx.array_equal(
        model.compact(selection)(TOKENS), converted.compact(selection)(TOKENS)
    )


def test_a_folder_of_the_hub_is_no_store_until_it_is_converted(tmp_path):
    hub, _ = write_hub(tmp_path / "hub", "qwen3_moe")
    with pytest.raises(ValueError, match=r"ifp_mlx convert --hf-path \S+hub --mlx"):
        write_store(hub, tmp_path / "store")
    assert not (tmp_path / "store").exists()


# memory


@pytest.mark.parametrize(
    ("options", "times"),
    [({}, 1), ({"dtype": "float16"}, 2), ({"quantize": True, "q_group_size": 32}, 2)],
)
def test_memory_holds_a_shard_and_what_one_tensor_is_made_of(
    tmp_path, monkeypatch, options, times
):
    sizes = {"moe_intermediate_size": 128, "num_experts": 32, "num_hidden_layers": 8}
    hub, model = write_hub(tmp_path / "hub", "qwen3_moe", **sizes)
    largest = max(value.nbytes for _, value in tree_flatten(model.parameters()))
    whole = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
    del model
    shard = 5 * largest // 2
    monkeypatch.setattr(shards, "SHARD_BYTES", shard)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    convert(hub, tmp_path / "out", **options)
    peak = mx.get_peak_memory() - before
    assert peak < shard + times * largest + MIB // 4
    assert peak < whole / 4


def test_a_store_is_written_a_few_records_at_a_time(tmp_path, monkeypatch):
    sizes = {"moe_intermediate_size": 512, "num_experts": 32, "num_hidden_layers": 2}
    hub, _ = write_hub(tmp_path / "hub", "qwen3_moe", **sizes)
    plain, store = convert(hub, tmp_path / "plain"), tmp_path / "store"
    store.mkdir()
    monkeypatch.setattr(writer, "PIECE_BYTES", MIB)
    tracemalloc.start()
    fill_store(plain, store)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    layer = (store / "channels.bin").stat().st_size  # the other layer is dense
    assert layer > 12 * MIB and peak < 4 * MIB


# PyTorch


@pytest.mark.torch
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_a_converted_mixture_computes_what_transformers_does(tmp_path, name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = families()[name] | {"eos_token_id": 258}
    theirs = transformers.AutoConfig.for_model(**config)
    model = transformers.AutoModelForCausalLM.from_config(theirs, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
        expected = model.eval()(torch.tensor(TOKENS.tolist())).logits.numpy()
    hub = tmp_path / "hub"
    model.save_pretrained(hub, max_shard_size="50KB")
    assert len(list(hub.glob("*.safetensors"))) > 2
    (hub / "config.json").write_text(json.dumps(config))
    write_tokenizer(hub)
    found = source_of(convert(hub, tmp_path / "out")).dense()(TOKENS)
    assert relative_error(found, mx.array(expected)) < 1e-5


@pytest.mark.torch
def test_pytorch_files_are_let_go_of_one_after_the_other(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    config, model = small("qwen3_moe")
    weights = {
        name: torch.from_numpy(np.array(value))
        for name, value in taken_apart(model, {}).items()
    }
    hub = write_sharded(tmp_path / "hub", config, weights, torch.save, "bin")
    opened, alive, read = [], [], torch.load

    def load_and_count(*arguments, **options):
        alive.append(sum(tensor() is not None for tensor in opened))
        content = read(*arguments, **options)
        opened.extend(map(weakref.ref, content.values()))
        return content

    monkeypatch.setattr(torch, "load", load_and_count)
    out = convert(hub, tmp_path / "out")
    assert len(alive) >= 3 and not any(alive)
    assert mx.array_equal(source_of(out).dense()(TOKENS), model(TOKENS))


@pytest.mark.torch
def test_a_pytorch_file_that_cannot_be_mapped_is_not_called_damaged(
    tmp_path, monkeypatch
):
    torch = pytest.importorskip("torch")
    config, _ = small("qwen3_moe")
    weights = {"a": torch.zeros(1)}
    hub = write_sharded(tmp_path / "hub", config, weights, torch.save, "bin", 1)

    def refuse(file, **_options):
        raise RuntimeError(
            f"unable to mmap 9 bytes from file <{file}>: Cannot allocate memory (12)"
        )

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(OSError, match="does not let a file of that size be mapped"):
        convert(hub, tmp_path / "out")
    assert not (tmp_path / "out").exists()
