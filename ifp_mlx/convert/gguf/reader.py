"""A GGUF file as a model folder: weights, configuration and tokenizer by HF names."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .shards import write_shards
from .vocabulary import (
    CUTS,
    LLAMA3,
    NORMAL,
    UNKNOWN,
    byte_level_bpe,
    sentencepiece_bpe,
    write_tokenizer,
)

if TYPE_CHECKING:
    import mlx.core as mx
    import numpy as np
    from tokenizers import Tokenizer

# GGUF architecture: mlx-lm's model_type and the HF class.
FAMILIES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}

# The number of layers of the 27B models, whose attention is scaled by D / heads
# instead of the head's width. Nothing else in the file tells.
GEMMA_27B = {"gemma2": 46, "gemma3": 62}

# Tokens that end a turn, whatever the file calls its end of text.
END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>")

# Weights are dequantised in blocks of rows, of about this many values each.
BLOCK_VALUES = 1 << 24

T = TypeVar("T")
REQUIRED: Any = object()


def unpack_gguf(file: Path, folder: Path, dtype: "mx.Dtype") -> None:
    """Write the model in ``file`` to ``folder``, with its weights dequantised.

    Args:
        file: the GGUF file.
        folder: an empty folder.
        dtype: of the weights written.

    Raises:
        ImportError: without the ``gguf`` package.
        ValueError: if the file is damaged, or holds something unsupported.
    """
    gguf = GGUF(file)
    config = _config(gguf)
    sources = _sources(gguf, config)
    tokenizer = _write_tokenizer(gguf, folder)
    if (count := tokenizer.get_vocab_size()) > config["vocab_size"]:
        raise ValueError(
            f"{file} has {count} tokens, but embeddings for {config['vocab_size']}; "
            "fetch another file."
        )
    ends = [gguf.token_id("eos"), gguf.token_id("eot")]
    ends += [tokenizer.token_to_id(token) for token in END_OF_TURN]
    config["eos_token_id"] = sorted({i for i in ends if i is not None})
    config["bos_token_id"] = gguf.token_id("bos")
    config["torch_dtype"] = str(dtype).rpartition(".")[2]
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "README.md").write_text(_card(gguf), encoding="utf-8")
    write_shards(folder, _weights(gguf, config, sources, dtype), count=len(sources))


class GGUF:
    """The metadata and tensors of a GGUF file; its faults become clear errors."""

    def __init__(self, file: Path):
        import numpy as np

        try:
            import gguf
        except ImportError as error:
            raise ImportError(
                f"{file} is a GGUF file; to read it: pip install 'ifp-mlx[gguf]'"
            ) from error

        class Reader(gguf.GGUFReader):
            data: Any

            def _get(self, offset: int, dtype: Any, count: int = 1, **way: Any) -> Any:
                self.data = self.data.view(np.ndarray)  # memmap makes slow slices
                part = super()._get(offset, dtype, count, **way)
                # Without this an array that claims a huge length never ends.
                if len(part) != count:
                    raise ValueError(f"it ends before byte {offset}")
                return part

        try:
            reader = Reader(file)
            self._fields: dict[str, Any] = {
                k: v.contents() for k, v in reader.fields.items()
            }
        except Exception as error:  # whatever the reader raises
            raise ValueError(
                f"{file} is not a whole GGUF file ({type(error).__name__}: {error}); "
                "fetch it again."
            ) from error
        self.file = file
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.architecture = self.get("general.architecture", str)
        if self.architecture not in FAMILIES:
            raise ValueError(
                f"{file} holds the architecture {self.architecture!r}; supported are "
                f"{', '.join(FAMILIES)}. Convert the original checkpoint instead."
            )
        if (parts := self.get("split.count", int, 1)) > 1 or reader.byte_order == "S":
            raise ValueError(
                f"{file} is one of {parts} parts, or big-endian; "
                "merge it with llama-gguf-split, or fetch a plain file."
            )

    def get(self, key: str, kind: type[T], default: Any = REQUIRED) -> T:
        """Return one value; ``{arch}`` in ``key`` stands for the architecture."""
        key = key.format(arch=self._fields.get("general.architecture"))
        value = self._fields.get(key, default)
        if value is REQUIRED:
            raise ValueError(f"{self.file} has no {key}; fetch another file.")
        if kind is float and isinstance(value, int | float):
            value = float(f"{value:.7g}")  # stored as float32
        if not isinstance(value, kind) and value is not default:
            raise ValueError(
                f"{key} in {self.file} is {str(value)[:40]}, not one {kind.__name__}; "
                "such models are not supported."
            )
        return value

    def token_id(self, role: str) -> int | None:
        """Return the id of the token that plays ``role``, if the file names one."""
        role = {"unk": "unknown", "pad": "padding"}.get(role, role)
        return self.get(f"tokenizer.ggml.{role}_token_id", int, None)


def _card(gguf: GGUF) -> str:
    """Return a model card with the name and the licence that the file states."""
    from huggingface_hub import ModelCardData

    licence = gguf.get("general.license", object, None)
    named = licence if isinstance(licence, str) else None  # some files list several
    data = ModelCardData(library_name="mlx", license=named)
    name = gguf.get("general.name", str, gguf.file.stem)
    return f"---\n{data}\n---\n\n# {name}\n\nConverted from {gguf.file.name}.\n"


def _config(gguf: GGUF) -> dict[str, Any]:
    """Return the config.json of the model in ``gguf``, without its tokens."""
    tensors = gguf.tensors
    layers = gguf.get("{arch}.block_count", int)
    for name in ("token_embd.weight", f"blk.{layers - 1}.attn_norm.weight"):
        if name not in tensors:
            raise ValueError(f"{gguf.file} lacks {name}; fetch another file.")
    model_type, hf_class = FAMILIES[gguf.architecture]
    hidden = gguf.get("{arch}.embedding_length", int)
    heads = gguf.get("{arch}.attention.head_count", int)
    head_dim = gguf.get("{arch}.attention.key_length", int, hidden // max(heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if (width := gguf.get(f"{{arch}}.{key}", int, head_dim)) != head_dim:
            raise ValueError(
                f"{key}={width} in {gguf.file} differs from the head width {head_dim}; "
                "mlx-lm's classes have no such models."
            )
    config = {
        "model_type": model_type,
        "architectures": [hf_class],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": gguf.get("{arch}.feed_forward_length", int),
        "num_attention_heads": heads,
        "num_key_value_heads": gguf.get("{arch}.attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": gguf.get("{arch}.attention.layer_norm_rms_epsilon", float),
        "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
        "max_position_embeddings": gguf.get("{arch}.context_length", int),
        "rope_theta": gguf.get("{arch}.rope.freq_base", float, 10000.0),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    }
    config["rope_scaling"] = _rope_scaling(gguf, config)
    for name in ("attn", "final"):
        cap = gguf.get(f"{{arch}}.{name}_logit_softcapping", float, 0.0)
        if cap and gguf.architecture != "gemma2":
            raise ValueError(
                f"{name}_logit_softcapping={cap} in {gguf.file} is not supported for "
                f"{gguf.architecture}; convert the original checkpoint instead."
            )
    if gguf.architecture.startswith("gemma"):
        config |= _gemma_config(gguf, config)
    return config


def _gemma_config(gguf: GGUF, config: dict[str, Any]) -> dict[str, Any]:
    scalar = config["head_dim"]
    if config["num_hidden_layers"] == GEMMA_27B[gguf.architecture]:
        scalar = config["hidden_size"] // config["num_attention_heads"]
    extra = {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "sliding_window": gguf.get("{arch}.attention.sliding_window", int, 4096),
    }
    if gguf.architecture == "gemma2":
        for name, usual in (("attn", 50.0), ("final", 30.0)):
            cap = gguf.get(f"{{arch}}.{name}_logit_softcapping", float, usual)
            extra[f"{name}_logit_softcapping"] = cap
        return extra
    pattern = "{arch}.attention.sliding_window_pattern"
    return extra | {
        "sliding_window_pattern": gguf.get(pattern, int, 6),
        "rope_local_base_freq": gguf.get("{arch}.rope.freq_base_swa", float, 10000.0),
    }


def _rope_scaling(gguf: GGUF, config: dict[str, Any]) -> dict[str, Any] | None:
    if "rope_freqs.weight" in gguf.tensors:
        return _llama3_scaling(gguf, config)
    old_factor = gguf.get("{arch}.rope.scale_linear", float, 1.0)
    factor = gguf.get("{arch}.rope.scaling.factor", float, old_factor)
    kind = gguf.get("{arch}.rope.scaling.type", str, "linear")
    if kind == "none" or (kind == "linear" and factor in (0, 1)):
        return None
    amplitudes = [
        gguf.get(f"{{arch}}.rope.scaling.{key}", float, 1.0)
        for key in ("attn_factor", "yarn_attn_factor")
    ]
    if (
        kind not in ("linear", "yarn")
        or amplitudes != [1.0, 1.0]
        or gguf.architecture == "gemma2"
    ):
        raise ValueError(
            f"rope.scaling.type={kind!r} in {gguf.file} (attention factors "
            f"{amplitudes}) is not supported for {gguf.architecture}; "
            "convert the original checkpoint instead."
        )
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        context = "{arch}.rope.scaling.original_context_length"
        scaling["original_max_position_embeddings"] = gguf.get(context, int)
        for name, usual in (("beta_fast", 32.0), ("beta_slow", 1.0)):
            key = f"{{arch}}.rope.scaling.yarn_{name}"
            scaling[name] = gguf.get(key, float, usual)
    return scaling


def _llama3_scaling(gguf: GGUF, config: dict[str, Any]) -> dict[str, Any]:
    """Find the parameters that give the factors stored in rope_freqs.weight."""
    import numpy as np
    from mlx_lm.models.rope_utils import Llama3RoPE

    factors = np.array(gguf.tensors["rope_freqs.weight"].data, np.float32)
    dims, base = config["head_dim"], config["rope_theta"]
    plain = base ** (np.arange(0, dims, 2) / dims)
    for context in (8192, *(1 << n for n in range(10, 18))):
        scaling = {
            "rope_type": "llama3",
            "factor": float(factors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": context,
        }
        rope = Llama3RoPE(dims, base=base, scaling_config=scaling)
        found = np.array(rope._freqs) / plain
        if found.shape == factors.shape and np.allclose(found, factors, rtol=1e-3):
            return scaling
    raise ValueError(
        f"rope_freqs.weight in {gguf.file} (largest factor {factors.max():g}) is no "
        "Llama 3 scaling; convert the original checkpoint instead."
    )


def _sources(gguf: GGUF, config: dict[str, Any]) -> dict[str, str]:
    """Return the tensor of ``gguf`` behind each parameter of mlx-lm's model.

    Raises:
        ValueError: if one is missing, left over, or of another shape.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    from mlx.utils import tree_flatten
    from mlx_lm.utils import _get_classes

    try:
        model_class, args_class = _get_classes(config)
        model = model_class(args_class.from_dict(config))
    except Exception as error:  # whatever odd sizes cause
        raise ValueError(
            f"The metadata of {gguf.file} describe no {config['model_type']} model "
            f"({type(error).__name__}: {error}); fetch another file."
        ) from error
    (arch,) = (k for k, v in MODEL_ARCH_NAMES.items() if v == gguf.architecture)
    names = get_tensor_name_map(arch, config["num_hidden_layers"])
    sources = {}
    for name, parameter in tree_flatten(model.parameters()):
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        source = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if source not in gguf.tensors:
            raise ValueError(
                f"{gguf.file} lacks {source} (for {name}); fetch another file."
            )
        shape = tuple(int(n) for n in reversed(gguf.tensors[source].shape))
        if shape != parameter.shape:
            raise ValueError(
                f"{source} in {gguf.file} has shape {shape}, but its metadata ask for "
                f"{parameter.shape}; fetch another file."
            )
        sources[name] = source
    left = gguf.tensors.keys() - sources.values() - {"rope_freqs.weight"}
    if left:
        raise ValueError(
            f"{gguf.file} holds {min(left)}, which mlx-lm's {config['model_type']} "
            "has no place for; convert the original checkpoint instead."
        )
    return sources


def _weights(
    gguf: GGUF, config: dict[str, Any], sources: dict[str, str], dtype: "mx.Dtype"
) -> Iterator[tuple[str, "mx.array"]]:
    """Yield each parameter as the original checkpoint has it."""
    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }
    for name, source in sources.items():
        tensor = gguf.tensors[source]
        rows = tensor.data
        part = source.split(".")[-2]
        if gguf.architecture == "llama" and part in heads:
            rows = _rotate_halves(rows, heads[part])
        # Gemma multiplies by 1 + w; GGUF files store the sum.
        offset = 1 if gguf.architecture.startswith("gemma") and "norm" in part else 0
        try:
            yield name, _dequantised(rows, tensor.tensor_type, offset, dtype)
        except NotImplementedError as error:
            raise ValueError(
                f"{source} in {gguf.file} is quantised as {tensor.tensor_type.name}, "
                "which the gguf package cannot read; fetch another file."
            ) from error


def _rotate_halves(rows: "np.ndarray", heads: int) -> "np.ndarray":
    """Undo llama.cpp's row order, which pairs rotated rows ``2i`` and ``2i + 1``.

    HF models pair ``i`` and ``i + head_dim / 2``. Works on quantised rows too.
    """
    return (
        rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
    )


def _dequantised(
    rows: "np.ndarray", kind: Any, offset: int, dtype: "mx.Dtype"
) -> "mx.array":
    import mlx.core as mx
    from gguf.quants import dequantize

    step = max(1, BLOCK_VALUES // (rows[:1].size or 1))
    blocks = []
    for start in range(0, len(rows), step):
        values = dequantize(rows[start : start + step], kind)
        blocks.append(mx.array(values - offset if offset else values).astype(dtype))
        mx.eval(blocks)
    return mx.concatenate(blocks)


def _column(
    gguf: GGUF, name: str, kind: type, count: int, default: Any = REQUIRED
) -> list:
    """Return a list that the file has with one value for each token."""
    values = gguf.get(f"tokenizer.ggml.{name}", list, default)
    if len(values) != count or not all(isinstance(value, kind) for value in values):
        raise ValueError(
            f"tokenizer.ggml.{name} in {gguf.file} does not hold one {kind.__name__} "
            f"for each of {count} tokens; fetch the file again."
        )
    return values


def _write_tokenizer(gguf: GGUF, folder: Path) -> "Tokenizer":
    count = len(gguf.get("tokenizer.ggml.tokens", list))
    tokens = _column(gguf, "tokens", str, count)
    kinds = _column(gguf, "token_type", int, count, [NORMAL] * count)
    model = gguf.get("tokenizer.ggml.model", str)
    roles = {role: gguf.token_id(role) for role in ("bos", "eos", "unk", "pad")}
    ids = {role: i for role, i in roles.items() if i is not None}
    if not all(0 <= i < count for i in ids.values()):
        raise ValueError(
            f"{gguf.file} has {count} tokens, but the special ones are {ids}; "
            "fetch the file again."
        )
    if model == "llama":
        add_bos = True
        unknown = kinds.index(UNKNOWN) if UNKNOWN in kinds else ids.get("unk", 0)
        tokenizer = sentencepiece_bpe(
            tokens,
            _column(gguf, "scores", float, count),
            kinds,
            unknown=unknown,
            prefix_space=gguf.get("tokenizer.ggml.add_space_prefix", bool, True),
        )
    elif model == "gpt2":
        cut = gguf.get("tokenizer.ggml.pre", str)
        add_bos = CUTS.get(cut) is LLAMA3
        merges = gguf.get("tokenizer.ggml.merges", list)
        tokenizer = byte_level_bpe(tokens, merges, kinds, cut=cut)
    else:
        raise ValueError(
            f"tokenizer.ggml.model={model!r} in {gguf.file} is not supported; "
            "supported are llama (SentencePiece) and gpt2 (byte-level BPE)."
        )
    template = gguf.get("tokenizer.chat_template", str, None)
    write_tokenizer(
        folder,
        tokenizer,
        ids,
        add_bos=gguf.get("tokenizer.ggml.add_bos_token", bool, add_bos),
        config=None if template is None else {"chat_template": template},
    )
    return tokenizer
