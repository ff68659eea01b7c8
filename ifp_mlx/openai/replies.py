"""What the server sends back: OpenAI's answers, chunks and errors."""

import json
import time
import uuid
from codecs import getincrementaldecoder
from collections.abc import Iterator, Sequence
from typing import Any

from ..engine import Dialect
from ..engine.dialect import TALKING
from ..engine.errors import (
    Busy,
    CheckFailed,
    ContextTooLong,
    EngineClosed,
    IFPError,
    OutOfMemory,
    UnknownTask,
)
from ..engine.events import Done, Token
from .asked import Asked, opening
from .fields import FieldError
from .parts import Part, Parts, Piece

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


class Choice:
    """One of the answers to a request.

    Args:
        index: which of them.
        parts: divides its text.
        logprobs: spells the log probabilities of its tokens, if they were asked for.
    """

    def __init__(
        self, index: int, parts: Parts, logprobs: "ChatLogprobs | TextLogprobs | None"
    ) -> None:
        self._index, self._parts, self._spelled = index, parts, logprobs
        self._logprobs: dict[str, list[Any]] = {}
        self._said = {"content": "", "reasoning": ""}
        self._calls: list[dict[str, Any]] = []
        self._thoughts = 0  # tokens
        self.done: Done | None = None

    @property
    def over(self) -> bool:
        """Whether it wants no more tokens."""
        return self._parts.over

    def take(self, token: Token) -> list[dict[str, Any]]:
        """Take a token; return its deltas, each as a choice of a chunk."""
        deltas = [d for part in self._parts.add(token.text) for d in self._deltas(part)]
        self._thoughts += self._parts.thinking
        logprobs = None
        if self._spelled is not None and token.logprobs and not self.over:
            logprobs = self._spelled(token)
            for name, more in logprobs.items():
                self._logprobs.setdefault(name, []).extend(more)
        if logprobs and not deltas:
            deltas = [{}]
        return [
            self._shown(delta=delta, logprobs=None if number else logprobs)
            for number, delta in enumerate(deltas)
        ]

    def finish(self, done: Done) -> list[dict[str, Any]]:
        """Take the end; return the last deltas, and then the reason."""
        self.done = done
        deltas = [d for part in self._parts.finish() for d in self._deltas(part)]
        last = self._shown(delta={}, logprobs=None, reason=self.reason)
        return [self._shown(delta=d, logprobs=None) for d in deltas] + [last]

    @property
    def reason(self) -> str | None:
        """Why it ended, in OpenAI's words."""
        assert self.done is not None
        ended = self.done.finish_reason == "stop" or self.over
        return "tool_calls" if self._calls and ended else self.done.finish_reason

    @property
    def thoughts(self) -> int:
        """How many tokens its thoughts have."""
        return self._thoughts

    def whole(self) -> dict[str, Any]:
        """Return the whole choice of a chat."""
        calls = self._calls
        message: dict[str, Any] = {"role": "assistant", "refusal": None}
        message["content"] = self._said["content"] or (None if calls else "")
        if self._said["reasoning"]:
            message["reasoning"] = self._said["reasoning"]
        if calls:
            message["tool_calls"] = calls
        return self._ended() | {"message": message}

    def text(self) -> dict[str, Any]:
        """Return the whole choice of a completion."""
        return self._ended() | {"text": self._said["content"]}

    def _ended(self) -> dict[str, Any]:
        about = {"index": self._index, "finish_reason": self.reason}
        return about | {"logprobs": self._logprobs or None}

    def _shown(
        self, delta: dict[str, Any], logprobs: Any, reason: str | None = None
    ) -> dict[str, Any]:
        about = {"index": self._index, "delta": delta, "logprobs": logprobs}
        return about | {"finish_reason": reason}

    def _deltas(self, part: Part) -> list[dict[str, Any]]:
        """Return what a part adds; for a call its name, then its arguments."""
        if isinstance(part, Piece):
            self._said[part.kind] += part.text
            return [{part.kind: part.text}]
        number, name = len(self._calls), part.call.name
        head = {"id": part.id, "type": "function"}
        whole = {"name": name, "arguments": part.call.arguments}
        self._calls.append(head | {"function": whole})
        begun = head | {"index": number, "function": {"name": name, "arguments": ""}}
        rest = {"index": number, "function": {"arguments": part.call.arguments}}
        return [{"tool_calls": [begun]}, {"tool_calls": [rest]}]


class Answer:
    """The answer to a chat or a completion, whole or in chunks.

    Args:
        asked: the request.
        dialect: of the model.
    """

    def __init__(self, asked: Asked, dialect: Dialect) -> None:
        self._chat, self._usage = asked.chat, asked.include_usage
        prefix, kind = ("chatcmpl", "chat.completion") if asked.chat else ("cmpl", None)
        self._kind = kind or "text_completion"
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": asked.model,
        }
        state = opening(asked, dialect) if asked.chat else TALKING
        dialect = dialect if asked.chat else Dialect()
        spell = ChatLogprobs if asked.chat else TextLogprobs
        self._choices = [
            Choice(
                index,
                Parts(dialect, state, asked.calling),
                spell() if asked.options["logprobs"] else None,
            )
            for index in range(asked.choices)
        ]

    def over(self, index: int) -> bool:
        """Whether a choice wants no more tokens."""
        return self._choices[index].over

    def first(self) -> Iterator[bytes]:
        """Yield the chunks that open a streamed chat."""
        for index in range(len(self._choices) if self._chat else 0):
            delta = {"role": "assistant", "content": ""}
            choice = {"index": index, "delta": delta, "logprobs": None}
            yield self._chunk([choice | {"finish_reason": None}])

    def take(self, index: int, token: Token) -> Iterator[bytes]:
        """Take a token; yield its chunks."""
        for choice in self._choices[index].take(token):
            yield self._chunk([self._streamed(choice)])

    def finish(self, index: int, done: Done) -> Iterator[bytes]:
        """Take the end of a choice; yield its last chunks, with our figures."""
        *more, last = self._choices[index].finish(done)
        for choice in more:
            yield self._chunk([self._streamed(choice)])
        yield self._chunk([self._streamed(last)], ifp=figures_of(done))

    def last(self) -> Iterator[bytes]:
        """Yield what ends a stream."""
        if self._usage:
            yield self._chunk([], usage=self._sum())
        yield event_bytes("[DONE]")

    def whole(self) -> dict[str, Any]:
        """Return the whole answer."""
        way = Choice.whole if self._chat else Choice.text
        about = {"object": self._kind, "usage": self._sum()}
        choices = [way(choice) for choice in self._choices]
        figures = figures_of(self._dones()[0])
        return self._head | about | {"choices": choices, "ifp": figures}

    @staticmethod
    def error(error: BaseException) -> bytes:
        """Return the event of an error in a stream."""
        return event_bytes(error_of(error)[1])

    def _streamed(self, choice: dict[str, Any]) -> dict[str, Any]:
        if self._chat:
            return choice
        return choice | {"text": choice.pop("delta").get("content", "")}

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        kind = "chat.completion.chunk" if self._chat else self._kind
        usage = {"usage": None} if self._usage else {}
        about = self._head | {"object": kind, "choices": choices}
        return event_bytes(about | usage | more)

    def _dones(self) -> list[Done]:
        return [choice.done for choice in self._choices if choice.done]

    def _sum(self) -> dict[str, Any]:
        thoughts = sum(choice.thoughts for choice in self._choices)
        return usage_of(self._dones(), thoughts)


class ChatLogprobs:
    """Log probabilities in a chat's form, of every token, thoughts and calls
    included.
    """

    def __call__(self, token: Token) -> dict[str, Any]:
        """Return those of one token."""
        own, *top = [
            {"token": item.text, "logprob": item.logprob, "bytes": list(item.utf8)}
            for item in token.logprobs
        ]
        return {"content": [own | {"top_logprobs": top}]}


class TextLogprobs:
    """Log probabilities as a completion has them."""

    def __init__(self) -> None:
        self._offset = 0  # of the next token in the text, in characters
        self._characters = getincrementaldecoder("utf-8")("replace")

    def __call__(self, token: Token) -> dict[str, Any]:
        """Return those of one token."""
        own, *top = token.logprobs
        offset = self._offset
        self._offset += self._length(token)
        return {
            "tokens": [own.text],
            "token_logprobs": [own.logprob],
            "top_logprobs": [{item.text: item.logprob for item in reversed(top)}],
            "text_offset": [offset],
        }

    def _length(self, token: Token) -> int:
        """Return how many characters a token completes; a leading space of the first
        token does not count.
        """
        content = token.logprobs[0].utf8
        if self._offset == 0 and not token.text.startswith(" "):
            content = content.removeprefix(b" ")
        return len(self._characters.decode(content))


def usage_of(dones: Sequence[Done], thoughts: int) -> dict[str, Any]:
    """Return OpenAI's ``usage`` of all choices together; the prompt counts once."""
    first, said = dones[0], sum(done.generation_tokens for done in dones)
    return {
        "prompt_tokens": first.prompt_tokens,
        "completion_tokens": said,
        "total_tokens": first.prompt_tokens + said,
        "prompt_tokens_details": {"cached_tokens": first.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": thoughts},
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
