"""The OpenAI chat and completion requests: every field is read, or named and refused."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    create_model,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ..decoding.options import BOUNDS, Decoding
from ..engine import Dialect, InvalidRequest
from ..selection.request import RESELECTS, Keep
from ..selection.scores import SELECTORS
from ..selection.widths import ALLOCATIONS
from .asked import Asked, Defaults
from .fields import Fields, Words, among, must, read, within, wrong
from .messages import ChatMessage, messages_of
from .tools import ChatTool, ToolChoice, calling_of, check_schema

# A check has the logits of all drafted tokens in memory.
MOST_DRAFT_TOKENS = 256
MOST = 1 << 20  # of anything that is counted
MOST_CHOICES = 16  # as many as decode together

Count = Annotated[int, within(1, 1 << 31)]
Share = Annotated[float, within(0.0, 1.0)]
Best = Annotated[int, within(0, 20)]
# Fields that may be given as long as they ask for nothing.
Nothing = Annotated[list[Any], Field(max_length=0), must("is not supported")]
Never = Annotated[Literal[False], must("is not supported, except as false")]


def _above_0(share: float) -> float:
    if share == 0:
        raise PydanticCustomError("must", "must be above 0")
    return share


def _keep(value: Any) -> Keep:
    if value == "auto" or (_is_number(value) and 0 < value <= 1):
        return value if value == "auto" else float(value)
    message = "must be auto, or a number from 0 to 1, but not 0"
    raise PydanticCustomError("must", "{words}", {"words": message})


def _check(value: Any) -> str | float:
    if value in ("off", "exact") or (isinstance(value, float) and 0 < value < 1):
        return value
    message = "must be exact, off, or a number above 0 and below 1"
    raise PydanticCustomError("must", "{words}", {"words": message})


def _file_name(name: str) -> str:
    if "/" in name or "\\" in name or name.startswith(".") or "\0" in name:
        message = "must be the name of a file in the server's library"
        raise PydanticCustomError("must", "{words}", {"words": message})
    return name


def _stops(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _prompt(value: Any) -> Any:
    if isinstance(value, list) and len(value) == 1 and not _is_whole(value[0]):
        return _prompt(value[0])
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list) and value and all(map(_is_whole, value)):
        return value
    message = "must be one text, or the token ids of one"
    raise PydanticCustomError("must", "{words}", {"words": message})


def _token_id(key: str) -> str:
    if key.isascii() and key.isdigit() and len(key) < 10:
        return key
    raise PydanticCustomError("must", "must be a token id")


class IFP(Fields):
    """Our own field: what selects, how much is kept, and whether answers are checked."""

    task: Words | None = None
    instruction: Words | None = None
    mask_file: Annotated[Words, AfterValidator(_file_name)] | None = None
    keep: Annotated[Any, BeforeValidator(_keep)] = None
    selector: Annotated[str, among(SELECTORS)] | None = None
    allocation: Annotated[str, among(ALLOCATIONS)] | None = None
    min_agreement: Annotated[Share, AfterValidator(_above_0)] | None = None
    check: Annotated[Any, BeforeValidator(_check)] = None
    draft_tokens: Annotated[int, within(1, MOST_DRAFT_TOKENS)] | None = None
    reselect: Annotated[str, among(RESELECTS)] | None = None

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if self.reselect == "drift" and self.check in (None, "off"):
            raise wrong(["reselect"], "drift only goes with ifp.check")
        names = ("task", "instruction", "mask_file")
        sources = [name for name in names if getattr(self, name) is not None]
        if len(sources) > 1:
            raise wrong([sources[1]], f"does not go with ifp.{sources[0]}")
        return self

    def options(self) -> dict[str, Any]:
        """Return the engine's options."""
        return self.model_dump(exclude_none=True)


class JSONSchema(Fields):
    """What an answer has to follow."""

    json_schema: dict[str, Any] = Field(alias="schema")
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Fields):
    """``response_format`` of a chat."""

    type: Annotated[str, among(("text", "json_object", "json_schema"))]
    json_schema: JSONSchema | None = None

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if (self.json_schema is None) == (self.type == "json_schema"):
            missing = self.json_schema is None
            words = "is missing" if missing else "only goes with the type json_schema"
            raise wrong(["json_schema"], words)
        return self

    @property
    def schema_of(self) -> dict[str, Any] | None:
        """The JSON schema that the answer follows, if any."""
        if self.json_schema is not None:
            return self.json_schema.json_schema
        return {"type": "object"} if self.type == "json_object" else None


class StreamOptions(Fields):
    """``stream_options``."""

    include_usage: bool = False
    include_obfuscation: Never = False


class Asking(Fields):
    """What requests of all kinds may have."""

    model: Words
    stream: bool = False
    temperature: Annotated[float, within(0.0, 2.0)] | None = None
    top_p: Share | None = None
    # Labels for a provider's own records.
    user: Words | None = None
    safety_identifier: Words | None = None
    prompt_cache_key: Words | None = None
    store: Never = False
    ifp: IFP = IFP()

    def options(self, defaults: Defaults) -> dict[str, Any]:
        """Return the engine's options, of decoding and of selecting."""
        return {**defaults.decoding, **self.decoding(), **self.ifp.options()}

    def decoding(self) -> dict[str, Any]:
        """Return what the request says of decoding."""
        said = {"temp": self.temperature, "top_p": self.top_p}
        return {name: value for name, value in said.items() if value is not None}


def _bounded(name: str) -> Any:
    """Return the field of an option of decoding, with its bounds."""
    low, high = BOUNDS[name]
    if isinstance(getattr(Decoding, name), int):
        return Annotated[int, within(int(low), MOST)] | None, None
    return Annotated[float, within(float(low), float(high))] | None, None


# Every option of decoding that the package knows, except those with OpenAI's bounds.
Decoded: Any = create_model(
    "Decoded",
    __base__=Asking,
    __module__=__name__,
    **{name: _bounded(name) for name in BOUNDS if name not in ("temp", "top_p")},
)


class Generating(Decoded):
    """What chats and completions have in common."""

    stream_options: StreamOptions = StreamOptions()
    max_tokens: Count | None = None
    seed: Annotated[int, within(-(1 << 63), 1 << 63)] | None = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1), must("must be a text, not empty")]],
        Field(max_length=16),
        BeforeValidator(_stops),
    ] = []
    logit_bias: (
        dict[
            Annotated[str, AfterValidator(_token_id)],
            Annotated[float, within(-100.0, 100.0)],
        ]
        | None
    ) = None
    n: Annotated[int, within(1, MOST_CHOICES)] = 1

    @model_validator(mode="after")
    def _usage_is_streamed(self) -> Self:
        if self.stream_options.include_usage and not self.stream:
            raise wrong(["stream_options"], "only goes with stream")
        return self

    def decoding(self) -> dict[str, Any]:
        """Return what the request says of decoding."""
        said = {name: getattr(self, name) for name in BOUNDS if name != "temp"}
        if self.stop:
            said["stop_strings"] = tuple(self.stop)
        if self.logit_bias:
            said["logit_bias"] = {int(t): bias for t, bias in self.logit_bias.items()}
        given = {name: value for name, value in said.items() if value is not None}
        limits = {"max_tokens": self.max_tokens, "seed": self.seed}
        return super().decoding() | given | limits

    def asked(self, prompt: Any, options: dict[str, Any], chat: bool) -> Asked:
        """Return the request as the engine takes it."""
        return Asked(
            model=self.model,
            prompt=prompt,
            chat=chat,
            choices=self.n,
            stream=self.stream,
            include_usage=self.stream_options.include_usage,
            options=options,
        )


class Chat(Generating):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Best = 0
    response_format: ResponseFormat = ResponseFormat(type="text")
    tools: list[ChatTool] = []
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] = {}
    functions: Nothing = []
    function_call: Annotated[Literal["none"], must("is not supported")] = "none"
    modalities: Annotated[list[Literal["text"]], must("must be [text]")] = []

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise wrong(["top_logprobs"], "only goes with logprobs")
        return self

    def read(self, defaults: Defaults, dialect: Dialect) -> Asked:
        """Return the request as the engine takes it."""
        options = self.options(defaults) | {
            "max_tokens": self.max_completion_tokens or self.max_tokens,
            "logprobs": self.logprobs,
            "top_logprobs": self.top_logprobs,
            "json_schema": self.response_format.schema_of,
        }
        options |= config_of(defaults, self.chat_template_kwargs)
        how = self.tools, self.tool_choice, self.parallel_tool_calls
        calling = calling_of(*how, dialect)
        check_schema("response_format", options["json_schema"], calling, dialect)
        asked = self.asked(messages_of(self.messages, dialect), options, chat=True)
        return replace(asked, calling=calling)


class Completion(Generating):
    """``POST /v1/completions``."""

    prompt: Annotated[Any, BeforeValidator(_prompt)]
    logprobs: Annotated[int, within(0, 5)] | None = None
    best_of: Annotated[Literal[1], must("is not supported, except as 1")] = 1
    echo: Never = False
    suffix: Annotated[Literal[""], must("is not supported")] = ""

    def read(self, defaults: Defaults) -> Asked:
        """Return the request as the engine takes it."""
        options = self.options(defaults) | {
            "logprobs": self.logprobs is not None,
            "top_logprobs": self.logprobs or 0,
        }
        return self.asked(self.prompt, options, chat=False)


def config_of(defaults: Defaults, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the engine's option for the chat template's options, if there are any."""
    config = {**defaults.chat_template_config, **given}
    return {"chat_template_config": config} if config else {}


def read_json(body: bytes) -> dict[str, Any]:
    """Return a request's body, strictly JSON: no NaN, no broken text.

    Raises:
        InvalidRequest: if it is anything but a JSON object.
    """
    try:
        content = json.loads(body, parse_constant=_no_constant)
        json.dumps(content, ensure_ascii=False).encode()  # no half surrogates
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidRequest(f"The body is not JSON: {reason}.") from error
    if not isinstance(content, dict):
        raise InvalidRequest("The body must be a JSON object.")
    return content


def read_chat(body: dict[str, Any], defaults: Defaults, dialect: Dialect) -> Asked:
    """Check a request of ``/v1/chat/completions``.

    Raises:
        FieldError: naming the field that is wrong or not supported.
    """
    return read(Chat, body).read(defaults, dialect)


def read_completion(
    body: dict[str, Any], defaults: Defaults, dialect: Dialect
) -> Asked:
    """Check a request of ``/v1/completions``; as :func:`read_chat`."""
    return read(Completion, body).read(defaults)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or isinstance(value, float)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")
