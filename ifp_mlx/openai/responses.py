"""Requests of ``/v1/responses``: read without any state, or refused by name."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from ..engine import Dialect
from ..selection.prompts import Message
from .asked import Asked, Defaults
from .fields import FieldError, Fields, Words, among, by, must, read, wrong
from .messages import (
    NO_TOOLS,
    Arguments,
    TextPart,
    answered,
    check_text,
    returned,
    text_of,
)
from .protocol import Asking, Count, Never, Nothing, config_of
from .tools import FlatToolChoice, Tool, calling_of, check_schema

# What an answer repeats of the request, with the defaults.
ECHOED: dict[str, Any] = {
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "temperature": None,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_p": 1.0,
    "user": None,
}
STATELESS = "is not supported: nothing is stored; send the whole conversation as input"


class WrittenPart(Fields):
    """A part of an earlier answer."""

    type: str
    text: str
    annotations: Nothing = []
    logprobs: Nothing = []


class Item(Fields):
    """Fields that all items may have; unused here, as nothing is stored."""

    type: str
    id: str | None = None
    status: str | None = None


class MessageItem(Item):
    """A message, by anyone."""

    type: Literal["message"] = "message"
    role: Annotated[str, among(("system", "developer", "user", "assistant"))]
    content: Annotated[
        str, text_of(text=TextPart, input_text=TextPart, output_text=WrittenPart)
    ]
    phase: None = None


class CallItem(Item):
    """A call of an earlier answer."""

    call_id: Words
    name: Words
    arguments: Arguments


class ResultItem(Item):
    """What a called tool returned."""

    call_id: Words
    output: Annotated[str, text_of(input_text=TextPart)]


class ThoughtItem(Item):
    """What an earlier answer thought."""

    content: Annotated[str, text_of(reasoning_text=TextPart)] = ""
    summary: Nothing = []
    encrypted_content: Annotated[None, must("is not supported")] = None


_item = by(
    "type",
    message=MessageItem,
    function_call=CallItem,
    function_call_output=ResultItem,
    reasoning=ThoughtItem,
)


def _with_type(value: Any) -> Any:
    """Give an item with a role and no type its type."""
    if isinstance(value, dict) and value.get("type") is None and "role" in value:
        return value | {"type": "message"}
    return value


def _items(value: Any) -> Any:
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}]
    if isinstance(value, list) and value:
        return [_with_type(item) for item in value]
    words = "must be a text, or a list of at least one item"
    raise PydanticCustomError("must", "{words}", {"words": words})


class Format(Fields):
    """``text.format``."""

    type: Annotated[str, among(("text", "json_object", "json_schema"))] = "text"
    json_schema: dict[str, Any] | None = Field(alias="schema", default=None)
    name: str | None = None
    description: str | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if (self.json_schema is None) == (self.type == "json_schema"):
            missing = self.json_schema is None
            words = "is missing" if missing else "only goes with the type json_schema"
            raise wrong(["schema"], words)
        return self

    @property
    def schema_of(self) -> dict[str, Any] | None:
        """The JSON schema that the answer follows, if any."""
        return {"type": "object"} if self.type == "json_object" else self.json_schema


class TextOptions(Fields):
    """``text``."""

    format: Format = Format()


class StreamOptions(Fields):
    """``stream_options``."""

    include_obfuscation: Never = False


class Response(Asking):
    """``POST /v1/responses``."""

    input: Annotated[list[Annotated[Item, _item]], BeforeValidator(_items)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    tools: list[Tool] = []
    tool_choice: FlatToolChoice = "auto"
    parallel_tool_calls: bool = True
    text: TextOptions = TextOptions()
    stream_options: StreamOptions = StreamOptions()
    metadata: Annotated[
        dict[str, Annotated[str, StringConstraints(max_length=512)]],
        Field(max_length=16),
        must("must be up to 16 texts by name, of up to 512 characters each"),
    ] = {}
    previous_response_id: Annotated[None, must(STATELESS)] = None
    conversation: Annotated[None, must(STATELESS)] = None
    include: Nothing = []
    background: Never = False
    truncation: Annotated[
        Literal["disabled"], must("is not supported, except as disabled")
    ] = "disabled"

    def read(self, defaults: Defaults, dialect: Dialect) -> Asked:
        """Return the request as the engine takes it."""
        schema = self.text.format.schema_of
        how = self.tools, self.tool_choice, self.parallel_tool_calls
        calling = calling_of(*how, dialect)
        check_schema("text.format", schema, calling, dialect)
        messages = conversation_of(self.input, dialect)
        if self.instructions is not None:
            messages.insert(0, {"role": "system", "content": self.instructions})
        check_text("input", messages)
        options = self.options(defaults) | config_of(defaults, {})
        options |= {"max_tokens": self.max_output_tokens, "json_schema": schema}
        return Asked(
            model=self.model,
            prompt=messages,
            chat=True,
            calling=calling,
            stream=self.stream,
            options=options,
        )


def conversation_of(items: Sequence[Item], dialect: Dialect) -> list[Message]:
    """Return items as the messages that chat templates want: an answer's thoughts, text
    and calls are one message.

    Raises:
        FieldError: on a part that the model's template has no place for, and on a
            result without a call.
    """
    conversation, called, thought = [], dict[str, str](), None
    for number, item in enumerate(items):
        if isinstance(item, ThoughtItem):
            thought = item.content
        elif isinstance(item, ResultItem):
            place = f"input[{number}].call_id"
            known = called, dialect
            conversation.append(returned(place, item.call_id, item.output, *known))
        elif isinstance(item, CallItem):
            if not dialect.tools:
                raise FieldError(f"input[{number}]", NO_TOOLS)
            called[item.call_id] = item.name
            _add_call(conversation, item, thought)
            thought = None
        else:
            assert isinstance(item, MessageItem)
            conversation.append(_message(item, thought))
            thought = None
    return conversation


def _message(item: MessageItem, thought: str | None) -> Message:
    if item.role == "assistant":
        return answered(item.content, thought, [])
    role = "system" if item.role == "developer" else item.role
    return {"role": role, "content": item.content}


def _add_call(conversation: list[Message], item: CallItem, thought: str | None) -> None:
    """Add a call to the answer before it, or begin one."""
    function = {"name": item.name, "arguments": item.arguments}
    call = {"id": item.call_id, "type": "function", "function": function}
    if conversation and conversation[-1]["role"] == "assistant" and thought is None:
        conversation[-1].setdefault("tool_calls", []).append(call)
    else:
        conversation.append(answered("", thought, [call]))


def read_response(body: dict[str, Any], defaults: Defaults, dialect: Dialect) -> Asked:
    """Check a request of ``/v1/responses``.

    Raises:
        FieldError: naming the field that is wrong or not supported.
    """
    asked = read(Response, body).read(defaults, dialect)
    said = {name: body.get(name) for name in ECHOED}
    given = {name: value for name, value in said.items() if value is not None}
    return replace(asked, echo=ECHOED | given)
