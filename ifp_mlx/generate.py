"""The main job: select → load the channels → prefill → decode."""

import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from tqdm import tqdm

from . import cli
from .compact_cache import CompactCache
from .data import Prompt, as_messages, instruction_of, is_tokens, tokenize
from .dense_prefill import dense_cache
from .fit import check_machine, fit, sweep_once
from .masks import Allocation, Selection
from .model import IFPModel, Progress, load

Prefill = Literal["compact", "dense"]
STOCK_MAX_TOKENS = 256  # mlx-lm's, where the caller names none


@dataclass
class Seconds:
    """Where the time of one generation went, in seconds (the paper's Table 3).

    Attributes:
        select: from the instruction to the selection.
        load: reading and slicing the selected channels.
        prefill: the prompt through the compact model.
        decode: from the first token to now.
        ttft: select + load + prefill, the time to the first token.
    """

    select: float = 0.0
    load: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    ttft: float = 0.0


@dataclass
class GenerationResponse:
    """One step of :func:`stream_generate`.

    Attributes:
        text: the next piece of text, possibly empty.
        token: the token's id.
        finish_reason: ``"stop"``, ``"length"``, or ``None`` while it goes on.
        selection: the channels it was generated with.
        seconds: the time spent so far.
        prompt_tokens: tokens in the prompt.
        prompt_tps: prefill speed, tokens per second.
        generation_tokens: tokens generated so far.
        generation_tps: decode speed, tokens per second.
        peak_memory_bytes: MLX's peak since the process started, in bytes.
        cache: with a memory limit, ``hit`` if the compact model was there already,
            ``miss`` if it was swept and kept (``select`` is the whole sweep then).
    """

    text: str
    token: int
    finish_reason: str | None
    selection: Selection
    seconds: Seconds
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory_bytes: int
    cache: str | None = None


def stream_generate(
    model: IFPModel,
    tokenizer: Any,
    prompt: Prompt,
    *,
    instruction: Prompt | None = None,
    system_prompt: str | None = None,
    keep: float | None = None,
    target_size: int | None = None,
    selector: str = "auto",
    allocation: Allocation | None = None,
    granularity: int | None = None,
    selection: Selection | None = None,
    compensate: bool = False,
    seed: int = 0,
    memory_bytes: int | None = None,
    cache: CompactCache | None = None,
    prefill: Prefill = "compact",
    chat_template: bool = True,
    progress: Progress = iter,
    **kwargs: Any,
) -> Iterator[GenerationResponse]:
    """Select channels, load them, and generate from the compact model.

    Args:
        model: from :func:`ifp_mlx.load`.
        tokenizer: the one that came with it.
        prompt: what is generated from: a user's text, messages (both go through the
            chat template), or token ids, taken as they are.
        instruction: what selects; the model does not see it. Default: the prompt's
            messages up to the first user message.
        system_prompt: put before the prompt, and so part of the default instruction.
        keep, target_size, selector, allocation, granularity, seed: see
            :meth:`IFPModel.select`.
        selection: use this one and select nothing.
        compensate: let kept channels make up for dropped ones, as ``selection.text``,
            else the instruction shows; see :meth:`IFPModel.compact`.
        memory_bytes: that compact model, KV cache and predictor may take; chooses the
            largest ``keep`` that fits, or refuses the one that does not. The model is
            then read in one sweep, a dense layer at a time.
        cache: where a swept compact model is kept, and taken from the next time.
        prefill: which model reads the prompt, all but its last token: ``compact``, or
            the whole ``dense`` one (better, slower; see :mod:`ifp_mlx.dense_prefill`).
        chat_template: ``False`` leaves the chat template out.
        progress: wraps iterations over calibration texts and over layers.
        kwargs: passed on to ``mlx_lm.stream_generate`` (``max_tokens``, ...).

    Yields:
        The text as it comes, with what it took.

    Raises:
        ValueError: on an empty prompt or a choice that cannot be had.
    """
    from mlx_lm import stream_generate as stock_stream_generate

    tokens, selecting = _read_prompt(
        tokenizer, prompt, system_prompt=system_prompt, chat_template=chat_template
    )
    selecting = selecting if instruction is None else instruction
    options: dict[str, Any] = {"keep": keep, "target_size": target_size}
    options |= {"selector": selector, "allocation": allocation}
    options |= {"granularity": granularity, "seed": seed}
    context = len(tokens) + kwargs.get("max_tokens", STOCK_MAX_TOKENS)
    room = _Room(memory_bytes, context, cache)
    ready = _prepare(model, selecting, options, selection, compensate, room, progress)
    if prefill == "dense":
        ready, kwargs["prompt_cache"] = _read_densely(model, ready, tokens[:-1])
        tokens = tokens[-1:]
    for step in stock_stream_generate(ready.compact, tokenizer, tokens, **kwargs):
        yield _response(step, ready)


class _Room(NamedTuple):
    """Memory to fit into: bytes, the tokens of prompt and answer, and a cache."""

    memory_bytes: int | None
    context: int
    cache: CompactCache | None


class _Ready(NamedTuple):
    """What is decoded with, and what it took to get it."""

    selection: Selection
    compact: nn.Module
    seconds: Seconds
    cache: str | None = None
    read: int = 0  # tokens of the prompt, in seconds.prefill


def _prepare(
    model: IFPModel,
    instruction: Prompt,
    options: dict[str, Any],
    selection: Selection | None,
    compensate: bool,
    room: _Room,
    progress: Progress,
) -> _Ready:
    """Select and load: one after the other, or in one sweep that fits into memory."""
    if room.memory_bytes is None:
        check_machine(model, options, selection, room.context)
    else:
        reading = len(model.instruction_tokens(instruction))
        fit(model, options, selection, room.memory_bytes, room.context, reading)
    start = time.perf_counter()
    swept = room.memory_bytes is not None and not compensate
    if swept and selection is None:
        cache = room.cache or CompactCache()
        found = sweep_once(model, instruction, options, cache, progress)
        spent = time.perf_counter() - start
        if found.hit:
            return _Ready(*found[:2], Seconds(load=spent), "hit")
        return _Ready(*found[:2], Seconds(select=spent), "miss")
    if selection is None:
        selection = model.select(instruction, **options, progress=progress)
    selected = time.perf_counter()
    text = (selection.text or instruction) if compensate else None
    compact = model.compact(selection, compensate=text, progress=progress)
    loaded = time.perf_counter()
    seconds = Seconds(select=selected - start, load=loaded - selected)
    return _Ready(selection, compact, seconds)


def _read_densely(
    model: IFPModel, ready: _Ready, tokens: list[int]
) -> tuple[_Ready, list[Any]]:
    """Return what is decoded with, and the cache of a prompt the dense model read."""
    start = time.perf_counter()
    cache = dense_cache(model, tokens)
    seconds = replace(ready.seconds, prefill=time.perf_counter() - start)
    return ready._replace(seconds=seconds, read=len(tokens)), cache


def _response(step: Any, ready: _Ready) -> GenerationResponse:
    """Add our own figures to a response of mlx-lm."""
    spent = ready.seconds
    prefill = spent.prefill + step.prompt_tokens / step.prompt_tps
    prompt_tokens = ready.read + step.prompt_tokens
    seconds = Seconds(
        select=spent.select,
        load=spent.load,
        prefill=prefill,
        decode=step.generation_tokens / step.generation_tps,
        ttft=spent.select + spent.load + prefill,
    )
    return GenerationResponse(
        text=step.text,
        token=step.token,
        finish_reason=step.finish_reason,
        selection=ready.selection,
        seconds=seconds,
        prompt_tokens=prompt_tokens,
        prompt_tps=prompt_tokens / prefill,
        generation_tokens=step.generation_tokens,
        generation_tps=step.generation_tps,
        peak_memory_bytes=mx.get_peak_memory(),
        cache=ready.cache,
    )


def generate(
    model: IFPModel,
    tokenizer: Any,
    prompt: Prompt,
    **kwargs: Any,
) -> str:
    """Return the whole text of :func:`stream_generate`, which takes the same options."""
    steps = stream_generate(model, tokenizer, prompt, **kwargs)
    return "".join(step.text for step in steps)


def main(argv: list[str] | None = None) -> None:
    """Run ``python -m ifp_mlx.generate``."""
    cli.main(build_parser(), _command, argv)


def build_parser() -> cli.Parser:
    """Return the command's parser; names are mlx_lm's wherever it has one."""
    parser = cli.Parser(
        prog="ifp_mlx.generate",
        description="Load the channels an instruction needs, and generate.",
    )
    cli.add_model_option(parser, shipped=True)
    add = parser.add_argument
    add("--prompt", "-p", required=True, help="the user's message; - reads stdin")
    add("--system-prompt", help="system message, put before the prompt")
    cli.add_selection_options(parser)
    cli.add_compensate_option(parser)
    add(
        "--memory-gb",
        type=float,
        help="memory for the compact model and its KV cache, in 10^9 bytes (the process "
        "takes some more): keeps as many channels as fit, reads the model layer by "
        "layer, and keeps the result for the next time",
    )
    add(
        "--prefill",
        choices=("compact", "dense"),
        default="compact",
        help="which model reads the prompt; dense is nearer to the whole model, and has "
        "it in memory meanwhile; default: %(default)s",
    )
    add("--cache-folder", type=Path, help="where that is; default: ~/.cache/ifp_mlx")
    add("--save-mask", metavar="FILE", help="write the selection as a mask file")
    add("--max-tokens", "-m", type=int, default=100, help="default: %(default)s")
    add("--temp", type=float, default=0.0, help="sampling temperature; 0 is greedy")
    add("--top-p", type=float, default=1.0, help="sampling top-p")
    add("--min-p", type=float, default=0.0, help="sampling min-p")
    add("--top-k", type=int, default=0, help="sampling top-k")
    add("--ignore-chat-template", action="store_true", help="prompt as plain text")
    add("--json", action="store_true", help="end with one line of JSON on stdout")
    return parser


def _command(args: Any) -> None:
    from mlx_lm.sample_utils import make_sampler

    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if args.max_tokens < 1:
        raise ValueError(f"--max-tokens {args.max_tokens} must be at least 1.")
    if args.prefill == "dense" and args.memory_gb is not None:
        raise ValueError(
            "--prefill dense has the whole model in memory, and --memory-gb is there to "
            "avoid that; leave one of them out."
        )
    as_messages(prompt)  # an empty prompt is refused before anything is loaded
    model, tokenizer = load(args.model)
    mx.random.seed(args.seed)
    selection = Selection.load(args.mask_file) if args.mask_file else None
    steps = stream_generate(
        model,
        tokenizer,
        prompt,
        system_prompt=args.system_prompt,
        instruction=args.instruction,
        selection=selection,
        compensate=args.compensate,
        memory_bytes=_bytes(args.memory_gb),
        cache=CompactCache(args.cache_folder),
        prefill=args.prefill,
        chat_template=not args.ignore_chat_template,
        progress=partial(tqdm, disable=None, leave=False),
        max_tokens=args.max_tokens,
        sampler=make_sampler(args.temp, args.top_p, args.min_p, top_k=args.top_k),
        **cli.selection_options(args),
    )
    text, last = _print_stream(steps)
    if args.save_mask:
        last.selection.save(args.save_mask)
    print(_summary(last), file=sys.stderr)
    cli.warn_of_low_keep(last.selection)
    slicing = model.slicing(last.selection)
    cli.say_slicing(slicing, last.selection)
    if args.json:
        print(json.dumps({"text": text} | report(last) | {"down_proj": slicing}))


def _bytes(gigabytes: float | None) -> int | None:
    if gigabytes is not None and not 0 < gigabytes < 1e6:
        raise ValueError(f"--memory-gb {gigabytes:g} must be more than 0.")
    return None if gigabytes is None else round(gigabytes * 1e9)


def _print_stream(
    steps: Iterable[GenerationResponse],
) -> tuple[str, GenerationResponse]:
    pieces = []
    for step in steps:
        print(step.text, end="", flush=True)
        pieces.append(step.text)
    print(flush=True)
    return "".join(pieces), step


def report(last: GenerationResponse) -> dict[str, Any]:
    """Return the last response's figures as plain data, without the text."""
    selection = last.selection
    return {
        "prompt_tokens": last.prompt_tokens,
        "generation_tokens": last.generation_tokens,
        "finish_reason": last.finish_reason,
        "selection": {
            "selector": selection.info.get("selector"),
            "allocation": selection.info.get("allocation"),
            "mask_id": selection.mask_id,
            "kept_channels": sum(selection.sizes),
            "total_channels": selection.channels * len(selection.sizes),
            "layers": selection.sizes,
        },
        "seconds": asdict(last.seconds),
        "generation_tps": last.generation_tps,
        "prompt_tps": last.prompt_tps,
        "peak_memory_bytes": last.peak_memory_bytes,
        "cache": last.cache,
    }


def _summary(last: GenerationResponse) -> str:
    selection, seconds = last.selection, last.seconds
    total = selection.channels * len(selection.sizes)
    return (
        f"{sum(selection.sizes)} of {total} channels, chosen by "
        f"{selection.info.get('selector')} ({selection.info.get('allocation')}), mask "
        f"{selection.mask_id}; select {seconds.select:.2f} s, load {seconds.load:.2f} s, "
        f"prefill {last.prompt_tokens} tokens {seconds.prefill:.2f} s, decode "
        f"{last.generation_tokens} tokens {seconds.decode:.2f} s "
        f"({last.generation_tps:.1f} tokens/s)"
    )


def _read_prompt(
    tokenizer: Any,
    prompt: Prompt,
    *,
    system_prompt: str | None,
    chat_template: bool,
) -> tuple[list[int], Prompt]:
    """Return the prompt's tokens and its default instruction."""
    if is_tokens(prompt):
        return list(prompt), list(prompt)
    messages = as_messages(prompt, system_prompt)
    tokens = tokenize(tokenizer, messages, chat_template=chat_template)
    if chat_template:
        return tokens, messages
    return tokens, tokenize(tokenizer, instruction_of(messages), chat_template=False)


if __name__ == "__main__":
    main()
