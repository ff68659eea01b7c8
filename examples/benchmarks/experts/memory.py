"""A mixture that does not fit into memory: swept, asked, switched; write memory.md.

    python -m examples.benchmarks.experts.memory --scratch /somewhere/with/15/GB

Makes a random model of Qwen3-30B-A3B's shape, a quarter as deep, at 4 bits. Its answers
mean nothing; it only counts that they are the same. Every figure is measured in a
process of its own, and kept in the scratch folder, so that a run that was stopped goes
on; `--again PART` measures one part anew. Cold files were dropped from the system's
cache with posix_fadvise, which does not reach caches below the system. At the end
memory.json and the table of memory.md are written.
"""

import argparse
import contextlib
import json
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from examples.benchmarks.pages import fill
from examples.benchmarks.store.store_check import PROMPT, child, write_empty
from ifp_mlx import load
from ifp_mlx.evaluation.runners import bytes_read, clear, forget_files
from ifp_mlx.evaluation.tables import markdown
from ifp_mlx.files.atomic import new_folder
from ifp_mlx.files.companions import copy_companions
from ifp_mlx.model.checkpoint import IFPModel
from ifp_mlx.model.decide import decide
from ifp_mlx.selection.masks import Selection
from ifp_mlx.selection.request import Request
from ifp_mlx.slicing.sliced import slice_model
from ifp_mlx.slicing.stock import build
from ifp_mlx.storage.folder import SHIPPED
from ifp_mlx.storage.writer import write_store

HERE = Path(__file__)
RESULTS, PAGE = HERE.with_suffix(".json"), HERE.with_suffix(".md")
BITS, GROUP = 4, 64


class Setup(NamedTuple):
    """What is measured.

    Attributes:
        shape: config.json of the model.
        memory_gb: what `generate` is allowed.
        fits: experts a layer, the most that this allows.
        limit_bytes: what a process may have.
        kept: experts a layer that are loaded, switched and decoded with.
        tokens: of an answer.
        turns: of which the median is taken.
    """

    shape: dict[str, Any]
    memory_gb: float
    fits: int
    limit_bytes: int
    kept: int
    tokens: int
    turns: int


QUARTER = Setup(
    shape={
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "num_hidden_layers": 12,
        "intermediate_size": 6144,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 512,
        "eos_token_id": 0,
    },
    memory_gb=2.4,
    fits=52,
    limit_bytes=3_400_000_000,
    kept=48,
    tokens=16,
    turns=2,
)


# The models


def write_random(folder: Path, config: dict[str, Any]) -> Path:
    """Write a random model as `mlx_lm.convert -q` would, with float32 scales; one layer of
    it is in memory at a time.
    """
    from mlx_lm.utils import quantize_model

    with contextlib.redirect_stdout(None):  # it prints
        model, config = quantize_model(build(config), config, GROUP, BITS)
    shapes = tree_flatten(model.parameters(), destination={})
    groups: dict[str, list[str]] = {}
    for name in shapes:
        layer = ".".join(name.split(".")[:3]) if ".layers." in name else ""
        groups.setdefault(layer, []).append(name)
    rng = np.random.default_rng(0)
    with new_folder(folder) as scratch:
        for number, names in enumerate(groups.values(), 1):
            tensors: dict[str, mx.array] = {}
            for name in sorted(names, reverse=True):  # weight, scales, biases
                tensors[name] = _random(name, shapes[name].shape, tensors, rng)
            file = f"model-{number:05}-of-{len(groups):05}.safetensors"
            mx.save_safetensors(str(scratch / file), tensors, {"format": "mlx"})
        (scratch / "config.json").write_text(json.dumps(config))
        copy_companions(SHIPPED, scratch)
    return folder


def _random(
    name: str,
    shape: tuple[int, ...],
    others: dict[str, mx.array],
    rng: np.random.Generator,
) -> mx.array:
    """Return a norm's ones, or a part of a quantised matrix: its numbers are about 2 in
    the embedding, so that tokens stay apart, and else such that its rows have length 1.
    """
    home, _, part = name.rpartition(".")
    if len(shape) == 1:
        return mx.ones(shape)
    if part == "weight":
        return mx.array(rng.integers(0, 1 << 32, shape, np.uint32))
    codes = 1 << others[f"{home}.weight"].shape[-1] * 32 // (shape[-1] * GROUP)
    if part == "biases":  # so that the codes lie on both sides of zero
        return others[f"{home}.scales"] * -(codes - 1) / 2
    size = 2.0 if "embed" in home else (shape[-1] * GROUP) ** -0.5
    spread = rng.uniform(0.5, 1.5, shape).astype(np.float32)
    return mx.array(spread * (size * 12**0.5 / codes))


def two_selections(model: IFPModel, kept: int) -> tuple[Selection, Selection]:
    """Return two random selections that have three quarters of their experts in common."""
    rng, rows = np.random.default_rng(0), ([], [])  # type: ignore[var-annotated]
    for _ in range(model.layers):
        order, new = rng.permutation(model.channels), kept // 4
        for row, chosen in zip(
            rows, (order[:kept], order[new : kept + new]), strict=True
        ):
            row.append(mx.array(np.sort(chosen).astype(np.int32)))
    one, other = (
        Selection(tuple(row), None, model.channels, unit="expert") for row in rows
    )
    return one, other


# What is measured, each part in a process of its own


class Folders(NamedTuple):
    """Where things are, all of them in the scratch folder."""

    model: Path
    store: Path
    stock: Path
    empty: Path
    scratch: Path

    @staticmethod
    def under(scratch: Path) -> "Folders":
        """Return them."""
        model, store = scratch / "model", scratch / "store"
        return Folders(model, store, scratch / "stock", scratch / "empty", scratch)


def make(folders: Folders, setup: Setup) -> dict[str, Any]:
    """Write the models that are not there yet."""
    if not folders.model.exists():
        write_random(folders.model, setup.shape)
    if not folders.store.exists():
        write_store(folders.model, folders.store)
    if not folders.stock.exists():
        write_random(folders.stock, setup.shape | {"num_experts": setup.kept})
    if not folders.empty.exists():
        write_empty(folders.empty, folders.model)
    footprint = load(folders.model)[0].footprint
    return {
        "file_bytes": sum(
            f.stat().st_size for f in folders.model.glob("*.safetensors")
        ),
        "layers": footprint.layers,
        "experts": footprint.channels,
        "expert_bytes": footprint.layer_bytes[0],
        "core_bytes": footprint.core_bytes,
    }


def limited(folders: Folders, setup: Setup) -> dict[str, Any]:
    """Answer under a limit that the dense model cannot even load under."""
    mask, cache = folders.scratch / "mask.safetensors", folders.scratch / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    asked = ["--prompt", PROMPT, "--max-tokens", setup.tokens]
    stock = ["mlx_lm.generate", "--model", folders.model, *asked]
    dense, _ = child(*stock, limit=setup.limit_bytes)
    _, empty = child("mlx_lm.generate", "--model", folders.empty, *asked)
    allowed = ["--memory-gb", setup.memory_gb, "--target-size", setup.fits]
    allowed += ["--selector", "activation"]
    allowed += ["--cache-folder", cache, "--save-mask", mask]
    runs = [
        ask(folders.model, setup, *options, limit=limit)
        for options, limit in (
            (allowed, setup.limit_bytes),
            (allowed, setup.limit_bytes),
            (["--mask-file", mask], 0),
        )
    ]
    first, second, whole = runs
    model = load(folders.model)[0]
    selection, footprint = Selection.load(mask), model.footprint
    tokens = first["prompt_tokens"] + first["generation_tokens"]
    layer = round(footprint.layer_bytes[0] * footprint.channels)
    return {
        "limit_bytes": setup.limit_bytes,
        "memory_gb": setup.memory_gb,
        "dense_runs": dense == 0,
        "empty_peak_bytes": json.loads(empty[-1])["peak"],
        "needed_bytes": {
            "compact": footprint.compact_bytes(selection),
            "dense layer": layer,
            "KV cache": footprint.kv_bytes(-(-tokens // 256) * 256),
        },
        "first": first,
        "second": second,
        "whole": whole,
    }


def ask(folder: Path, setup: Setup, *options: Any, limit: int = 0) -> dict[str, Any]:
    """Return what `generate` reported, and its peak of memory."""
    command = ["ifp_mlx.generate", "--model", folder, "--prompt", PROMPT, "--json"]
    status, lines = child(*command, "--max-tokens", setup.tokens, *options, limit=limit)
    if status or len(lines) < 2:
        raise SystemExit(f"generate {options} ended with status {status}: {lines}")
    return json.loads(lines[-2]) | json.loads(lines[-1])


def sweep(folders: Folders, setup: Setup) -> dict[str, Any]:
    """Sweep the model on disk, and read its files from end to end."""
    model, _ = load(folders.model)
    request = Request(instruction=PROMPT, selector="activation", target_size=setup.kept)

    def swept() -> None:
        model.prepare(decide(request, model))

    before = bytes_read() or 0
    swept()
    asked = (bytes_read() or 0) - before
    found: dict[str, Any] = {
        "bytes": asked,
        "tokens": len(model.instruction_tokens(PROMPT)),
    }
    jobs = {"sweep": swept, "file": lambda: read_through(folders.model)}
    found |= cold_and_warm(jobs, folders.model, setup.turns)
    dense = model.dense()
    mx.eval(dense.parameters())
    tokens = mx.array([model.instruction_tokens(PROMPT)])
    times = [_seconds(lambda: mx.eval(dense(tokens))) for _ in range(setup.turns + 1)]
    return found | {"dense_prefill": times[1:]}


def switch(folder: Path, setup: Setup) -> dict[str, Any]:
    """Load a selection, and go from it to another that shares three quarters."""
    model, _ = load(folder)
    reader: Any = model.source.reader
    one, other = two_selections(model, setup.kept)
    there = model.compact(one)
    begun = reader.bytes_read
    switched = model.compact(other, beside=(there, one))
    found: dict[str, Any] = {"switch_bytes": reader.bytes_read - begun}
    begun = reader.bytes_read
    fresh = model.compact(other)
    found |= {"load_bytes": reader.bytes_read - begun}
    found |= {"same": same_weights(switched, fresh)}
    del switched, fresh

    def whole_stacks() -> None:
        dense = model.dense()
        slice_model(dense, model.plan, other)
        mx.eval(dense.parameters())

    jobs = {
        "switch": lambda: model.compact(other, beside=(there, one)),
        "load": lambda: model.compact(other),
        "whole_stacks": whole_stacks,
    }
    return found | cold_and_warm(jobs, folder, setup.turns)


def decode(folders: Folders, setup: Setup) -> dict[str, Any]:
    """Decode with a compact model and with a stock one of its size, in turns."""
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    model, _ = load(folders.model)
    compact = model.compact(two_selections(model, setup.kept)[0])
    stock, _ = load_model(folders.stock)
    prompt = mx.array(model.instruction_tokens(PROMPT)[:4])  # not part of the time

    def speed(which: Any) -> float:
        steps = generate_step(prompt, which, max_tokens=setup.tokens + 1)
        next(steps)
        return setup.tokens / _seconds(lambda: list(steps))

    found: dict[str, list[float]] = {"compact": [], "stock": []}
    for turn in range(2 * setup.turns + 1):
        both = [("compact", compact), ("stock", stock)]
        for name, which in both if turn % 2 else both[::-1]:
            found[name].append(speed(which))
    return {name: speeds[1:] for name, speeds in found.items()}


Part = Callable[[Folders, Setup], dict[str, Any]]
PARTS: dict[str, Part] = {
    "model": make,
    "limited": limited,
    "sweep": sweep,
    "folder": lambda folders, setup: switch(folders.model, setup),
    "store": lambda folders, setup: switch(folders.store, setup),
    "decode": decode,
}


def cold_and_warm(
    jobs: dict[str, Callable[[], Any]], folder: Path, turns: int
) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of each job in each turn, from the disk and from the system's
    cache; the first turn warms up and is not counted.
    """
    found: dict[str, dict[str, list[float]]] = {
        n: {"cold": [], "warm": []} for n in jobs
    }
    for _ in range(turns + 1):
        for name, job in jobs.items():
            forget_files(folder)
            for kind in ("cold", "warm"):
                clear()
                found[name][kind].append(_seconds(job))
    return {n: {kind: t[1:] for kind, t in some.items()} for n, some in found.items()}


def read_through(folder: Path) -> None:
    """Read a model's files from first to last into a buffer."""
    buffer = bytearray(8 << 20)
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def same_weights(one: Any, other: Any) -> bool:
    """Whether two models are the same bit for bit."""
    first, second = (tree_flatten(m.parameters(), destination={}) for m in (one, other))
    return first.keys() == second.keys() and all(
        bool(mx.array_equal(first[n].view(mx.uint8), second[n].view(mx.uint8)))
        for n in first
    )


def _seconds(job: Callable[[], Any]) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


# The page


Line = tuple[str, str]


def rows(results: dict[str, Any]) -> list[Line]:
    """Return the table's lines: what, and its figure."""
    model, limit, swept = results["model"], results["limited"], results["sweep"]
    lines = [*limited_rows(model, limit), *sweep_rows(model, swept)]
    lines += switch_rows("plain folder", results["folder"])
    lines += switch_rows("channel store", results["store"])
    return [*lines, *decode_rows(results["decode"])]


def limited_rows(model: dict[str, Any], limit: dict[str, Any]) -> list[Line]:
    """Return the lines on the command under a limit."""
    first, second, whole = (limit[run] for run in ("first", "second", "whole"))
    kept, experts = first["selection"]["layers"][0], model["experts"]
    each = f"{model['layers']} × {experts}, each {model['expert_bytes'] / 1e6:.2f} MB"
    needed = sum(limit["needed_bytes"].values())
    above = first["peak"] - limit["empty_peak_bytes"]
    select, load = first["seconds"]["select"], second["seconds"]["load"]
    return [
        ("model on disk", gigabytes(model["file_bytes"])),
        ("experts", each),
        ("limit on the process", gigabytes(limit["limit_bytes"])),
        ("the dense model under it", "runs" if limit["dense_runs"] else "fails"),
        ("`--memory-gb`", f"{limit['memory_gb']:g}"),
        ("kept by it, of every layer", f"{kept} of {experts} experts"),
        ("first run: sweep, comparison, keeping a copy", f"{select:.1f} s"),
        ("MLX's peak", gigabytes(first["peak_memory_bytes"])),
        ("the process's peak", gigabytes(first["peak"])),
        ("that above an empty run of mlx-lm", gigabytes(above)),
        ("compact model, one dense layer, KV cache", gigabytes(needed)),
        ("ratio of these two", f"{above / needed:.2f}"),
        ("text against all in memory, same mask", alike(first, whole)),
        ("text and mask of the second run", alike(first, second)),
        ("second run: load of the copy", f"{load:.2f} s"),
    ]


def sweep_rows(model: dict[str, Any], swept: dict[str, Any]) -> list[Line]:
    """Return the lines on the sweep, and on reading the file alone."""
    tokens = swept["tokens"]
    return [
        ("sweep: bytes asked / the file's", ratio(swept["bytes"], model["file_bytes"])),
        ("sweep: cold; warm", cold_warm(swept["sweep"])),
        ("reading the file once: cold; warm", cold_warm(swept["file"])),
        (f"dense model in memory: {tokens} tokens", seconds(swept["dense_prefill"])),
    ]


def switch_rows(source: str, part: dict[str, Any]) -> list[Line]:
    """Return the lines on loading and switching from one source."""
    changed = ratio(part["switch_bytes"], part["load_bytes"])
    return [
        (f"{source}: load", gigabytes(part["load_bytes"])),
        (f"{source}: load, cold; warm", cold_warm(part["load"])),
        (f"{source}: switch, bytes / those of a load", changed),
        (f"{source}: switch, cold; warm", cold_warm(part["switch"])),
        (f"{source}: weights after it", "a load's" if part["same"] else "DIFFERENT"),
        (f"{source}: all read, cut in memory", cold_warm(part["whole_stacks"])),
    ]


def decode_rows(part: dict[str, list[float]]) -> list[Line]:
    """Return how fast both models decode."""
    pairs = zip(part["compact"], part["stock"], strict=True)
    each = sorted(compact / stock for compact, stock in pairs)
    middle, spread = statistics.median(each), f"{each[0]:.2f} to {each[-1]:.2f}"
    both = [statistics.median(part[name]) for name in ("compact", "stock")]
    return [
        ("decoding: compact; stock", "{:.2f}; {:.2f} tokens/s".format(*both)),
        ("decoding: ratio of a turn", f"{middle:.3f} ({spread})"),
    ]


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def ratio(part: float, whole: float) -> str:
    return f"{part / whole:.3f} ({gigabytes(part)})"


def seconds(times: list[float]) -> str:
    return f"{statistics.median(times):.2f} s"


def cold_warm(times: dict[str, list[float]]) -> str:
    return f"{seconds(times['cold'])}; {seconds(times['warm'])}"


def alike(one: dict[str, Any], other: dict[str, Any]) -> str:
    same = one["text"] == other["text"] and (
        one["selection"]["mask_id"] == other["selection"]["mask_id"]
    )
    return "the same" if same else "DIFFERENT"


def table(results: dict[str, Any]) -> str:
    """Return the page's table."""
    return markdown(["what", "figure"], rows(results))


def write_page(results: dict[str, Any]) -> None:
    """Put the table into the page."""
    fill(PAGE, {"memory": table(results)})


# The command


def measure(part: str, scratch: Path, setup: Setup = QUARTER) -> dict[str, Any]:
    """Return the figures of one part."""
    return PARTS[part](Folders.under(scratch), setup)


def main() -> None:
    """Measure what is not measured yet, and write the page."""
    parser = argparse.ArgumentParser(
        description="Measure a mixture larger than memory."
    )
    add = parser.add_argument
    add("--scratch", type=Path, required=True, help="folder for the models; stays")
    add("--again", nargs="+", choices=PARTS, default=[], help="measure these anew")
    add("--part", choices=PARTS, help="measure this alone, print it as JSON")
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    if args.part:
        print(json.dumps(measure(args.part, args.scratch)))
        return
    file = args.scratch / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for part in PARTS:
        if part in results and part not in args.again:
            continue
        print(f"{part} ...", file=sys.stderr, flush=True)
        command = ["examples.benchmarks.experts.memory", "--scratch", args.scratch]
        status, lines = child(*command, "--part", part)
        if status:
            raise SystemExit(f"{part} ended with status {status}: {lines}")
        results[part] = json.loads(lines[-2])
        file.write_text(json.dumps(results, indent=1))
    shutil.copyfile(file, RESULTS)
    write_page(results)
    print(table(results))


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
