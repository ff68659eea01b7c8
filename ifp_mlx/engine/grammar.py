"""Answers that follow a grammar: llguidance as an mlx-lm logits processor."""

import json
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from .errors import InvalidRequest

Processor = Callable[[mx.array, mx.array], mx.array]


class Grammar:
    """The tokenizer as llguidance knows it; one for all requests.

    Args:
        tokenizer: mlx-lm's ``TokenizerWrapper`` of a fast tokenizer.
        vocabulary: how many tokens the model knows, possibly more than the tokenizer.

    Raises:
        InvalidRequest: if llguidance is not installed.
    """

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        try:
            import llguidance.hf
        except ImportError as error:
            raise InvalidRequest(
                "A JSON schema, a tool_choice that asks for a call and strict tools need "
                "llguidance: pip install 'ifp-mlx[json]'."
            ) from error
        self._eos = sorted(tokenizer.eos_token_ids)
        self._vocabulary = vocabulary
        self._tokenizer = tokenizer._tokenizer
        self._llguidance = llguidance.hf.from_tokenizer(
            self._tokenizer, n_vocab=vocabulary, eos_token=self._eos[0]
        )

    def processor(self, grammar: str) -> Processor:
        """Return the logits processor of one answer.

        Args:
            grammar: as :func:`ifp_mlx.engine.calling.grammar_of` writes it.

        Raises:
            InvalidRequest: if a schema in it is invalid, or uses what llguidance does
                not know.
        """
        from llguidance import LLMatcher

        matcher = LLMatcher(self._llguidance, grammar)
        if matcher.is_error():
            reason = matcher.get_error().splitlines()[0]
            raise InvalidRequest(f"The JSON schema cannot be followed: {reason}")
        return _Follow(matcher, self._eos, self._vocabulary)

    def spell(self, mark: str) -> str:
        """Return a mark of the chat template as a grammar writes it: its text, and by
        id those of its tokens that are not text to llguidance.
        """
        parts, text = [], list[int]()
        for token in [*self._tokenizer.encode(mark, add_special_tokens=False), None]:
            special = token is None or self._llguidance.is_special_token(token)
            if special and text:
                parts.append(json.dumps(self._tokenizer.decode(text)))
                text = []
            if token is not None and special:
                parts.append(f"<[{token}]>")
            elif token is not None:
                text.append(token)
        return " ".join(parts) or '""'


class _Follow:
    """Allows only tokens that the grammar allows next; after its end only the EOS."""

    def __init__(self, matcher: Any, eos: list[int], vocabulary: int) -> None:
        self._matcher, self._eos, self._vocabulary = matcher, eos, vocabulary
        self._read: int | None = None

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        if self._read is not None and not self._matcher.is_stopped():
            self._matcher.consume_tokens(tokens[self._read :].tolist())
        self._read = tokens.size
        return mx.where(mx.array(self._allowed(logits.shape[-1])), logits, -mx.inf)

    def _allowed(self, size: int) -> np.ndarray:
        allowed = np.zeros(size, dtype=bool)
        if self._matcher.is_stopped():
            allowed[self._eos] = True
            return allowed
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

        bits = allocate_token_bitmask(1, self._vocabulary)
        fill_next_token_bitmask(self._matcher, bits)
        bytes_ = bits.view(np.uint8)
        flags = np.unpackbits(bytes_, bitorder="little")[: self._vocabulary]
        allowed[: flags.size] = flags
        return allowed
