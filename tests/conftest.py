"""Tiny random models in every supported family, and a machine without a network."""

import contextlib
import gc
import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before anything imports the hub client or MLX: tests are offline, and mx.compile
# would call a C++ compiler for every fused kernel of a CPU build.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
os.environ.setdefault("MLX_DISABLE_COMPILE", "1")

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import settings
from mlx.utils import tree_flatten

if TYPE_CHECKING:
    import mlx.nn as nn

    from ifp_mlx.model.checkpoint import IFPModel
    from ifp_mlx.selection.masks import Selection

# The same examples in every run, and no clock: a failure is there for everyone, or for
# no one.
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")

ROOT = Path(__file__).parent.parent
FAMILIES_FILE = ROOT / "examples/benchmarks/families/families.json"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "ministral3")

# How llama 3.1 scales positions.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# The same with tools: shown before all messages, called as JSON between two marks.
TOOLS_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}\n{% endif %}"
    "Tools:\n{% for tool in tools %}{{ tool['function'] | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if not (tools and loop.first and m['role'] == 'system') %}"
    "<|im_start|>{{ m['role'] }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m['content'] }}{% for called in m.tool_calls or [] %}"
    "{% set tool_call = called['function'] %}"
    '<tool_call>{"name": "{{ tool_call.name }}", "arguments": '
    "{{ tool_call.arguments | tojson }}}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module", autouse=True)
def known_objects_stay() -> None:
    """Let garbage collection pass by what was there before this file's tests: the
    session's modules and tests, which an engine would go through at every request.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise OSError("tests have no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def short_texts() -> tuple[list[Any], list[Any]]:
    """The beginnings of two chats of the calibration text, and a first card's dialogue."""
    from ifp_mlx.model.trial import dialogues
    from ifp_mlx.selection.calibration import calibration_chats

    chats = calibration_chats()[:2]
    begun = [[m | {"content": m["content"][:60]} for m in chat] for chat in chats]
    return begun, dialogues()[:1]


@pytest.fixture(autouse=True)
def short_calibration(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    short_texts: tuple[list[Any], list[Any]],
) -> None:
    """Tiny models read a short calibration text: most tests ask for a prior by the way."""
    from ifp_mlx.model import checkpoint, trial

    if request.node.get_closest_marker("real") is None:
        chats, some = short_texts
        monkeypatch.setattr(checkpoint, "calibration_chats", lambda: chats)
        monkeypatch.setattr(trial, "dialogues", lambda: some)


def tiny_config(family: str, **changes: Any) -> dict[str, Any]:
    """Return the config.json of a 3-layer random model of ``family``."""
    config: dict[str, Any] = {
        "model_type": family,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-6,
        "vocab_size": 259,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": family.startswith("gemma"),
        "eos_token_id": 258,
    }
    if family in ("gemma2", "gemma3_text"):
        config["query_pre_attn_scalar"] = 8
    if family == "gemma2":
        config |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    if family == "gemma3_text":
        config |= {"sliding_window": 16, "sliding_window_pattern": 2}
    if family == "ministral3":
        config["rope_parameters"] = {
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 128,
        }
    return config | changes


def tiny_model(family: str, seed: int = 0, **changes: Any) -> "nn.Module":
    """Return a random fp32 model of ``family``: mlx-lm's own class, not a copy."""
    from mlx_lm.utils import _get_classes

    config = tiny_config(family, **changes)
    model_class, args_class = _get_classes(config)
    return randomised(model_class(args_class.from_dict(config)), seed)


@cache
def families() -> dict[str, dict]:
    """Return the small config.json of every model type of mlx-lm that can be built."""
    return json.loads(FAMILIES_FILE.read_text())


def family_units() -> dict[str, str]:
    """Return what is selected of each type that works, as its page says."""
    page = FAMILIES_FILE.with_suffix(".md").read_text()
    rows = (line.strip("| ").split(" | ") for line in page.splitlines())
    return {row[0]: row[1] for row in rows if row[1:2] in (["channel"], ["expert"])}


def thinned(ways: Iterable[Any], every: int) -> list[Any]:
    """Return parameters of which one in ``every`` is tried by `make test`; the others
    are long. For grids in which a value says little about the test: every model type
    has a test that is not thinned.
    """
    return [
        pytest.param(*_as_tuple(way), marks=[pytest.mark.long] if n % every else [])
        for n, way in enumerate(ways)
    ]


def by_turns(values: Iterable[Any], every: int = 1) -> list[Any]:
    """Return each value beside ``True`` or ``False``, in turns; beside the other it is
    long, and so are all but one in ``every`` values, an odd number.
    """
    pairs = ((_as_tuple(v), n % 2 == 0) for n, v in enumerate(values))
    ways = ((*v, way) for v, first in pairs for way in (first, not first))
    return thinned(ways, 2 * every)


def _as_tuple(way: Any) -> tuple[Any, ...]:
    return way if isinstance(way, tuple) else (way,)


def randomised(model: "nn.Module", seed: int = 0) -> "nn.Module":
    """Give a model random fp32 weights; return it."""
    rng = np.random.default_rng(seed)
    weights = [
        (name, mx.array(rng.normal(0, 0.3, value.shape).astype(np.float32)))
        for name, value in tree_flatten(model.parameters())
    ]
    model.load_weights(weights)
    model.eval()
    mx.eval(model.parameters())
    return model


def write_tokenizer(
    folder: Path, chat_template: str | None = CHAT_TEMPLATE, *marks: str
) -> None:
    """Write a byte-level tokenizer: 256 bytes, then three special tokens, then marks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(list(marks))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_folder(
    folder: Path, family: str = "llama", seed: int = 0, **changes: Any
) -> Path:
    """Write a tiny random model as an ordinary folder and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_model(family, seed, **changes)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(
        str(folder / "model.safetensors"), weights, metadata={"format": "mlx"}
    )
    config = tiny_config(family, **changes)
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return folder


MIXED: dict[str, dict[str, Any] | bool] = {
    "model.layers.0.mlp.down_proj": {"group_size": 128, "bits": 3, "mode": "affine"},
    "model.layers.1.mlp.gate_proj": {"group_size": 32, "bits": 8, "mode": "affine"},
    "model.layers.2.mlp.down_proj": False,
    "lm_head": False,
}


def write_quantised(
    folder: Path,
    mode: str = "affine",
    group: int = 64,
    bits: int = 4,
    mixed: bool = False,
) -> Path:
    """Write a folder as mlx_lm.convert -q does, with parameters per path if mixed."""
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    write_folder(folder, intermediate_size=512, hidden_size=128, head_dim=32)
    model, config = load_model(folder)

    def params(path: str, module: "nn.Module") -> dict[str, Any] | bool:
        how: dict[str, Any] = {"group_size": group, "bits": bits, "mode": mode}
        return MIXED.get(path, how) if hasattr(module, "to_quantized") else False

    predicate = params if mixed else None
    with contextlib.redirect_stdout(None):  # it prints
        model, config = quantize_model(
            model, config, group, bits, mode, quant_predicate=predicate
        )
    save_model(folder, model)
    save_config(config, folder / "config.json")
    return folder


def write_adapter(
    folder: Path,
    model: Path,
    kind: str = "lora",
    keys: list[str] | None = None,
    seed: int = 1,
    layers: int = 2,
) -> Path:
    """Write an adapter of a model as mlx_lm.lora does, random instead of trained; it
    changes the last layers.
    """
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    numbers = {"rank": 4, "scale": 2.0, "dropout": 0.0} | (
        {"keys": keys} if keys else {}
    )
    dense, _ = load_model(model)
    dense.freeze()
    if kind == "full":
        for layer in dense.layers[-layers:]:
            layer.unfreeze()
    else:
        linear_to_lora_layers(dense, layers, numbers, use_dora=kind == "dora")
    weights = tree_flatten(dense.trainable_parameters(), destination={})
    mx.random.seed(seed)
    weights = {n: w + 0.1 * mx.random.normal(w.shape) for n, w in weights.items()}
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"fine_tune_type": kind, "num_layers": layers, "lora_parameters": numbers}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def add_prior(model: "IFPModel", seed: int = 5, sketch: int = 0) -> None:
    """Write a random prior, and a sketch of so many rows."""
    rng = np.random.default_rng(seed)
    arrays = {"scores": rng.random((model.layers, model.channels), np.float32)}
    for layer in range(model.layers if sketch else 0):
        rows = rng.normal(0, 0.01, (sketch, model.channels))
        arrays[f"sketch.{layer}"] = rows.astype(np.float16)
    prior = {name: mx.array(array) for name, array in arrays.items()}
    mx.save_safetensors(str(model.path / "prior.safetensors"), prior)


def train_sentencepiece(folder: Path, *lines: str) -> None:
    """Put a small tokenizer.model into a model folder, in place of its tokenizer.json."""
    from sentencepiece import SentencePieceTrainer

    SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 9),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=290,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.json").unlink()


def add_card(model: "IFPModel", promises: dict[float, float]) -> None:
    """Write a card of a model that promises an agreement for each keep."""
    from ifp_mlx.model.card import Card, Point, fingerprint_of, save_card

    points = (Point("any", keep, 1, share, 0.1) for keep, share in promises.items())
    about = ("tiny", model.plan.unit, "blend", fingerprint_of(model), 9, 1.0, "0")
    save_card(model, Card(*about, points=tuple(points), dense_right={}))


def fetch(name: str) -> Path:
    run = subprocess.run(
        [sys.executable, ROOT / "examples/fetch.py", name],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return Path(run.stdout.splitlines()[-1])


def write_family(
    folder: Path, name: str, *, quantised: bool = False, **changes: Any
) -> Path:
    """Write a small random model of any type as an ordinary folder; return the folder."""
    from mlx_lm.utils import quantize_model, save_config, save_model

    from ifp_mlx.slicing.stock import build

    folder.mkdir(parents=True)
    config = families()[name] | {"eos_token_id": 258} | changes
    model = randomised(build(config))
    if quantised:
        fits = lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % 32 == 0  # noqa: E731
        with contextlib.redirect_stdout(None):  # it prints
            model, config = quantize_model(model, config, 32, 4, quant_predicate=fits)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    write_tokenizer(folder)
    return folder


def run_command(
    main: Callable[[list[str]], None],
    capsys: pytest.CaptureFixture[str],
    *arguments: Any,
) -> tuple[int | str | None, str, str]:
    """Run a command's ``main``; return its exit status, stdout and stderr."""
    status: int | str | None = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@contextlib.contextmanager
def full_disk(room: int = 0) -> Iterator[None]:
    """Let no file take more than ``room`` bytes: to who writes, the disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def swept(
    model: "IFPModel", instruction: Any, *, progress: Any = iter, **options: Any
) -> "tuple[Selection, nn.Module, list[Any] | None]":
    """Return selection, compact model and KV cache of a request, plain by default."""
    from ifp_mlx.model.decide import decide
    from ifp_mlx.selection.request import Request

    request = Request(instruction=instruction, **{"compensate": False} | options)
    made = model.prepare(decide(request, model), progress=progress)
    return made.selection, made.model, made.kv


def relative_error(found: mx.array, expected: mx.array) -> float:
    """Return the largest difference as a share of the largest expected value."""
    return float(mx.abs(found - expected).max() / mx.abs(expected).max())


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "tiny")
