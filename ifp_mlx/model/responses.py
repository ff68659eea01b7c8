"""What a step of a generation says: text, selection, times, memory."""

from dataclasses import asdict, dataclass
from typing import Any

from ..checking.loop import Checks
from ..selection.masks import Selection


@dataclass
class Seconds:
    """Where the time of one generation went, in seconds (the paper's Table 3).

    Attributes:
        select: from the instruction to the selection; in a sweep it includes loading,
            and reading the prompt if that selects.
        load: reading and slicing the selected units.
        prefill: reading the part of the prompt that is not read yet.
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
    """One step of :func:`ifp_mlx.stream_generate`.

    Attributes:
        text: the next piece of text, possibly empty.
        token: the token's id.
        finish_reason: ``"stop"``, ``"length"``, or ``None`` while it goes on.
        selection: the units it was generated with.
        seconds: the time spent so far.
        prompt_tokens: tokens in the prompt.
        cached_tokens: how many of them were in the prompt cache file.
        prompt_tps: prefill speed, tokens per second.
        generation_tokens: tokens generated so far.
        generation_tps: decode speed, tokens per second.
        peak_memory_bytes: MLX's peak since the process started, in bytes.
        check: what checking took so far, where the whole model checks.
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
    check: Checks | None = None
    cached_tokens: int = 0


def report(last: GenerationResponse) -> dict[str, Any]:
    """Return the last response's figures as plain data, without the text."""
    selection = last.selection
    return {
        "prompt_tokens": last.prompt_tokens,
        "cached_tokens": last.cached_tokens,
        "generation_tokens": last.generation_tokens,
        "finish_reason": last.finish_reason,
        "selection": {
            "selector": selection.origin.selector,
            "allocation": selection.origin.allocation,
            "unit": selection.unit,
            "mask_id": selection.mask_id,
            "identity": selection.identity,
            "compensated": selection.compensates,
            "agreement": selection.origin.agreement,
            "kl": selection.origin.kl,
            "router_mass": selection.origin.router_mass,
            "kept_channels": sum(selection.sizes),
            "total_channels": selection.channels * len(selection.sizes),
            "layers": selection.sizes,
        },
        "seconds": asdict(last.seconds),
        "generation_tps": last.generation_tps,
        "prompt_tps": last.prompt_tps,
        "peak_memory_bytes": last.peak_memory_bytes,
        "cache": last.cache,
        "check": None if last.check is None else asdict(last.check),
    }
