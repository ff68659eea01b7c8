"""Compare a channel store with its targets: bytes, seconds, memory, text.

    python -m examples.benchmarks.store.store_check --model models/smollm2
    python -m examples.benchmarks.store.store_check --model models/smollm2 --quantize
    python -m examples.benchmarks.store.store_check --large models/large

The folder of `--large` is made, and deleted afterwards.

Every ratio compares two things measured in turns in this one run. The last line is
JSON. Cold files were dropped from the system's cache with posix_fadvise, which does not
reach caches below the system.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ifp_mlx import load
from ifp_mlx.channel_store import main as make_store
from ifp_mlx.convert.from_pytorch import convert
from ifp_mlx.files.companions import copy_companions
from ifp_mlx.model.checkpoint import IFPModel
from ifp_mlx.selection.masks import Selection
from ifp_mlx.selection.top_k import select
from ifp_mlx.storage.layout import CHANNEL_FILE

KEEP = 1 / 3
# The last two are related; the store's order is learned from the others.
TASKS = [
    "Write a Python function that does what is described.",
    "Summarise the text in one sentence.",
    "Answer the question about the passage.",
    "Solve the arithmetic problem step by step.",
    "Correct the grammar of the sentence.",
    "Say whether the review is positive or negative.",
    "Explain the idea to a child.",
    "Write a short poem about the subject.",
    "Translate the sentence from English into French.",
    "Translate the sentence from English into Spanish.",
]
PROMPT = "Translate the sentence: The ferry leaves at noon."
LARGE = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 10,
    "intermediate_size": 12288,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "vocab_size": 49152,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Check a channel store.")
    add = parser.add_argument
    add("--model", type=Path, default=Path("models/smollm2"), help="a plain folder")
    add("--quantize", action="store_true", help="make it a 4-bit folder first")
    add("--large", type=Path, help="make a model of 3.8 GB here, check it, delete it")
    add("--scratch", type=Path, default=Path("models/store-check"))
    add("--turns", type=int, default=7)
    args = parser.parse_args()
    shutil.rmtree(args.scratch, ignore_errors=True)
    args.scratch.mkdir(parents=True)
    try:
        folder = args.model
        if args.large:
            folder = write_large(args.large, args.model)
        elif args.quantize:
            folder = convert(folder, args.scratch / "quantised", quantize=True)
        figures = check(folder, args.scratch, args.turns, bool(args.large))
    finally:
        shutil.rmtree(args.scratch, ignore_errors=True)
        if args.large:
            shutil.rmtree(args.large, ignore_errors=True)
    print(json.dumps({"model": folder.name} | figures))


def check(folder: Path, scratch: Path, turns: int, large: bool) -> dict[str, Any]:
    model, _ = load(folder)
    masks = made_up_masks(model) if large else task_masks(model)
    for number, mask in enumerate(masks):
        mask.save(scratch / "masks" / f"{number}.safetensors")
    learned = [str(scratch / "masks" / f"{n}.safetensors") for n in range(8)]
    command = ["--model", str(folder), "--output", str(scratch / "store")]
    figures: dict[str, Any] = {}

    def note(found: dict[str, Any]) -> None:
        figures.update(found)
        for name, value in found.items():
            text = f"{value:.3g}" if isinstance(value, float) else value
            print(f"{name:52} {text}", file=sys.stderr, flush=True)

    written = seconds(lambda: make_store([*command, "--order-from", *learned]))
    store, _ = load(scratch / "store")
    one, other = masks[-2:]
    size = (scratch / "store" / CHANNEL_FILE).stat().st_size
    note({"FFN, GB": size / 1e9, "seconds to write": written})
    same = same_weights(store.compact(one), model.compact(one))
    note({"bit-identical to the folder": same})
    file = str(scratch / "masks" / "8.safetensors")
    if large:
        note(limited(folder, scratch, file))
    note(memory(store, folder, scratch, file, one))
    note(cold(store, folder, one, turns))
    note(switching(store, one, other, turns))
    note(warm(store, model, scratch / "masks" / "9.safetensors", turns))
    note(grouped(folder, scratch))
    return figures


def task_masks(model: IFPModel) -> list[Selection]:
    """Return masks of whole quantisation groups, which is what a store reads best."""
    dense = model.dense()
    options: dict[str, Any] = {"keep": KEEP, "allocation": "uniform"}
    options["granularity"] = model.granularity
    masks = []
    for text in TASKS:
        tokens = model.instruction_tokens(text)
        scores = model.scores(tokens, "activation", dense=dense)
        masks.append(model.select(text, **options, scores=scores))
    return masks


def made_up_masks(model: IFPModel) -> list[Selection]:
    """Return masks that overlap by two thirds, for a random model."""
    rng = np.random.default_rng(0)
    shape = model.layers, model.channels
    common = rng.normal(size=shape)
    k = round(KEEP * model.channels / model.granularity) * model.granularity
    masks = []
    for _ in TASKS:
        scores = mx.array(common + 0.5 * rng.normal(size=shape))
        masks.append(select(scores, [k] * model.layers, granularity=model.granularity))
    return masks


def drop_cache(file: Path) -> None:
    fd = os.open(file, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def seconds(job: Callable[[], Any]) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def in_turns(turns: int, *jobs: Callable[[], Any]) -> list[float]:
    """Return the median seconds of each job; the first turn is not counted."""
    times = [[seconds(job) for job in jobs] for _ in range(turns + 1)]
    return [statistics.median(column) for column in zip(*times[1:], strict=True)]


def cold(store: IFPModel, folder: Path, mask: Selection, turns: int) -> dict[str, Any]:
    file = store.path / CHANNEL_FILE
    reader: Any = store.source.reader
    ffns = store.plan.modules(store.source.open())
    everything = mask.mask() * 0 + 1
    all_of_it = select(everything, [store.channels] * store.layers)

    def sweep() -> None:
        drop_cache(file)
        with file.open("rb", buffering=0) as stream:
            while stream.read(8 << 20):
                pass

    names = {part.name for layer in reader.layout.parts for part in layer}

    def stock() -> None:
        """Read the same weights, all of them, as mlx does from the plain folder."""
        for shard in folder.glob("model*.safetensors"):
            drop_cache(shard)
        for shard in sorted(folder.glob("model*.safetensors")):
            weights: Any = mx.load(str(shard))
            mx.eval([weights[name] for name in names & weights.keys()])

    def fill(selection: Selection) -> None:
        drop_cache(file)
        for _ in store.source.fill_all(ffns, selection.indices):
            pass

    def third() -> None:
        fill(mask)

    third()  # the disk is measured when it is first seen
    reader.bytes_read = reader.bytes_wanted = 0
    third()
    ratio = reader.bytes_read / reader.bytes_wanted
    jobs = third, lambda: fill(all_of_it), sweep, stock
    some, whole, swept, loaded = in_turns(turns, *jobs)
    return {
        "cold, keep 1/3: bytes read / selected": ratio,
        "cold, keep 1/3: seconds": some,
        "cold, keep 1/3 / reading the file": some / swept,
        "cold, keep 1 / reading the file": whole / swept,
        "cold, keep 1/3 / mlx loading all FFNs of the folder": some / loaded,
        "cold, keep 1 / mlx loading all FFNs of the folder": whole / loaded,
    }


def switching(
    store: IFPModel, one: Selection, other: Selection, turns: int
) -> dict[str, Any]:
    file = store.path / CHANNEL_FILE
    there = store.compact(one)
    pairs = zip(one.indices, other.indices, strict=True)
    common = sum(np.intersect1d(np.array(a), np.array(b)).size for a, b in pairs)

    def afresh(drop: bool) -> None:
        if drop:
            drop_cache(file)
        store.compact(other)

    def switch(drop: bool) -> None:
        if drop:
            drop_cache(file)
        store.compact(other, beside=(there, one))

    jobs = [lambda d=d, j=j: j(d) for d in (True, False) for j in (switch, afresh)]
    a, b, c, d = in_turns(turns, *jobs)
    return {
        "share of channels two related tasks have in common": common / sum(one.sizes),
        "cold switch / fresh load": a / b,
        "warm switch / fresh load": c / d,
        "warm switch: seconds": c,
    }


def warm(store: IFPModel, plain: IFPModel, mask: Path, turns: int) -> dict[str, Any]:
    dense = plain.dense()
    mx.eval(dense.parameters())
    tokens = mx.array([[1 + n % 200 for n in range(512)]])

    def ready() -> None:
        store.compact(Selection.load(mask))

    prefill, loading = in_turns(turns, lambda: mx.eval(dense(tokens)), ready)
    return {
        "dense prefill of 512 tokens: seconds": prefill,
        "warm select + load: seconds": loading,
        "warm select + load / dense prefill": loading / prefill,
    }


CHILD = """
import json, resource, runpy, sys
limit = int(sys.argv[1])
if limit:
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__")
peak = [l for l in open("/proc/self/status") if l.startswith("VmHWM")][0]
print(json.dumps({"peak": int(peak.split()[1]) * 1024}))
"""


def child(*command: Any, limit: int = 0) -> tuple[int, list[str]]:
    """Run a module in a process of its own; return its status and stdout's lines, of
    which the last has its peak of memory.
    """
    words = [sys.executable, "-c", CHILD, str(limit), *map(str, command)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.splitlines()


def generate(folder: Path, mask: str, limit: int = 0) -> tuple[int, list[str]]:
    command = ["ifp_mlx.generate", "--model", folder, "--prompt", PROMPT]
    command += ["--mask-file", mask, "--max-tokens", "24"]
    return child(*command, limit=limit)


def memory(
    store: IFPModel, folder: Path, scratch: Path, mask: str, selection: Selection
) -> dict[str, Any]:
    empty = write_empty(scratch / "empty", folder)
    command = ["mlx_lm.generate", "--model", empty, "--prompt", PROMPT]
    _, lines = child(*command, "--max-tokens", 2)
    idle = json.loads(lines[-1])["peak"]
    status, lines = generate(scratch / "store", mask)
    assert status == 0, lines
    peak = json.loads(lines[-1])["peak"]
    weights = dict(tree_flatten(store.compact(selection).parameters()))
    nbytes = sum(weight.nbytes for weight in weights.values())
    return {
        "peak of generate, MB": peak / 1e6,
        "an empty run of mlx-lm, MB": idle / 1e6,
        "compact weights, MB": nbytes / 1e6,
        "(peak - empty run) / compact weights": (peak - idle) / nbytes,
    }


def limited(folder: Path, scratch: Path, mask: str) -> dict[str, Any]:
    """Answer under a limit of memory that the dense model does not fit."""
    limit = 2_700_000_000
    dense = ["mlx_lm.generate", "--model", folder, "--prompt", PROMPT]
    dense += ["--max-tokens", 24]
    fails, _ = child(*dense, limit=limit)
    works, _ = child(*dense)
    assert works == 0, "the dense model does not even run without a limit"
    status, inside = generate(scratch / "store", mask, limit)
    _, outside = generate(folder, mask)
    return {
        "limit of memory, MB": limit / 1e6,
        "dense model under the limit": "fails" if fails else "runs",
        "store under the limit": "fails" if status else "runs",
        "same text as with everything in memory": inside[:-1] == outside[:-1],
    }


def grouped(folder: Path, scratch: Path) -> dict[str, Any]:
    """Read a selection in groups of 64 from a store made for it."""
    command = ["--model", str(folder), "--output", str(scratch / "grouped")]
    make_store([*command, "--granularity", "64"])
    store, _ = load(scratch / "grouped")
    mask = made_up_masks(store)[0]
    drop_cache(store.path / CHANNEL_FILE)
    reader: Any = store.source.reader
    store.compact(mask)
    return {
        "grouped by 64: bytes read / selected": reader.bytes_read / reader.bytes_wanted
    }


def same_weights(one: Any, other: Any) -> bool:
    first, second = (dict(tree_flatten(m.parameters())) for m in (one, other))
    return first.keys() == second.keys() and all(
        bool(mx.array_equal(first[n].view(mx.uint8), second[n].view(mx.uint8)))
        for n in first
    )


def write_empty(folder: Path, like: Path) -> Path:
    """Write a model with next to no weights that answers as another does."""
    changes = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    changes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    vocabulary = json.loads((like / "config.json").read_text())["vocab_size"]
    config = LARGE | changes | {"vocab_size": vocabulary, "eos_token_id": 0}
    return write_random(folder, config, like)


def write_large(folder: Path, like: Path) -> Path:
    return write_random(folder, LARGE, like)


def write_random(folder: Path, config: dict[str, Any], like: Path) -> Path:
    """Write a random float32 llama, a layer's worth of it in memory at a time."""
    from mlx_lm.utils import _get_classes

    folder.mkdir(parents=True)
    model_class, args_class = _get_classes(config)
    shapes = tree_flatten(model_class(args_class.from_dict(config)).parameters())
    rng = np.random.default_rng(0)
    groups: dict[str, list] = {}
    for name, value in shapes:
        groups.setdefault(".".join(name.split(".")[:3]), []).append((name, value.shape))
    for number, group in enumerate(groups.values()):
        tensors = {
            name: mx.array(rng.standard_normal(shape, np.float32) * shape[-1] ** -0.5)
            for name, shape in group
        }
        mx.save_safetensors(str(folder / f"model-{number:05}.safetensors"), tensors)
    (folder / "config.json").write_text(json.dumps(config))
    copy_companions(like, folder)
    return folder


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
