"""How a caller asks an engine to decode, checked at once."""

import math
from dataclasses import dataclass
from typing import Any

from ..decoding.options import Decoding, check_bounds
from .errors import InvalidRequest

DEFAULT_MAX_TOKENS = 512


@dataclass(frozen=True)
class Sampling(Decoding):
    """How to decode: the fields of :class:`ifp_mlx.decoding.options.Decoding`, and more.

    Attributes:
        max_tokens: most tokens of the answer; ``None`` is 512, or less where the
            context leaves less.
        seed: makes sampling repeatable, alone or in a batch.
        logprobs: report the token's log probability.
        top_logprobs: report this many of the most probable tokens too.
        json_schema: a JSON schema the text must follow (needs ``llguidance``).
    """

    max_tokens: int | None = None
    seed: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    json_schema: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
            check_bounds(self, {"max_tokens": (1, math.inf), "top_logprobs": (0, 20)})
        except ValueError as error:
            raise InvalidRequest(str(error)) from None
