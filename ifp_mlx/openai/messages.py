"""The messages of a chat, as requests have them and as chat templates want them."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import PlainValidator, TypeAdapter
from pydantic_core import PydanticCustomError

from ..engine import Dialect
from ..selection.prompts import Message
from .fields import FieldError, Fields, Words, by

NO_TOOLS = (
    "is not in this model's chat template; leave it out, or serve a model whose template "
    "shows tools."
)


class TextPart(Fields):
    """A part of a message."""

    type: str
    text: str


def text_of(**kinds: type[Fields]) -> PlainValidator:
    """Return a validator of a text, or of a list of parts that are joined to one."""
    parts = TypeAdapter(list[Annotated[Any, by("type", **kinds)]])

    def check(value: Any) -> str:
        if isinstance(value, str):
            return value
        if not isinstance(value, list):
            words = "must be a text, or a list of text parts"
            raise PydanticCustomError("must", "{words}", {"words": words})
        return "".join(part.text for part in parts.validate_python(value))

    return PlainValidator(check)


def _arguments(value: Any) -> dict[str, Any]:
    try:
        found = json.loads(value) if isinstance(value, str) else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise PydanticCustomError("must", "must be a JSON object, as text")
    return found


Content = Annotated[str, text_of(text=TextPart)]
Arguments = Annotated[dict[str, Any], PlainValidator(_arguments)]


class Said(Fields):
    """A system's, developer's or user's message."""

    role: str
    content: Content


class CalledFunction(Fields):
    """What an assistant called."""

    name: Words
    arguments: Arguments


class ToolCall(Fields):
    """A call of an earlier answer."""

    id: Words
    type: Literal["function"]
    function: CalledFunction


class AssistantSaid(Fields):
    """An earlier answer, or the beginning of this one."""

    role: str
    content: Content | None = None
    reasoning: str | None = None
    tool_calls: list[Annotated[ToolCall, by("type", function=ToolCall)]] = []


class ToolSaid(Fields):
    """What a called tool returned."""

    role: str
    content: Content
    tool_call_id: Words


ChatMessage = Annotated[
    Said | AssistantSaid | ToolSaid,
    by(
        "role",
        system=Said,
        developer=Said,
        user=Said,
        assistant=AssistantSaid,
        tool=ToolSaid,
    ),
]


def messages_of(
    messages: Sequence[Said | AssistantSaid | ToolSaid], dialect: Dialect
) -> list[Message]:
    """Return a conversation as chat templates want it.

    Raises:
        FieldError: on a part that the model's template has no place for, and on a
            result without a call.
    """
    conversation, called = [], dict[str, str]()
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        if isinstance(message, AssistantSaid):
            conversation.append(_answered(place, message, dialect))
            called |= {call.id: call.function.name for call in message.tool_calls}
        elif isinstance(message, ToolSaid):
            known = called, dialect
            place += ".tool_call_id"
            told = returned(place, message.tool_call_id, message.content, *known)
            conversation.append(told)
        else:
            role = "system" if message.role == "developer" else message.role
            conversation.append({"role": role, "content": message.content})
    check_text("messages", conversation)
    return conversation


def _answered(place: str, message: AssistantSaid, dialect: Dialect) -> Message:
    if message.content is None and not message.tool_calls:
        raise FieldError(f"{place}.content", "is missing.")
    if message.tool_calls and not dialect.tools:
        raise FieldError(f"{place}.tool_calls", NO_TOOLS)
    calls = [call.model_dump() for call in message.tool_calls]
    return answered(message.content or "", message.reasoning, calls)


def answered(
    content: str, reasoning: str | None, calls: Sequence[dict[str, Any]]
) -> Message:
    """Return an assistant's message; templates call its thoughts ``reasoning_content``.

    Args:
        content: what it said.
        reasoning: what it thought.
        calls: as ``tool_calls`` of a chat, with arguments as an object.
    """
    message: Message = {"role": "assistant", "content": content}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = list(calls)
    return message


def returned(
    place: str, call_id: str, content: str, called: dict[str, str], dialect: Dialect
) -> Message:
    """Return the message of a tool's result; some templates ask for the tool's name.

    Args:
        place: of the call's id in the request.
        call_id: of the call that it answers.
        content: of the result.
        called: the names of the tools called so far, by the calls' ids.
        dialect: of the model.

    Raises:
        FieldError: if there is no such call, or no place for it in the template.
    """
    if not dialect.tools:
        raise FieldError(place, NO_TOOLS)
    if call_id not in called:
        raise FieldError(place, f"answers {call_id!r}, which is no call before it.")
    named = {"tool_call_id": call_id, "name": called[call_id]}
    return {"role": "tool", "content": content} | named


def check_text(field: str, conversation: Sequence[Message]) -> None:
    """Raise ``FieldError`` if a conversation has no text, or awaits no answer."""
    if not any(message["content"].strip() for message in conversation):
        raise FieldError(field, "must hold some text.")
    if conversation[-1].get("tool_calls"):
        raise FieldError(field, "must go on after calls with what the tools returned.")
