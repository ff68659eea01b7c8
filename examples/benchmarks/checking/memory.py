"""Exact answers of a model whose dense weights exceed a process's memory.

A random float32 model of Llama's class, made here. Its answers mean nothing; it only
counts that they are the same.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from examples.benchmarks.store.store_check import child, write_empty
from ifp_mlx import load
from ifp_mlx.files.atomic import new_folder
from ifp_mlx.files.companions import copy_companions
from ifp_mlx.selection.prompts import as_messages, tokenize
from ifp_mlx.slicing.stock import build
from ifp_mlx.storage.folder import SHIPPED
from ifp_mlx.storage.writer import write_store

PROMPT = "Translate to French: Germany"
TOKENS = 16
# Bytes that a process may allocate, by the kept share.
LIMITS = {0.5: 2_200_000_000, 0.25: 1_600_000_000}
SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "intermediate_size": 8192,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "vocab_size": 512,
    "eos_token_id": 0,
}


def write_random(folder: Path) -> Path:
    """Write the model; a layer of it is in memory at a time."""
    if folder.exists():
        return folder
    shapes = tree_flatten(build(SHAPE).parameters(), destination={})
    rng = np.random.default_rng(0)
    groups: dict[str, list[str]] = {}
    for name in shapes:
        layer = ".".join(name.split(".")[:3]) if ".layers." in name else "other"
        groups.setdefault(layer, []).append(name)
    with new_folder(folder) as scratch:
        for number, names in enumerate(groups.values(), 1):
            tensors = {name: _random(rng, shapes[name].shape) for name in names}
            file = f"model-{number:05}-of-{len(groups):05}.safetensors"
            mx.save_safetensors(str(scratch / file), tensors, {"format": "mlx"})
        (scratch / "config.json").write_text(json.dumps(SHAPE))
        copy_companions(SHIPPED, scratch)
    return folder


def _random(rng: np.random.Generator, shape: tuple[int, ...]) -> mx.array:
    if len(shape) == 1:
        return mx.ones(shape)
    numbers = rng.normal(0, 2 * shape[-1] ** -0.5, shape)
    return mx.array(numbers.astype(np.float32))


def measure(scratch: Path) -> dict[str, Any]:
    """Return each process's peak in bytes, and whether the answers are the same."""
    plain = write_random(scratch / "wide")
    store = scratch / "wide-store"
    if not store.exists():
        write_store(plain, store)
    shutil.rmtree(scratch / "empty", ignore_errors=True)
    empty = write_empty(scratch / "empty", plain)
    model, _ = load(plain)
    expected = _dense_answer(model)
    found: dict[str, Any] = {"dense": model.footprint.dense_bytes}
    for keep, limit in LIMITS.items():
        case: dict[str, Any] = {"limit": limit} | _parts(model, keep)
        case["idle"] = _peak(_generate(empty, keep))
        for name, folder in {"plain": plain, "store": store}.items():
            lines = _generate(folder, keep, limit)
            said = json.loads(lines[-2])
            same = said["text"] == expected
            case[name] = {"peak": _peak(lines), "same": same, "check": said["check"]}
        found[str(keep)] = case
    return found


def _generate(folder: Path, keep: float, limit: int = 0) -> list[str]:
    command = ["ifp_mlx.generate", "--model", folder, "--prompt", PROMPT]
    command += ["--max-tokens", TOKENS, "--keep", keep, "--check", "exact", "--json"]
    status, lines = child(*command, limit=limit)
    if status:
        raise SystemExit(f"{folder}: generate ended with status {status}: {lines}")
    return lines


def _peak(lines: list[str]) -> int:
    return int(json.loads(lines[-1])["peak"])


def _parts(model: Any, keep: float) -> dict[str, int]:
    """Return the bytes of what has to be in memory."""
    footprint = model.footprint
    context = len(tokenize(model.tokenizer, as_messages(PROMPT))) + TOKENS
    sizes = model.select(PROMPT, keep=keep, selector="random").sizes
    dropped = max(model.channels - k for k in sizes)
    rest = round(dropped * max(footprint.layer_bytes))
    return {
        "compact": footprint.compact_bytes(sizes),
        "rest": rest,
        "kv": footprint.kv_bytes(-(-context // 256) * 256),
    }


def _dense_answer(model: Any) -> str:
    from mlx_lm import generate

    tokens = tokenize(model.tokenizer, as_messages(PROMPT))
    return str(generate(model.dense(), model.tokenizer, tokens, max_tokens=TOKENS))
