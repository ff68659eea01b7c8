"""What the server sends back: OpenAI's answers, chunks and errors."""

import json
import time
import uuid
from codecs import getincrementaldecoder
from typing import Any

from ..engine.errors import (
    Busy,
    CheckFailed,
    ContextTooLong,
    EngineClosed,
    IFPError,
    OutOfMemory,
    UnknownTask,
)
from ..engine.events import Done, Token, TokenLogprob
from .protocol import FieldError

# The first that fits: status, OpenAI's type and code.
STATUS: tuple[tuple[type[BaseException], int, str, str | None], ...] = (
    (Busy, 429, "rate_limit_error", "queue_full"),
    (EngineClosed, 503, "server_error", "engine_closed"),
    (ContextTooLong, 413, "invalid_request_error", "context_length_exceeded"),
    (OutOfMemory, 413, "invalid_request_error", "memory_limit_exceeded"),
    (CheckFailed, 500, "server_error", "check_failed"),
    (UnknownTask, 404, "invalid_request_error", "task_not_found"),
    (IFPError, 400, "invalid_request_error", None),
)


def error_of(error: BaseException) -> tuple[int, dict[str, Any]]:
    """Return the HTTP status and the body for an error of the engine."""
    for kind, status, name, code in STATUS:
        if isinstance(error, kind):
            field = error.field if isinstance(error, FieldError) else None
            return status, error_body(str(error), name, code, field)
    message = f"{type(error).__name__}: {error}"
    return 500, error_body(message, "server_error", None)


def error_body(
    message: str, kind: str, code: str | None = None, field: str | None = None
) -> dict[str, Any]:
    """Return an error as OpenAI words it."""
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


class Answer:
    """One answer, whole or in chunks.

    Args:
        model: what the request called it.
        chat: whether it is a chat completion.
        logprobs: whether log probabilities were asked for.
    """

    def __init__(self, model: str, *, chat: bool, logprobs: bool) -> None:
        self._chat, self._logprobs = chat, logprobs
        prefix, kind = ("chatcmpl", "chat.completion") if chat else ("cmpl", None)
        self._kind = kind or "text_completion"
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._tokens: list[Token] = []
        self._offset = 0  # of the next token in the text, in characters
        self._characters = getincrementaldecoder("utf-8")("replace")

    def add(self, token: Token) -> None:
        """Take a token for :meth:`whole`."""
        self._tokens.append(token)

    def whole(self, done: Done) -> dict[str, Any]:
        """Return the whole answer."""
        text = "".join(token.text for token in self._tokens)
        choice: dict[str, Any] = {"index": 0, "finish_reason": done.finish_reason}
        choice["logprobs"] = self._logprobs_of(self._tokens)
        if self._chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        return self._wrap(self._kind, [choice]) | {
            "usage": usage_of(done),
            "ifp": figures_of(done),
        }

    def first(self) -> dict[str, Any] | None:
        """Return the chunk that opens a streamed chat, or ``None``."""
        if not self._chat:
            return None
        return self._chunk({"role": "assistant", "content": ""})

    def chunk(self, token: Token) -> dict[str, Any] | None:
        """Return the chunk of a token, or ``None`` if it shows nothing."""
        if not token.text and not token.logprobs:
            return None
        return self._chunk({"content": token.text}, [token])

    def last(self, done: Done) -> dict[str, Any]:
        """Return the chunk that says how the answer ended, with our figures."""
        chunk = self._chunk({}, reason=done.finish_reason)
        return chunk | {"ifp": figures_of(done)}

    def usage(self, done: Done) -> dict[str, Any]:
        """Return the chunk that ``stream_options.include_usage`` asks for."""
        return self._wrap(self._chunk_kind, []) | {"usage": usage_of(done)}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self._chat else self._kind

    def _chunk(
        self,
        delta: dict[str, str],
        tokens: list[Token] | None = None,
        reason: str | None = None,
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason}
        choice["logprobs"] = self._logprobs_of(tokens or [])
        if self._chat:
            choice["delta"] = delta
        else:
            choice["text"] = delta.get("content", "")
        return self._wrap(self._chunk_kind, [choice])

    def _wrap(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head | {"object": kind, "choices": choices}

    def _logprobs_of(self, tokens: list[Token]) -> dict[str, Any] | None:
        if not self._logprobs or not tokens:
            return None
        if self._chat:
            return {"content": [_spelled(token.logprobs) for token in tokens]}
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += self._length(token)
        return {
            "tokens": [token.logprobs[0].text for token in tokens],
            "token_logprobs": [token.logprobs[0].logprob for token in tokens],
            "top_logprobs": [
                {item.text: item.logprob for item in reversed(token.logprobs[1:])}
                for token in tokens
            ],
            "text_offset": offsets,
        }

    def _length(self, token: Token) -> int:
        """Return the characters that a token completes; text begins without the space
        that the first token may begin with.
        """
        content = token.logprobs[0].utf8
        if self._offset == 0 and not token.text.startswith(" "):
            content = content.removeprefix(b" ")
        return len(self._characters.decode(content))


def usage_of(done: Done) -> dict[str, Any]:
    """Return OpenAI's ``usage``."""
    return {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.generation_tokens,
        "total_tokens": done.prompt_tokens + done.generation_tokens,
        "prompt_tokens_details": {"cached_tokens": done.cached_tokens},
    }


def figures_of(done: Done) -> dict[str, Any]:
    """Return our own figures: the mask and the timings, in seconds."""
    return {
        "mask_id": done.mask_id,
        "identity": done.identity,
        "kept_channels": done.kept_channels,
        "total_channels": done.total_channels,
        "unit": done.unit,
        "agreement": done.agreement,
        "promise": done.promise,
        "router_mass": done.router_mass,
        "seconds": {name: round(s, 6) for name, s in done.seconds.items()},
        "tokens_per_second": round(done.tokens_per_second, 3),
        "check": done.check,
    }


def event_bytes(content: dict[str, Any] | str) -> bytes:
    """Return a server-sent event."""
    text = content if isinstance(content, str) else json.dumps(content)
    return f"data: {text}\n\n".encode()


def _spelled(logprobs: tuple[TokenLogprob, ...]) -> dict[str, Any]:
    own, *top = [
        {
            "token": item.text,
            "logprob": item.logprob,
            "bytes": list(item.utf8),
        }
        for item in logprobs
    ]
    return own | {"top_logprobs": top}
