"""How fast models decode, measured side by side."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping

import mlx.core as mx
import mlx.nn as nn

TURNS = 3


def decode_speeds(
    models: Mapping[str, nn.Module],
    prompt: list[int],
    tokens: int,
    *,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, float]:
    """Return the tokens per second at which each model decodes at batch 1.

    The models take turns, so that a busy machine slows all alike; the first turn is
    not counted, and the median of the others is.

    Args:
        models: all in memory.
        prompt: token ids, not part of the time.
        tokens: how many to decode, at least 1; an end of text does not stop it.
        progress: wraps the iteration over turns.
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in progress(range(TURNS + 1)):
        for name in list(models)[
            :: 1 if turn % 2 else -1
        ]:  # so that none is always first
            spent = decode(models[name], prompt, tokens)
            if turn:
                seconds[name].append(spent)
    return {name: tokens / statistics.median(s) for name, s in seconds.items()}


def decode(model: nn.Module, prompt: list[int], tokens: int) -> float:
    """Return the seconds of this many tokens after the first."""
    from mlx_lm.generate import generate_step

    steps = generate_step(mx.array(prompt), model, max_tokens=tokens + 1)
    next(steps)
    start = time.perf_counter()
    for _ in steps:
        pass
    return time.perf_counter() - start
