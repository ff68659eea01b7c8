"""How a caller may ask an engine to decode. Checked at once."""

import math
from dataclasses import dataclass
from typing import Any

from .errors import InvalidRequest

DEFAULT_MAX_TOKENS = 512


@dataclass(frozen=True)
class Sampling:
    """How to decode.

    Attributes:
        max_tokens: at most so many; ``None`` is 512, or what the context leaves.
        temp: temperature; 0 is greedy.
        top_p, min_p, top_k: as mlx-lm's ``make_sampler``.
        seed: makes sampling repeatable, alone or in a batch.
        stop_strings: end the text before the first of these.
        logprobs: report the token's log probability.
        top_logprobs: report so many of the most probable tokens too.
        repetition_penalty, presence_penalty, frequency_penalty, logit_bias: as
            mlx-lm's ``make_logits_processors``.
        json_schema: a JSON schema the text must follow (needs ``llguidance``).
    """

    max_tokens: int | None = None
    temp: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    seed: int | None = None
    stop_strings: tuple[str, ...] = ()
    logprobs: bool = False
    top_logprobs: int = 0
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    json_schema: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        bounds: dict[str, tuple[float, float]] = {
            "max_tokens": (1, math.inf),
            "temp": (0, 100),
            "top_p": (0, 1),
            "min_p": (0, 1),
            "top_k": (0, math.inf),
            "top_logprobs": (0, 20),
            "repetition_penalty": (0, 100),
            "presence_penalty": (-2, 2),
            "frequency_penalty": (-2, 2),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                limit = f"at least {low}" if high == math.inf else f"{low} to {high}"
                raise InvalidRequest(f"{name}={value} must be {limit}.")
        if any(not text for text in self.stop_strings):
            raise InvalidRequest("A stop string is empty; leave it out.")
