"""The main job: select, load the channels, prefill, decode."""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..selection.masks import Selection
from ..selection.prompts import Prompt, as_messages, instruction_of, is_tokens, tokenize
from ..selection.widths import Allocation
from .checkpoint import IFPModel, Progress
from .compact_cache import CompactCache
from .decision import decide
from .dense_prefill import read_densely
from .fit import check_machine, fit, sweep_once
from .responses import GenerationResponse, Seconds

Prefill = Literal["auto", "compact", "dense"]


STOCK_MAX_TOKENS = 256  # mlx-lm's, where the caller names none


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
    compensate: bool | None = None,
    seed: int = 0,
    memory_bytes: int | None = None,
    cache: CompactCache | None = None,
    prefill: Prefill = "auto",
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
            else the instruction shows. Default: where the dense model reads that
            anyway, to select by it; a given ``selection`` as its ``compensates`` says.
        memory_bytes: that compact model, KV cache and predictor may take; chooses the
            largest ``keep`` that fits, or refuses the one that does not.
        cache: where a compact model that had to fit is kept for the next time.
        prefill: which model reads the prompt: ``compact``, the whole ``dense`` one, or
            ``auto``: dense as far as that has read it to select, else compact.
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
    options = {"keep": keep, "target_size": target_size, "selector": selector}
    options |= {"allocation": allocation, "granularity": granularity, "seed": seed}
    context = len(tokens) + kwargs.get("max_tokens", STOCK_MAX_TOKENS)
    room = _Room(memory_bytes, context, cache)
    ready = _prepare(model, selecting, options, selection, compensate, room, progress)
    if prefill != "compact":
        ready = _read(model, ready, selecting, tokens, whole=prefill == "dense")
    rest, kwargs = tokens[ready.read :], kwargs | ready.kv_options
    for step in stock_stream_generate(ready.compact, tokenizer, rest, **kwargs):
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
    kv: list[Any] | None = None  # of the tokens that the dense model has read
    read: int = 0  # how many tokens of the prompt those are

    @property
    def kv_options(self) -> dict[str, Any]:
        """What mlx-lm's ``stream_generate`` is to be told of them."""
        return {"prompt_cache": self.kv} if self.read else {}


def _prepare(
    model: IFPModel,
    instruction: Prompt,
    options: dict[str, Any],
    selection: Selection | None,
    compensate: bool | None,
    room: _Room,
    progress: Progress,
) -> _Ready:
    """Select and load: one after the other, or in one sweep."""
    reads = selection is None and decide(model, **options).reads
    if compensate is None:
        compensate = reads if selection is None else selection.compensates
    if selection is not None:
        selection = _compensated(model, selection, instruction, compensate)
    text = selection.text if selection else model.instruction_tokens(instruction)
    if room.memory_bytes is None:
        check_machine(model, options, selection, room.context)
    else:
        read = len(text or ()) if reads or compensate else 0
        limits = room.memory_bytes, room.context, read
        fit(model, options, selection, *limits, compensate=compensate)
    if selection is None and (reads or room.memory_bytes is not None):
        options = options | {"compensate": compensate}
        return _sweep(model, instruction, options, room, progress)
    start = time.perf_counter()
    if selection is None:
        selection = model.select(instruction, **options, progress=progress)
        selection = _compensated(model, selection, instruction, compensate)
    selected = time.perf_counter()
    compact = model.compact(selection, progress=progress)
    loaded = time.perf_counter()
    seconds = Seconds(select=selected - start, load=loaded - selected)
    return _Ready(selection, compact, seconds)


def _compensated(
    model: IFPModel, selection: Selection, instruction: Prompt, compensate: bool
) -> Selection:
    """Return a selection, compensated by its own text, else by the instruction."""
    if not compensate:
        return selection.plain()
    if selection.text is None:
        tokens = model.instruction_tokens(instruction)
        return selection.compensated(tokens, "the instruction")
    return selection if selection.compensates else selection.compensated()


def _sweep(
    model: IFPModel,
    instruction: Prompt,
    options: dict[str, Any],
    room: _Room,
    progress: Progress,
) -> _Ready:
    """Select and load in one pass; what had to fit is kept for the next time."""
    start = time.perf_counter()
    if room.memory_bytes is None:
        selection, compact, kv = model.sweep(instruction, **options, progress=progress)
        seconds = Seconds(select=time.perf_counter() - start)
        return _Ready(selection, compact, seconds, kv=kv)
    kept = room.cache or CompactCache()
    selection, compact, hit = sweep_once(model, instruction, options, kept, progress)
    # No KV cache goes with it: the answer must not depend on what was kept.
    spent = time.perf_counter() - start
    if hit:
        return _Ready(selection, compact, Seconds(load=spent), "hit")
    return _Ready(selection, compact, Seconds(select=spent), "miss")


def _read(
    model: IFPModel,
    ready: _Ready,
    instruction: Prompt,
    tokens: list[int],
    *,
    whole: bool,
) -> _Ready:
    """Let the dense model's reading of the prompt be gone on from; where there is none,
    it reads now, if it is to read the whole.
    """
    read = model.instruction_tokens(instruction)
    found = read_densely(ready.kv, read, tokens, model if whole else None)
    seconds = replace(ready.seconds, prefill=found.seconds)
    return ready._replace(seconds=seconds, kv=found.kv, read=found.tokens)


def _response(step: Any, ready: _Ready) -> GenerationResponse:
    """Add our own figures to a response of mlx-lm."""
    spent = ready.seconds
    prefill = spent.prefill + step.prompt_tokens / step.prompt_tps
    prompt_tokens = ready.read + step.prompt_tokens
    selected = ready.read and not spent.prefill  # read while selecting
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
        prompt_tps=prompt_tokens / (prefill + (spent.select if selected else 0)),
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
