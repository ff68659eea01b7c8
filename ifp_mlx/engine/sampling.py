"""How a caller may ask an engine to decode. Checked at once."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..checking.rule import BOUNDS, Decoding, Processor, check_bounds
from .errors import InvalidRequest

DEFAULT_MAX_TOKENS = 512


@dataclass(frozen=True)
class Sampling:
    """How to decode.

    Attributes:
        max_tokens: at most so many; ``None`` is 512, or what the context leaves.
        temp: temperature; 0 is greedy.
        top_p, min_p, top_k: as of :class:`ifp_mlx.checking.rule.Decoding`.
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
        bounds = BOUNDS | {
            "max_tokens": (1, math.inf),
            "top_logprobs": (0, 20),
            "repetition_penalty": (0, 100),
            "presence_penalty": (-2, 2),
            "frequency_penalty": (-2, 2),
        }
        try:
            check_bounds(self, bounds)
        except ValueError as error:
            raise InvalidRequest(str(error)) from None
        if any(not text for text in self.stop_strings):
            raise InvalidRequest("A stop string is empty; leave it out.")

    def decoding(self, seed: int, processors: Sequence[Processor] = ()) -> Decoding:
        """Return how a token is chosen.

        Args:
            seed: of all draws.
            processors: mlx-lm's logits processors.
        """
        how = {name: getattr(self, name) for name in BOUNDS}
        return Decoding(**how, seed=seed, processors=processors)
