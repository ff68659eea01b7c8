"""What ``/v1/responses`` sends back: items, and the events that report them."""

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

from ..engine import Dialect
from ..engine.events import Done, Token
from .asked import Asked, opening
from .parts import Called, Part, Parts
from .replies import error_of, figures_of

Event = dict[str, Any]


class ResponseAnswer:
    """One response, whole or in events.

    Args:
        asked: the request.
        dialect: of the model.
    """

    def __init__(self, asked: Asked, dialect: Dialect) -> None:
        self._parts = Parts(dialect, opening(asked, dialect), asked.calling)
        self._body: dict[str, Any] = {
            "id": _id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": asked.model,
            "output": [],
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "truncation": "disabled",
            "usage": None,
        } | asked.echo
        self._numbers = 0
        self._thoughts = 0  # tokens
        self._open: Piecewise | None = None

    def over(self, index: int) -> bool:
        """Whether it wants no more tokens."""
        return self._parts.over

    def first(self) -> Iterator[bytes]:
        """Yield the events that open a stream."""
        for kind in ("response.created", "response.in_progress"):
            yield self._event({"type": kind, "response": self._body})

    def take(self, index: int, token: Token) -> Iterator[bytes]:
        """Take a token; yield the events it gives."""
        parts = self._parts.add(token.text)
        self._thoughts += self._parts.thinking
        yield from self._told(parts)

    def finish(self, index: int, done: Done) -> Iterator[bytes]:
        """Take the end; yield the last events, and the whole response."""
        yield from self._told(self._parts.finish())
        yield from self._close()
        if not self._body["output"]:  # an empty answer is an item too
            yield from self._told_piece("content", "")
            yield from self._close()
        cut = done.finish_reason == "length"
        self._body["status"] = "incomplete" if cut else "completed"
        if cut:
            self._body["incomplete_details"] = {"reason": "max_output_tokens"}
        self._body["usage"] = usage_of(done, self._thoughts)
        self._body["ifp"] = figures_of(done)
        kind = f"response.{self._body['status']}"
        yield self._event({"type": kind, "response": self._body})

    def last(self) -> Iterator[bytes]:
        """Yield what ends a stream: nothing here."""
        yield from ()

    def whole(self) -> dict[str, Any]:
        """Return the whole response."""
        return self._body

    def error(self, error: BaseException) -> bytes:
        """Return the event of an error in a stream."""
        said = error_of(error)[1]["error"]
        told = {"code": said["code"] or said["type"], "message": said["message"]}
        body = self._body | {"status": "failed", "error": told}
        return self._event({"type": "response.failed", "response": body})

    def _told(self, parts: list[Part]) -> Iterator[bytes]:
        for part in parts:
            if isinstance(part, Called):
                yield from self._close()
                yield from self._told_call(part)
            else:
                yield from self._told_piece(part.kind, part.text)

    def _told_piece(self, kind: str, text: str) -> Iterator[bytes]:
        if self._open is None or self._open.kind != kind:
            yield from self._close()
            self._open = Piecewise(kind, len(self._body["output"]))
            yield from map(self._event, self._open.begin())
        self._open.text += text
        if text:
            yield self._event(self._open.delta(text))

    def _close(self) -> Iterator[bytes]:
        if self._open is not None:
            yield from map(self._event, self._open.end())
            self._body["output"].append(self._open.item("completed"))
            self._open = None

    def _told_call(self, part: Called) -> Iterator[bytes]:
        index, call = len(self._body["output"]), part.call
        item = {"id": _id("fc"), "type": "function_call", "call_id": part.id}
        item |= {"name": call.name, "arguments": "", "status": "in_progress"}
        about = {"item_id": item["id"], "output_index": index}
        yield self._event(_added(index, item))
        kind = "response.function_call_arguments"
        yield self._event({"type": f"{kind}.delta"} | about | {"delta": call.arguments})
        whole = {"name": call.name, "arguments": call.arguments}
        yield self._event({"type": f"{kind}.done"} | about | whole)
        item |= {"arguments": call.arguments, "status": "completed"}
        yield self._event(_done(index, item))
        self._body["output"].append(item)

    def _event(self, event: Event) -> bytes:
        numbered = event | {"sequence_number": self._numbers}
        self._numbers += 1
        return f"event: {event['type']}\ndata: {json.dumps(numbered)}\n\n".encode()


class Piecewise:
    """An item whose text comes piece by piece: a message, or a thought.

    Args:
        kind: ``content`` or ``reasoning``.
        index: of the item in the output.
    """

    def __init__(self, kind: str, index: int) -> None:
        self.kind, self._index, self.text = kind, index, ""
        said = kind == "content"
        self._id = _id("msg" if said else "rs")
        self._name = "response.output_text" if said else "response.reasoning_text"

    def item(self, status: str) -> dict[str, Any]:
        """Return the item as it is now."""
        content = [] if status == "in_progress" else [self._part()]
        item: dict[str, Any] = {"id": self._id, "content": content, "status": status}
        if self.kind == "content":
            return item | {"type": "message", "role": "assistant"}
        return item | {"type": "reasoning", "summary": []}

    def begin(self) -> Iterator[Event]:
        """Yield what opens it."""
        yield _added(self._index, self.item("in_progress"))
        yield {"type": "response.content_part.added"} | self._about | self._parted()

    def delta(self, text: str) -> Event:
        """Return what adds text to it."""
        return {"type": f"{self._name}.delta"} | self._about | self._with(delta=text)

    def end(self) -> Iterator[Event]:
        """Yield what closes it."""
        yield {"type": f"{self._name}.done"} | self._about | self._with(text=self.text)
        yield {"type": "response.content_part.done"} | self._about | self._parted()
        yield _done(self._index, self.item("completed"))

    @property
    def _about(self) -> Event:
        return {"item_id": self._id, "output_index": self._index, "content_index": 0}

    def _with(self, **text: str) -> Event:
        return {**text, "logprobs": []} if self.kind == "content" else dict(text)

    def _parted(self) -> Event:
        return {"part": self._part()}

    def _part(self) -> dict[str, Any]:
        if self.kind == "content":
            part = {"type": "output_text", "text": self.text}
            return part | {"annotations": [], "logprobs": []}
        return {"type": "reasoning_text", "text": self.text}


def usage_of(done: Done, thoughts: int) -> dict[str, Any]:
    """Return the ``usage`` of a response."""
    return {
        "input_tokens": done.prompt_tokens,
        "input_tokens_details": {"cached_tokens": done.cached_tokens},
        "output_tokens": done.generation_tokens,
        "output_tokens_details": {"reasoning_tokens": thoughts},
        "total_tokens": done.prompt_tokens + done.generation_tokens,
    }


def _added(index: int, item: dict[str, Any]) -> Event:
    return {"type": "response.output_item.added", "output_index": index, "item": item}


def _done(index: int, item: dict[str, Any]) -> Event:
    return {"type": "response.output_item.done", "output_index": index, "item": item}


def _id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
