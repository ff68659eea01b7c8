"""Try every mlx-lm model type that has gate, up and down projections; write families.md.

    python -m examples.benchmarks.families.families

Small random models of mlx-lm's own classes, so nothing is fetched. A row says whether
masking and slicing the same channels gives the same logits, whether keeping every
channel gives the stock logits bit for bit, and whether a uniform compact model is a
stock model with a smaller `intermediate_size`, which any program can load.
"""

from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ifp_mlx.selection import top_k
from ifp_mlx.slicing import pruning, reading

PAGE = Path(__file__).with_suffix(".md")
TOKENS = [5, 9, 77, 200, 13, 40]
TOLERANCE = 1e-5
WIDTH, SMALLER = 64, 24

BASE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "intermediate_size": WIDTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "layer_norm_eps": 1e-6,
    "vocab_size": 259,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "sliding_window": 16,
    "use_qk_norm": True,
}
SCALES = {
    "logits_scaling": 2.0,
    "attention_multiplier": 0.35,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4}
MINICPM = {"dim_model_base": 32, "scale_depth": 1.4, "scale_emb": 2.0}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "linear_allow_neg_eigval": True,
}
NESTED = {"text_config": BASE | {"model_type": "llama"}}
EXPERTS = {
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
}
GEMMA3N = BASE | {
    "model_type": "gemma3n_text",
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "activation_sparsity_pattern": [0.0] * 4,
    "final_logit_softcapping": 30.0,
    "rope_local_base_freq": 10000.0,
    "query_pre_attn_scalar": 8,
    "rope_scaling": None,
    "altup_num_inputs": 2,
    "altup_coef_clip": 120.0,
    "altup_correct_scale": True,
    "altup_active_idx": 0,
    "laurel_rank": 8,
}
TYPES = ["full_attention", "sliding_attention"] * 2

# What each model type needs beyond BASE. The first group has separate gate, up and
# down projections by its source; the second is reached through another class, or has
# them in some configurations; the third shows what is refused.
SEPARATE: dict[str, dict[str, Any]] = {
    "afm7": {
        "hidden_dim": 32,
        "num_layers": 4,
        "num_kv_reuse_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "hidden_dim_scale_factor": 2.0,
    },
    "baichuan_m1": {
        "sliding_window_layers": [1],
        "conv_window": 2,
        "tie_word_embeddings": False,
    },
    "cohere": {},
    "cohere2": {"sliding_window_pattern": 2},
    "ernie4_5": {},
    "exaone4": {
        "rope_scaling": {"rope_type": "default", "factor": 1.0},
        "sliding_window_pattern": "LLLG",
    },
    "falcon_h1": {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
    },
    "gear": {"layer_types": ["conv_mixer", "full_attention"] * 2},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 8.0},
    "gemma3_text": {"query_pre_attn_scalar": 8.0, "sliding_window_pattern": 2},
    "gemma3n, no layer sparse": {"model_type": "gemma3n", "text_config": GEMMA3N},
    "granite": SCALES,
    "helium": {},
    "hunyuan_v1_dense": {},
    "internlm3": {},
    "iquestloopcoder": {},
    "lille-130m": {
        "block_size": 64,
        "n_embd": 256,
        "n_head": 4,
        "n_kv_heads": 2,
        "n_layer": 4,
    },
    "llama": {},
    "llama4_text": {"intermediate_size_mlp": WIDTH, "no_rope_layers": [1, 1, 1, 0]},
    "mimo": {},
    "minicpm": MINICPM,
    "minicpm3": MINICPM
    | LATENT
    | {
        "qk_nope_head_dim": 4,
        "rope_scaling": {
            "type": "longrope",
            "original_max_position_embeddings": 512,
            "short_factor": [1.0, 1.0],
            "long_factor": [1.0, 1.0],
        },
    },
    "ministral3": {
        "rope_parameters": {
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 128,
        }
    },
    "mistral": {},
    "muse_glimmer": {},
    "nanbeige": {},
    "nemotron-nas": {
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 6.0}}
        ]
        * 4
    },
    "olmo2": {},
    "olmo3": {"layer_types": TYPES},
    "olmo_hybrid": LINEAR,
    "plamo": {"n_shared_head": 2},
    "qwen2": {},
    "qwen3": {},
    "recurrent_gemma": {
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "attention_window_size": 16,
        "block_types": ["recurrent", "recurrent", "attention"],
        "num_key_value_heads": 1,
    },
    "seed_oss": {},
    "smollm3": {},
    "spark2_5": {
        "rope_parameters": {
            kind: {"rope_theta": 10000.0, "partial_rotary_factor": 1.0}
            for kind in ("full_attention", "sliding_attention")
        },
        "layer_types": TYPES,
    },
    "stablelm": {"use_qkv_bias": True, "partial_rotary_factor": 0.5},
    "telechat3": {},
    "youtu_llm": LATENT
    | {"v_head_dim": 8, "qk_nope_head_dim": 4, "num_key_value_heads": 4},
}
WRAPPED: dict[str, dict[str, Any]] = {
    "deepseek, no experts": {"model_type": "deepseek"},
    "gemma3": {
        "text_config": BASE | {"model_type": "gemma3_text", "sliding_window_pattern": 2}
    },
    "mistral3": NESTED,
    "pixtral": NESTED,
    "qwen3_5": {"text_config": BASE | LINEAR | {"model_type": "qwen3_5"}},
    "qwen2_vl": {"text_config": BASE | {"model_type": "qwen2"}},
    "qwen3_vl": {"text_config": BASE | {"model_type": "qwen3"}},
}
OTHERS: dict[str, dict[str, Any]] = {
    "exaone": {"layer_norm_epsilon": 1e-6, "num_layers": 4},
    "gemma3n": {
        "text_config": GEMMA3N
        | {"activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0]},
    },
    "glm": {},
    "glm4": {"partial_rotary_factor": 0.5},
    "internlm2": {},
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "olmoe": EXPERTS,
    "phi3": {},
    "plamo2": {},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3_moe": EXPERTS | {"decoder_sparse_step": 2, "mlp_only_layers": [0]},
}
ALL = SEPARATE | WRAPPED | OTHERS


class Verdict(NamedTuple):
    """What came out for one model type.

    Attributes:
        refused: why it has no channels to select, or ``None``.
        error: largest relative difference of masked and sliced logits.
        whole: whether keeping every channel gives the stock logits bit for bit.
        plain: whether a uniform slice is the stock class with a smaller width.
    """

    refused: str | None
    error: float = 0.0
    whole: bool = False
    plain: bool = False

    @property
    def works(self) -> bool:
        """Whether this type can be used."""
        return self.refused is None and self.whole and self.error <= TOLERANCE


def config_of(model_type: str, **changes: Any) -> dict[str, Any]:
    """Return the config.json of a small model."""
    config = BASE | {"model_type": model_type} | ALL[model_type]
    for key, value in changes.items():
        home = config
        if "text_config" in config:
            home = config["text_config"] = dict(config["text_config"])
        home[key] = value
    return config


def build(model_type: str, **changes: Any) -> Any:
    """Return a small random fp32 model of mlx-lm's own class."""
    from mlx_lm.utils import _get_classes

    config = config_of(model_type, **changes)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    rng = np.random.default_rng(0)
    weights = [
        (name, mx.array(rng.normal(0, 0.3, value.shape).astype(np.float32)))
        for name, value in tree_flatten(model.parameters())
    ]
    model.load_weights(weights)
    model.eval()
    return model


def judge(model_type: str) -> Verdict:
    """Try one model type."""
    model, tokens = build(model_type), mx.array([TOKENS])
    try:
        L, F = pruning.dense_shape(model)
    except ValueError as error:
        why = str(error).split(": ", 1)[1].split("; tested")[0]
        return Verdict(why)
    stock = model(tokens)
    scores = reading.activation_scores(model, TOKENS)
    sizes = [F // 2 + 4 * (layer % 2) for layer in range(L)]
    selection = top_k.select(scores, sizes)
    masked = pruning.mask_model(model)
    pruning.set_masks(masked, mx.ones((L, F)))
    whole = bool(mx.array_equal(model(tokens), stock))
    pruning.set_masks(masked, selection.mask())
    expected = model(tokens)
    sliced = build(model_type)
    pruning.slice_model(sliced, selection)
    difference = mx.abs(sliced(tokens) - expected).max() / mx.abs(expected).max()
    moved = mx.abs(stock - expected).max()
    if not moved > 0:  # or nothing was tried
        raise ValueError(f"Masking {model_type} changed nothing.")
    return Verdict(None, float(difference), whole, _is_plain(model_type, L, F))


def _is_plain(model_type: str, layers: int, channels: int) -> bool:
    compact = build(model_type)
    small = top_k.select(mx.zeros((layers, channels)), [SMALLER] * layers)
    pruning.slice_model(compact, small)
    shapes = {name: w.shape for name, w in tree_flatten(compact.parameters())}
    stock = build(model_type, intermediate_size=SMALLER)
    return shapes == {name: w.shape for name, w in tree_flatten(stock.parameters())}


def page(verdicts: dict[str, Verdict]) -> str:
    """Return families.md."""
    from importlib.metadata import version

    minor = ".".join(version("mlx-lm").split(".")[:2])
    works = {name for name, verdict in verdicts.items() if verdict.works}
    lines = [
        "# Which model types work",
        "",
        f"{len(works)} of mlx-lm's model types, tried on small random models of its own",
        f"classes (mlx-lm {minor}, float32) by",
        "`python -m examples.benchmarks.families.families`,",
        "which wrote this page; a test holds the page to it. Real models were looked at",
        "for llama (SmolLM2) and gemma3_text (Gemma 3) alone.",
        "",
        "*Same*: masked and sliced logits differ by at most 1e-5 of the largest logit.",
        "*Whole*: keeping every channel gives the stock logits bit for bit. *Plain*: a",
        "compact model with equal widths is the stock class with a smaller",
        "`intermediate_size`, so `ifp_mlx.compact` can write it as a plain folder; the",
        "others are compact in memory only.",
        "",
        "| model type | same | whole | plain |",
        "|---|---|---|---|",
    ]
    for name, verdict in sorted(verdicts.items()):
        if verdict.refused is None:
            same = verdict.error <= TOLERANCE
            cells = (same, verdict.whole, verdict.plain)
            marks = " | ".join("yes" if cell else "no" for cell in cells)
            lines.append(f"| {name} | {marks} |")
    lines += [
        "",
        "Refused, with the reason given:",
        "",
        "| model type | why |",
        "|---|---|",
    ]
    for name, verdict in sorted(verdicts.items()):
        if verdict.refused is not None:
            lines.append(f"| {name} | {verdict.refused} |")
    lines += [
        "",
        "Projections that are fused (glm, glm4, phi3, plamo2) or have other names (exaone,",
        "internlm2) are not taken apart: masking would be easy, but slicing,",
        "filling a compact model, padding and the exports read three matrices, and each",
        "would need a second spelling, for quantised weights too, for few model types. Of",
        "mixtures of experts only the odd layer is dense, so that selecting its channels",
        "would save next to nothing; their experts are selected by the model itself.",
        "gemma3n as released keeps the largest channels of its first layers, which depends",
        "on all of them.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    PAGE.write_text(page({name: judge(name) for name in ALL}), encoding="utf-8")


if __name__ == "__main__":
    main()
