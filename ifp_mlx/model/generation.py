"""The main job: select, load the units, prefill, decode."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..checking.answer import CheckedResponse, answered
from ..checking.loop import CheckedRun, DraftLength
from ..checking.rule import Rule
from ..decoding.kv import KVOptions
from ..decoding.options import Decoding, Processor
from ..decoding.stops import Stops
from ..files.paths import path_of
from ..files.progress import ProgressBar
from ..selection.prompts import (
    Prompt,
    as_messages,
    ids_of,
    instruction_of,
    tokenize,
)
from ..selection.request import Request
from .checkpoint import Compact, IFPModel
from .compact_cache import CompactCache, prepare_once
from .decide import decide, with_instruction
from .decision import Decision
from .dense_prefill import Reading, read_densely
from .fit import Limits
from .prompt_cache import PromptFile, continuation, open_length, write_prompt_cache
from .responses import GenerationResponse, Seconds

STOCK_MAX_TOKENS = 256  # mlx-lm's default
STOCK_OPTIONS = {
    "max_tokens",
    "prefill_step_size",
}  # mlx-lm's options that do not change how tokens are chosen


def stream_generate(
    model: IFPModel,
    tokenizer: Any,
    prompt: Prompt,
    *,
    request: Request | None = None,
    system_prompt: str | None = None,
    chat_template: bool = True,
    cache: CompactCache | None = None,
    prompt_cache_file: str | os.PathLike[str] | None = None,
    progress: ProgressBar = iter,
    **options: Any,
) -> Iterator[GenerationResponse]:
    """Select units, load them, and generate from the compact model.

    Args:
        model: from :func:`ifp_mlx.load`.
        tokenizer: the one that came with it.
        prompt: what is generated from: a user's text, messages (both go through the
            chat template, and an assistant's message at the end is continued), or
            token ids in any sequence or array, taken as they are.
        request: what to select; default: what ``options`` say.
        system_prompt: put before the prompt, and so part of the default instruction.
        chat_template: ``False`` leaves the chat template out.
        cache: keeps compact models made under a memory limit for the next time.
        prompt_cache_file: a ``.safetensors`` file of mlx-lm's form, whose text the
            compact model does not read again: the prompt goes on where it ends, inside
            the user's message. If there is no such file, it is written.
        progress: wraps iterations over calibration texts and over layers.
        options: the fields of :class:`ifp_mlx.selection.request.Request`
            (``instruction``, ``keep``, ``selector``, ``check``, ...; by default the
            prompt's messages up to the first user message select) and of
            :class:`ifp_mlx.decoding.options.Decoding` (``temp``, ``top_p``,
            ``repetition_penalty``, ``stop_strings``, ...; the seed is the request's),
            and of :class:`ifp_mlx.decoding.kv.KVOptions` (``kv_bits``, ...). The others
            go to ``mlx_lm.stream_generate`` (``max_tokens``, ``prefill_step_size``,
            ...); with ``check`` only these two are allowed.

    Yields:
        The text as it comes, with its cost so far.

    Raises:
        ValueError: on an empty prompt or a choice that cannot be had.
    """
    asked, rest = Request.split(options)
    request = request or asked
    decoding, rest = Decoding.split(rest | {"seed": request.seed})
    kv, rest = KVOptions.split(rest)
    path = None if prompt_cache_file is None else path_of(prompt_cache_file)
    request = _checked_options(request, kv, path, rest)
    kv.check_fits(model.source.skeleton)
    file = None if path is None else PromptFile.open(path, model)
    how: dict[str, Any] = {"system": system_prompt, "chat_template": chat_template}
    how["config"] = request.chat_template_config
    tokens, selecting = _read_prompt(model, tokenizer, prompt, file, **how)
    decoding = decoding.fitted(tokenizer, model.vocabulary)
    context = len(tokens) + rest.get("max_tokens", STOCK_MAX_TOKENS)
    limits = Limits(context, request.memory_bytes, kv)
    compact, decision = _prepared(model, request, selecting, limits, cache, progress)
    if file is not None:
        reading = file.reading(compact, kv)
    elif path is not None:
        count = open_length(tokenizer, prompt, tokens, **how)
        reading = write_prompt_cache(path, model, compact, tokens, count, kv, rest)
    else:
        reading = _read_densely(model, decision, compact, tokens)
    make = stream_checked if compact.whole is not None else _stream_unchecked
    steps = make(compact, tokenizer, tokens, request, reading, decoding, kv, **rest)
    for one in _until(decoding.stop_strings, steps):
        yield _response(one, compact, reading)


def _prepared(
    model: IFPModel,
    request: Request,
    selecting: Prompt,
    limits: Limits,
    cache: CompactCache | None,
    progress: ProgressBar,
) -> tuple[Compact, Decision]:
    """Return the compact model, and what was decided on it."""
    how: dict[str, Any] = {"limits": limits, "progress": progress}
    decision = decide(with_instruction(request, selecting), model, **how)
    kept = request.memory_bytes is not None and decision.selection is None
    if kept and not decision.checks:
        compact = prepare_once(model, decision, cache or CompactCache(), progress)
    else:
        compact = model.prepare(decision, progress=progress)
    return compact, decision


def _checked_options(
    request: Request, kv: KVOptions, path: Path | None, options: Iterable[str]
) -> Request:
    """Return the request; with a prompt cache file the compact model reads the prompt.

    Raises:
        ValueError: on options that do not go together.
    """
    if path is not None and request.prefill == "dense":
        raise ValueError(
            f"prefill=dense has the whole model read the prompt, and {path} is read by the "
            "compact one; leave one of them out."
        )
    if not request.checks:
        return request if path is None else replace(request, prefill="compact")
    kv.check_unchecked(request.check)
    if path is not None:
        raise ValueError(
            f"check={request.check} has the whole model read the prompt, and {path} is "
            "read by the compact one; leave one of them out."
        )
    if unknown := {*options} - STOCK_OPTIONS:
        raise ValueError(
            f"{min(unknown)!r} does not go with checking, which has to know how tokens "
            f"are chosen; there are {', '.join(Decoding.names())}."
        )
    return request


def _until(strings: Sequence[str], steps: Iterable[Any]) -> Iterator[Any]:
    """Yield mlx-lm's responses up to the first of some stop strings."""
    stops = Stops(strings)
    for step in steps:
        text = stops.add(step.text)
        if stops.stopped:
            yield replace(step, text=text, finish_reason="stop")
            return
        if step.finish_reason is not None:
            text += stops.finish()
        yield replace(step, text=text)


def _read_densely(
    model: IFPModel, decision: Decision, compact: Compact, tokens: list[int]
) -> Reading:
    """Return what the dense model reads of the prompt before the answer begins."""
    if decision.request.prefill == "compact":
        return Reading(None, 0)
    dense = model if decision.request.prefill == "dense" else None
    if compact.whole is not None:  # which reads the rest, a layer at a time
        dense = None
    return read_densely(compact.kv, decision.tokens, tokens, dense)


def _stream_unchecked(
    compact: Compact,
    tokenizer: Any,
    tokens: list[int],
    request: Request,
    reading: Reading,
    decoding: Decoding,
    kv: KVOptions,
    *,
    logits_processors: Sequence[Processor] | None = None,
    **options: Any,
) -> Iterator[Any]:
    """Generate from a compact model alone, as mlx-lm does."""
    from mlx_lm import stream_generate as stock_stream_generate

    more = [*decoding.processors, *(logits_processors or ())]
    decoding = replace(decoding, processors=more)
    options = decoding.for_mlx_lm(tokens[: reading.tokens]) | options
    options |= kv.for_mlx_lm()
    cache = reading.kv if reading.tokens else None
    options["prompt_cache"] = (
        kv.cache_of(compact.model) if cache is None else kv.holding(cache)
    )
    left = tokens[reading.tokens :]
    yield from stock_stream_generate(compact.model, tokenizer, left, **options)


def stream_checked(
    compact: Compact,
    tokenizer: Any,
    tokens: list[int],
    request: Request,
    reading: Reading,
    decoding: Decoding,
    kv: KVOptions,
    *,
    max_tokens: int = STOCK_MAX_TOKENS,
    prefill_step_size: int = 0,
) -> Iterator[CheckedResponse]:
    """Generate from a compact model that the whole one checks.

    Args:
        compact: the compact model, with the whole one beside it.
        tokenizer: mlx-lm's.
        tokens: the prompt's ids.
        request: says how to check.
        reading: what the dense model has read of the prompt.
        decoding: says how tokens are chosen.
        kv: the defaults; a check needs the plain cache.
        max_tokens: of the answer, at most.
        prefill_step_size: tokens of the prompt that are read at once; default: mlx-lm's.

    Raises:
        ValueError: if drafted tokens cannot be taken out of the model's KV cache again.
    """
    assert compact.whole is not None and request.check != "off"
    rule = Rule(request.check, decoding)
    length = DraftLength(request.draft_tokens)
    about = compact.whole, tokens, rule, length, reading.kv, reading.tokens
    run = CheckedRun(*about, follow=request.reselect == "drift")
    yield from answered(run, tokenizer, max_tokens, prefill_step_size)


def generate(
    model: IFPModel,
    tokenizer: Any,
    prompt: Prompt,
    **kwargs: Any,
) -> str:
    """Return the whole text of :func:`stream_generate`, which takes the same options."""
    steps = stream_generate(model, tokenizer, prompt, **kwargs)
    return "".join(step.text for step in steps)


def _response(step: Any, compact: Compact, reading: Reading) -> GenerationResponse:
    """Add our own figures to a response of mlx-lm."""
    prefill = reading.seconds + step.prompt_tokens / step.prompt_tps
    prompt_tokens = reading.tokens + step.prompt_tokens
    read_now = prompt_tokens - reading.cached
    # Read while selecting.
    selected = reading.tokens and not (reading.seconds or reading.cached)
    seconds = Seconds(
        select=compact.select,
        load=compact.load,
        prefill=prefill,
        decode=step.generation_tokens / step.generation_tps,
        ttft=compact.select + compact.load + prefill,
    )
    return GenerationResponse(
        text=step.text,
        token=step.token,
        finish_reason=step.finish_reason,
        selection=compact.selection,
        seconds=seconds,
        prompt_tokens=prompt_tokens,
        cached_tokens=reading.cached,
        prompt_tps=read_now / (prefill + (compact.select if selected else 0)),
        generation_tokens=step.generation_tokens,
        generation_tps=step.generation_tps,
        peak_memory_bytes=mx.get_peak_memory(),
        check=getattr(step, "check", None),
        cache=compact.cache,
    )


def _read_prompt(
    model: IFPModel,
    tokenizer: Any,
    prompt: Prompt,
    file: PromptFile | None,
    *,
    system: str | None,
    chat_template: bool,
    config: Mapping[str, Any] | None,
) -> tuple[list[int], Prompt]:
    """Return the prompt's tokens, those in a file included, and its default instruction."""
    how: dict[str, Any] = {"chat_template": chat_template, "config": config}
    begun: list[int] = []
    if file is not None:
        begun = [
            *file.tokens,
            *continuation(tokenizer, file, prompt, system=system, **how),
        ]
    if (ids := ids_of(prompt)) is not None:
        return model.readable(begun or ids), ids
    messages = as_messages(prompt, system)
    tokens = begun or tokenize(tokenizer, messages, open_end=True, **how)
    tokens = model.readable(tokens)
    if chat_template:
        return tokens, messages
    return tokens, tokenize(tokenizer, instruction_of(messages), chat_template=False)
