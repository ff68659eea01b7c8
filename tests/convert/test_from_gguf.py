"""GGUF files become the model they were made from."""

import struct
import sys

import gguf
import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_config, tiny_model
from mlx.utils import tree_flatten
from tokenizers import pre_tokenizers

from ifp_mlx.convert import from_pytorch
from ifp_mlx.convert.gguf import reader
from ifp_mlx.storage.folder import source_of

ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}
SCORES = "tokenizer.ggml.scores"
F32 = gguf.GGMLQuantizationType.F32
TOKENS = mx.array([[3, 1, 4, 1, 5, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43, 38, 32, 79]])


def tiny(architecture, **changes):
    """Return a tiny model and its config; all but Gemma are untied."""
    family = ARCHITECTURES[architecture]
    if family == "gemma3_text":  # the pattern of all Gemma 3, not in the file
        changes = {"num_hidden_layers": 7, "sliding_window_pattern": 6} | changes
    model = tiny_model(family, **changes)
    if family == "gemma3_text":
        model.sanitize({})  # ties the embeddings
    return model, tiny_config(family, **changes)


def tensors_of(architecture, model, config):
    """Name and store the weights of ``model`` as llama.cpp's converter does."""
    (arch,) = (k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    heads = {
        "q_proj": config["num_attention_heads"],
        "k_proj": config["num_key_value_heads"],
    }
    tensors = {}
    for name, weight in tree_flatten(model.parameters()):
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        value = np.array(weight)
        module = name.split(".")[-2]
        if architecture == "llama" and module in heads:
            halves = value.reshape(heads[module], 2, -1, *value.shape[1:])
            value = halves.swapaxes(1, 2).reshape(value.shape)
        if architecture.startswith("gemma") and "norm" in module:
            value = value + 1
        tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))] = value
    return tensors


def metadata_of(architecture, config):
    keys = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_theta"],
    }
    if architecture == "gemma2":
        keys["attn_logit_softcapping"] = 50.0
        keys["final_logit_softcapping"] = 30.0
    if architecture.startswith("gemma"):
        keys["attention.sliding_window"] = config.get("sliding_window", 4096)
    return {f"{architecture}.{key}": value for key, value in keys.items()}


def vocabulary_of(architecture):
    """Return 259 tokens: bytes and three special ones."""
    if architecture.startswith("gemma"):
        return {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": ["<unk>", "<bos>", "<eos>"]
            + [f"<0x{i:02X}>" for i in range(254)]
            + ["a", "▁"],
            SCORES: [0.0] * 257 + [-1.0, -2.0],
            "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 254 + [1, 1],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.add_space_prefix": False,
        }
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [*alphabet, "th", "<|im_end|>", "<|endoftext|>"],
        "tokenizer.ggml.merges": ["t h"],
        "tokenizer.ggml.token_type": [1] * 257 + [3, 3],
        "tokenizer.ggml.eos_token_id": 258,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }


def write(file, architecture, tensors, metadata, kind=F32):
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in metadata.items():
        add = {
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            bool: writer.add_bool,
            list: writer.add_array,
        }
        add[type(value)](key, value)
    for name, value in tensors.items():
        two = kind if value.ndim == 2 else F32
        data = gguf.quants.quantize(value.astype(np.float32), two)
        writer.add_tensor(name, data, raw_dtype=two)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def tiny_gguf(tmp_path):
    """Return a function that writes a tiny GGUF file and returns it and its model."""

    def make(architecture="llama", *, kind=F32, drop=(), add=None, extra=None, **size):
        model, config = tiny(architecture, **size)
        metadata = metadata_of(architecture, config) | vocabulary_of(architecture)
        metadata |= add or {}
        tensors = tensors_of(architecture, model, config) | (extra or {})
        metadata = {k: v for k, v in metadata.items() if k not in drop}
        tensors = {k: v for k, v in tensors.items() if k not in drop}
        file = tmp_path / "tiny.gguf"
        return write(file, architecture, tensors, metadata, kind), model

    return make


@pytest.fixture
def unpack(tmp_path):
    def unpack(file, dtype=mx.float32):
        folder = tmp_path / "unpacked"
        folder.mkdir(exist_ok=True)
        reader.unpack_gguf(file, folder, dtype)
        return folder

    return unpack


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_architecture_computes_the_same(tiny_gguf, unpack, architecture):
    file, model = tiny_gguf(architecture)
    folder = unpack(file)
    assert source_of(folder).config["model_type"] == ARCHITECTURES[architecture]
    logits, expected = source_of(folder).dense()(TOKENS), model(TOKENS)
    assert mx.allclose(logits, expected, rtol=1e-5, atol=1e-5)
    if not architecture.startswith("gemma"):  # norms lose a bit when 1 is added
        assert mx.array_equal(logits, expected)


def test_name_and_licence_come_along(tiny_gguf, tmp_path):
    about = {"general.name": "Tiny 1", "general.license": "apache-2.0"}
    file, _ = tiny_gguf(add=about)
    file.with_name("LICENSE").write_text("the licence")
    out = from_pytorch.convert(file, tmp_path / "out")
    card = (out / "README.md").read_text()
    assert "license: apache-2.0\n" in card and "# Tiny 1\n" in card
    assert (out / "LICENSE").read_text() == "the licence"


def test_several_licences_in_a_file_are_no_reason_to_refuse_it(tiny_gguf, unpack):
    file, _ = tiny_gguf(add={"general.license": ["mit", "apache-2.0"]})
    assert "license" not in (unpack(file) / "README.md").read_text()


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_tied_embeddings_are_those_without_output(tiny_gguf, unpack, architecture):
    file, model = tiny_gguf(architecture, tie_word_embeddings=True)
    folder = unpack(file)
    assert source_of(folder).config["tie_word_embeddings"] is True
    assert mx.array_equal(source_of(folder).dense()(TOKENS), model(TOKENS))


def test_biases_of_llama_are_reordered_too(tiny_gguf, unpack):
    file, model = tiny_gguf(attention_bias=True, mlp_bias=True)
    assert mx.array_equal(source_of(unpack(file)).dense()(TOKENS), model(TOKENS))


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q4_0", "F16", "BF16"])
def test_quantised_weights_are_dequantised(tiny_gguf, unpack, monkeypatch, kind):
    monkeypatch.setattr(reader, "BLOCK_VALUES", 100)  # three rows at a time
    file, model = tiny_gguf(kind=gguf.GGMLQuantizationType[kind])
    weights = dict(tree_flatten(source_of(unpack(file)).dense().parameters()))
    for name, weight in tree_flatten(model.parameters()):
        error = mx.abs(weights[name] - weight).max() / mx.abs(weight).max()
        assert error < (0.15 if kind == "Q4_0" else 0.05), name


def test_weights_come_in_the_dtype_asked_for(tiny_gguf, unpack):
    folder = unpack(tiny_gguf()[0], mx.bfloat16)
    parameters = tree_flatten(source_of(folder).dense().parameters())
    assert {value.dtype for _, value in parameters} == {mx.bfloat16}
    assert source_of(folder).config["torch_dtype"] == "bfloat16"


def test_the_tokenizer_comes_along(tiny_gguf, unpack):
    from mlx_lm.utils import load_tokenizer

    folder = unpack(tiny_gguf()[0])
    config = source_of(folder).config
    assert config["eos_token_id"] == [257, 258]  # <|im_end|> ends a turn
    tokenizer = load_tokenizer(folder, eos_token_ids=config["eos_token_id"])
    message = [{"role": "user", "content": "the end<|im_end|>"}]
    ids = tokenizer.apply_chat_template(message)
    assert (ids[0], ids[-1]) == (256, 257)
    assert tokenizer.decode(tokenizer.encode("naïve 12")) == "naïve 12"


def test_sentencepiece_vocabularies_begin_with_bos(tiny_gguf, unpack):
    from mlx_lm.utils import load_tokenizer

    tokenizer = load_tokenizer(unpack(tiny_gguf("gemma3")[0]))
    assert tokenizer.encode("a é") == [1, 257, 258, 0xC3 + 3, 0xA9 + 3]
    assert tokenizer.decode([257, 258, 0xC3 + 3, 0xA9 + 3]) == "a é"


@pytest.mark.parametrize(
    ("add", "scaling"),
    [
        ({"rope.scaling.type": "none"}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}, None),
        (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 128,
            },
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
            },
        ),
    ],
)
def test_rope_scaling_is_read(tiny_gguf, unpack, add, scaling):
    changes = {} if scaling is None else {"rope_scaling": scaling}
    keys = {f"llama.{key}": value for key, value in add.items()}
    file, model = tiny_gguf(add=keys, **changes)
    folder = unpack(file)
    assert source_of(folder).config["rope_scaling"] == scaling
    assert mx.array_equal(source_of(folder).dense()(TOKENS), model(TOKENS))


def llama3_factors(scaling, dims, base):
    """Compute rope_freqs.weight as llama.cpp's converter does."""
    context = scaling["original_max_position_embeddings"]
    waves = 2 * np.pi * base ** (np.arange(0, dims, 2) / dims)
    smooth = np.clip((context / waves - 1) / 3, 0, 1)
    return (1 / ((1 - smooth) / scaling["factor"] + smooth)).astype(np.float32)


@pytest.mark.parametrize(
    ("factor", "context"), [(8.0, 8192), (32.0, 8192), (4.0, 2048)]
)
def test_llama3_scaling_is_found_by_its_factors(tiny_gguf, unpack, factor, context):
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": context,
    }
    size = {"rope_theta": 500000.0, "head_dim": 32, "rope_scaling": scaling}
    factors = llama3_factors(scaling, 32, 500000.0)
    file, model = tiny_gguf(extra={"rope_freqs.weight": factors}, **size)
    folder = unpack(file)
    assert source_of(folder).config["rope_scaling"] == scaling
    assert mx.array_equal(source_of(folder).dense()(TOKENS), model(TOKENS))


def test_other_rope_factors_are_refused(tiny_gguf, unpack):
    factors = np.array([1, 2, 3, 4], np.float32)
    file, _ = tiny_gguf(extra={"rope_freqs.weight": factors})
    with pytest.raises(
        ValueError, match=r"rope_freqs.weight .*factor 4\) is no Llama 3"
    ):
        unpack(file)


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_the_largest_gemma_scales_attention_by_its_width(
    tiny_gguf, unpack, monkeypatch, architecture
):
    layers = 3 if architecture == "gemma2" else 7
    monkeypatch.setitem(reader.GEMMA_27B, architecture, layers)
    size = {"hidden_size": 64, "query_pre_attn_scalar": 16}
    file, model = tiny_gguf(architecture, **size)
    folder = unpack(file)
    assert source_of(folder).config["query_pre_attn_scalar"] == 16
    assert mx.allclose(source_of(folder).dense()(TOKENS), model(TOKENS), atol=1e-5)


def test_newer_gemma3_keys_count(tiny_gguf, unpack):
    size = {
        "num_hidden_layers": 3,
        "sliding_window_pattern": 2,
        "rope_local_base_freq": 5000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    add = {
        "gemma3.attention.sliding_window_pattern": 2,
        "gemma3.rope.freq_base_swa": 5000.0,
        "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": 8.0,
    }
    file, model = tiny_gguf("gemma3", add=add, **size)
    assert mx.allclose(
        source_of(unpack(file)).dense()(TOKENS), model(TOKENS), atol=1e-5
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"add": {"llama.feed_forward_length": [64, 64, 32]}},
            "is .64, 64, 32., not one",
        ),
        (
            {"add": {"llama.block_count": 2**31}},
            "lacks blk.2147483647.attn_norm.weight",
        ),
        ({"add": {"llama.block_count": 2}}, "holds blk.2.* has no place for"),
        ({"add": {"llama.attention.head_count": 0}}, "describe no llama model"),
        (
            {"add": {"llama.attention.head_count_kv": 4}},
            r"attn_k.* \(16, 32\), .*\(32, 32",
        ),
        ({"add": {"llama.attention.value_length": 16}}, "value_length=16 .* width 8"),
        (
            {"add": {"llama.rope.dimension_count": 4}},
            "rope.dimension_count=4 .* width 8",
        ),
        (
            {"add": {"llama.rope.scaling.type": "longrope"}},
            "type='longrope' .* not supp",
        ),
        (
            {"add": {"llama.final_logit_softcapping": 30.0}},
            "final_logit_softcapping=30.0",
        ),
        ({"add": {"split.count": 3}}, "one of 3 parts.*llama-gguf-split"),
        ({"drop": ["llama.context_length"]}, "has no llama.context_length"),
        ({"drop": ["token_embd.weight"]}, "lacks token_embd.weight"),
        ({"drop": ["blk.1.ffn_up.weight"]}, "lacks blk.1.ffn_up.weight .*up_proj"),
        (
            {"extra": {"blk.0.ffn_gate_inp.weight": np.ones((4, 32))}},
            "ffn_gate_inp.weight",
        ),
        ({"drop": ["tokenizer.ggml.pre"]}, "has no tokenizer.ggml.pre"),
        ({"add": {"tokenizer.ggml.pre": "tekken"}}, "tokenizer.ggml.pre='tekken'"),
        ({"add": {"tokenizer.ggml.model": "rwkv"}}, "tokenizer.ggml.model='rwkv'"),
        (
            {"add": {"tokenizer.ggml.token_type": [1]}},
            "token_type .* does not hold one int",
        ),
        (
            {"add": {"tokenizer.ggml.eos_token_id": 999}},
            "special ones are .*'eos': 999",
        ),
        (
            {"add": {"tokenizer.ggml.tokens": list(range(259))}},
            "tokens .* one str for each of 259",
        ),
        ({"add": {"tokenizer.ggml.merges": ["x yz"]}}, "merges do not fit"),
        ({"vocab_size": 200}, "has 259 tokens, but embeddings for 200"),
    ],
)
def test_what_cannot_be_converted_is_said(tiny_gguf, unpack, change, sentence):
    file, _ = tiny_gguf(**change)
    with pytest.raises(ValueError, match=sentence):
        unpack(file)


def test_rope_scaling_that_gemma2_lacks_is_refused(tiny_gguf, unpack):
    add = {"gemma2.rope.scaling.factor": 2.0}
    with pytest.raises(ValueError, match="'linear' .* not supported for gemma2"):
        unpack(tiny_gguf("gemma2", add=add)[0])


def test_sentencepiece_scores_must_match_the_tokens(tiny_gguf, unpack):
    for change in ({"drop": [SCORES]}, {"add": {SCORES: [0.0]}}):
        with pytest.raises(ValueError, match=SCORES):
            unpack(tiny_gguf("gemma3", **change)[0])


def test_another_architecture_is_named(tmp_path, unpack):
    file = write(tmp_path / "x.gguf", "mamba", {"a": np.ones(2)}, {})
    sentence = "architecture 'mamba'; supported are llama, qwen2, qwen3, gemma2, gemma3"
    with pytest.raises(ValueError, match=sentence):
        unpack(file)


def test_a_truncated_file_is_refused(tiny_gguf, unpack):
    file, _ = tiny_gguf()
    data = file.read_bytes()
    lengths = [0, 3, 4, 24, 100, 3000, *range(1000, len(data), 9001), len(data) - 1]
    for length in lengths:
        file.write_bytes(data[:length])
        with pytest.raises(
            ValueError, match=r"tiny.gguf is not a whole GGUF file \(.+"
        ):
            unpack(file)


def test_an_array_that_claims_to_be_endless_is_refused(tmp_path, unpack):
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    key = struct.pack("<Q", 1) + b"k"
    array = struct.pack("<IIQ", 9, 6, 1 << 60) + struct.pack("<f", 0) * 100
    file = tmp_path / "bomb.gguf"
    file.write_bytes(header + key + array)
    with pytest.raises(
        ValueError, match="bomb.gguf is not a whole .* ends before byte"
    ):
        unpack(file)


def test_without_the_gguf_package_its_extra_is_named(tiny_gguf, unpack, monkeypatch):
    file, _ = tiny_gguf()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'ifp-mlx\[gguf\]'$"):
        unpack(file)


def test_the_converter_takes_a_gguf_file(tiny_gguf, tmp_path):
    file, model = tiny_gguf("qwen3")
    out = from_pytorch.convert(file, tmp_path / "out", dtype="float32")
    assert mx.array_equal(source_of(out).dense()(TOKENS), model(TOKENS))
    assert not (out / "unpacked").exists()
    half = from_pytorch.convert(file, tmp_path / "half", quantize=True, q_group_size=32)
    config = source_of(half).config
    assert config["quantization"] == {"group_size": 32, "bits": 4, "mode": "affine"}
    assert source_of(half).dense().model.norm.weight.dtype == mx.bfloat16
