"""Speed of the compact model beside the dense one and a stock model of its shape.

Three models take turns in one process, so that a machine that is busy or throttles
slows all of them alike, and ratios are taken within each turn:

- dense: the whole model, as mlx_lm runs it;
- compact: select, load the channels, prefill, decode;
- stock: mlx-lm's own class built with the compact model's width, weights random.
  It is what the compact model's speed should be.

Prefill is bound by arithmetic, decoding at batch 1 by the bytes of the weights, so
the two are timed apart. The prompt is running text, not one repeated token.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from tqdm import tqdm

from . import cli
from .data import tokenize
from .masks import Selection
from .model import IFPModel, load
from .selectors import calibration_chats

PHASES = ("select", "load", "prefill", "decode")


@dataclass
class Timings:
    """Seconds of every turn, per phase of one model."""

    select: list[float] = field(default_factory=list)
    load: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    def median(self, phase: str) -> float:
        """Return the median of a phase in seconds; 0 where it does not happen."""
        return statistics.median(getattr(self, phase) or [0.0])


def measure(
    model: IFPModel,
    choose: Callable[[], Selection],
    prompt: list[int],
    *,
    max_tokens: int,
    turns: int,
    progress: Callable = iter,
) -> dict[str, Timings]:
    """Time the three models in turns, after one turn that is not counted.

    Args:
        model: from :func:`ifp_mlx.load`.
        choose: makes the selection; called, and timed, in every turn.
        prompt: token ids.
        max_tokens: tokens to decode, whatever they are.
        turns: how many to count.
        progress: wraps the iteration over turns.

    Returns:
        Timings of ``dense``, ``compact`` and ``stock``.

    Raises:
        ValueError: if the selection has no single width per layer.
    """
    dense = model.dense()
    mx.eval(dense.parameters())
    times = {name: Timings() for name in ("dense", "compact", "stock")}
    stock = _stock_of_shape(model, choose())
    for turn in progress(range(turns + 1)):
        if turn == 1:  # the first one filled caches and is forgotten
            times.update({name: Timings() for name in times})
        compact = times["compact"]
        selection = _timed(compact.select, choose)
        small = _timed(compact.load, partial(model.compact, selection))
        runners = [("compact", small), ("stock", stock), ("dense", dense)]
        for name, runner in runners[:: 1 if turn % 2 else -1]:  # none is always first
            prefill, decode = _generate(runner, prompt, max_tokens)
            times[name].prefill.append(prefill)
            times[name].decode.append(decode)
    return times


def _timed(seconds: list[float], action: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    result = action()
    seconds.append(time.perf_counter() - start)
    return result


def _generate(
    model: nn.Module, prompt: list[int], max_tokens: int
) -> tuple[float, float]:
    """Return seconds to the first token, and from there to the last."""
    from mlx_lm.generate import generate_step

    start = time.perf_counter()
    # One step below the text level: no end-of-sequence token cuts a run short.
    steps = generate_step(mx.array(prompt), model, max_tokens=max_tokens)
    next(steps)
    first = time.perf_counter()
    for _ in steps:
        pass
    return first - start, time.perf_counter() - first


def _stock_of_shape(model: IFPModel, selection: Selection) -> nn.Module:
    from mlx_lm.utils import _get_classes

    k = selection.target_size
    if k is None:
        raise ValueError(
            "No stock model has different widths per layer; benchmark with "
            "--allocation uniform."
        )
    config = {**model.config, "intermediate_size": k}
    model_class, args_class = _get_classes(config)
    stock = model_class(args_class.from_dict(config))
    names = dict(tree_flatten(model.dense().parameters()))
    dtype = next(w.dtype for name, w in names.items() if name.endswith("norm.weight"))
    stock.update(tree_map(lambda w: w.astype(dtype), stock.parameters()))
    if quantisation := model.config.get("quantization"):
        how = {key: quantisation[key] for key in ("group_size", "bits")}
        nn.quantize(stock, **how, mode=quantisation.get("mode", "affine"))
    mx.eval(stock.parameters())
    return stock


def table(times: dict[str, Timings], max_tokens: int) -> str:
    """Return the medians as a Markdown table, a row per model."""
    head = "| model | select s | load s | prefill s | decode s | decode tokens/s |"
    rows = [head, "|---|---|---|---|---|---|"]
    for name, timings in times.items():
        phases = " | ".join(f"{timings.median(phase):.3f}" for phase in PHASES)
        speed = (max_tokens - 1) / timings.median("decode")
        rows.append(f"| {name} | {phases} | {speed:.1f} |")
    return "\n".join(rows)


def ratios(times: dict[str, Timings]) -> dict[str, list[float]]:
    """Return, turn by turn, how much faster than the others the compact model decodes
    and prefills; above 1 is faster.
    """
    result = {}
    for phase in ("prefill", "decode"):
        compact = getattr(times["compact"], phase)
        for other in ("stock", "dense"):
            pairs = zip(getattr(times[other], phase), compact, strict=True)
            result[f"{phase} speed, compact / {other}"] = [o / c for o, c in pairs]
    return result


def main(argv: list[str] | None = None) -> None:
    """Run ``python -m ifp_mlx.benchmark``."""
    cli.main(build_parser(), _command, argv)


def build_parser() -> cli.Parser:
    """Return the command's parser."""
    parser = cli.Parser(
        prog="ifp_mlx.benchmark",
        description="Time the compact model beside the dense one and a stock one of "
        "its shape.",
    )
    cli.add_model_option(parser, shipped=True)
    cli.add_selection_options(parser)
    add = parser.add_argument
    add("--prompt-tokens", type=int, default=128, help="default: %(default)s")
    add("--max-tokens", "-m", type=int, default=64, help="default: %(default)s")
    add("--turns", type=int, default=5, help="counted turns, default: %(default)s")
    add("--json", action="store_true", help="end with one line of JSON on stdout")
    return parser


def _command(args: Any) -> None:
    if min(args.prompt_tokens, args.max_tokens - 1, args.turns) < 1:
        raise ValueError(
            f"--prompt-tokens {args.prompt_tokens} and --turns {args.turns} must be at "
            f"least 1, --max-tokens {args.max_tokens} at least 2."
        )
    options = cli.selection_options(args)
    options["allocation"] = options["allocation"] or "uniform"
    model, tokenizer = load(args.model)
    if args.mask_file:
        choose = partial(Selection.load, args.mask_file)
    else:
        instruction = args.instruction or "Answer the question in one sentence."
        choose = partial(model.select, instruction, **options)
    texts = (tokenize(tokenizer, chat[-2:]) for chat in calibration_chats())
    prompt = [token for text in texts for token in text][: args.prompt_tokens]
    times = measure(
        model,
        choose,
        prompt,
        max_tokens=args.max_tokens,
        turns=args.turns,
        progress=partial(tqdm, disable=None, leave=False),
    )
    _print(args, choose(), times, len(prompt))


def _print(
    args: Any, selection: Selection, times: dict[str, Timings], prompt_tokens: int
) -> None:
    about = {
        "model": args.model,
        "mask_id": selection.mask_id,
        "target_size": selection.target_size,
        "channels": selection.channels,
        "prompt_tokens": prompt_tokens,
        "max_tokens": args.max_tokens,
        "turns": args.turns,
        "device": str(mx.default_device()),
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
        "python": sys.version.split()[0],
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()), end="\n\n")
    print(table(times, args.max_tokens), end="\n\n")
    compared = ratios(times)
    for name, values in compared.items():
        spread = f"{min(values):.3f} to {max(values):.3f}"
        print(f"{name}: median {statistics.median(values):.3f} ({spread})")
    if args.json:
        seconds = {name: timings.__dict__ for name, timings in times.items()}
        print(json.dumps(about | {"seconds": seconds, "ratios": compared}))


if __name__ == "__main__":
    main()
