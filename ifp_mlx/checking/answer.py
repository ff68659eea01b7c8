"""The text of a checked answer, with mlx-lm's figures."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from .loop import CheckedRun, Checks


@dataclass
class CheckedResponse:
    """One token of a checked answer.

    Attributes:
        text: what it adds, possibly nothing.
        token: its id.
        logprobs: the dense model's log-probabilities there, ``[V]``, not yet computed.
        from_draft: whether the compact model said it first.
        prompt_tokens: tokens of the prompt that were read now.
        prompt_tps: how many of them per second, up to the first token.
        generation_tokens: tokens of the answer so far.
        generation_tps: tokens per second since the first.
        finish_reason: ``stop``, ``length``, or ``None`` while it goes on.
        check: what checking took so far.
    """

    text: str
    token: int
    logprobs: mx.array
    from_draft: bool
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    finish_reason: str | None
    check: Checks


def answered(
    run: CheckedRun, tokenizer: Any, max_tokens: int, step: int = 0
) -> Iterator[CheckedResponse]:
    """Read the prompt, then yield the answer token by token.

    Args:
        run: one that has not begun.
        tokenizer: mlx-lm's.
        max_tokens: at most so many; -1 for no limit.
        step: tokens of the prompt that are read at once; 0 for mlx-lm's number.

    Raises:
        ValueError: if no token is wanted.
    """
    from mlx_lm.generate import wired_limit

    if max_tokens == 0:
        raise ValueError("max_tokens=0 asks for no answer; ask for one token or more.")
    ends, detokenizer = tokenizer.eos_token_ids, tokenizer.detokenizer
    start = began = time.perf_counter()
    reads, said, rate = len(run.tokens) - run.known, 0, 0.0
    with wired_limit(run.whole.model):
        for _ in run.prefill(step):
            pass
        while True:
            left = max_tokens - said if max_tokens > 0 else 1 << 30
            for one in run.check(left, ends):
                said += 1
                if said == 1:
                    rate = reads / (time.perf_counter() - start)
                    began = time.perf_counter()
                reason = "length" if said == max_tokens else None
                if one.token in ends:
                    reason = "stop"
                else:
                    detokenizer.add_token(one.token)
                if reason is not None:
                    detokenizer.finalize()
                yield CheckedResponse(
                    text=detokenizer.last_segment,
                    token=one.token,
                    logprobs=one.logprobs,
                    from_draft=one.from_draft,
                    prompt_tokens=reads,
                    prompt_tps=rate,
                    generation_tokens=said,
                    generation_tps=said / max(time.perf_counter() - began, 1e-9),
                    finish_reason=reason,
                    check=replace(run.figures),
                )
                if reason is not None:
                    return
