"""The OpenAI chat and completion requests: every field is read, or named and refused."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..decoding.options import BOUNDS, Decoding
from ..engine.errors import InvalidRequest
from ..selection.request import RESELECTS, Keep
from ..selection.scores import SELECTORS
from ..selection.widths import ALLOCATIONS

ROLES = {"system": "system", "developer": "system", "user": "user"}


ROLES |= {"assistant": "assistant"}


JSON_OBJECT: dict[str, Any] = {"type": "object"}

# Fields that may be given as long as they ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "store": (False,),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
}


MOST = 1 << 20  # of what is counted


# A check has the logits of all drafted tokens in memory.
MOST_DRAFT_TOKENS = 256


class FieldError(InvalidRequest):
    """A field of a request is wrong or not supported.

    Attributes:
        field: its name, with a path where it is inside another.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field} {message}")
        self.field = field


@dataclass
class Asked:
    """A request as the engine takes it.

    Attributes:
        model: the ``model`` field.
        prompt: messages, a text, or token ids.
        chat: whether the chat template applies.
        stream: whether the answer is streamed, and ``include_usage`` with its usage.
        options: of ``Engine.astream``.
    """

    model: str
    prompt: Any
    chat: bool
    stream: bool = False
    include_usage: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Defaults:
    """What the server assumes where a request says nothing.

    Attributes:
        keep: kept share.
        decoding: fields of :class:`ifp_mlx.decoding.options.Decoding`.
        chat_template_config: options of the chat template; a request's come on top.
    """

    keep: Keep | None = None
    decoding: Mapping[str, Any] = field(default_factory=dict)
    chat_template_config: Mapping[str, Any] = field(default_factory=dict)


def read_json(body: bytes) -> dict[str, Any]:
    """Return a request's body, strictly JSON: no NaN, no broken text.

    Raises:
        InvalidRequest: if it is anything else than a JSON object.
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


def read_request(body: dict[str, Any], *, chat: bool, defaults: Defaults) -> Asked:
    """Check a request of ``/v1/chat/completions`` or ``/v1/completions``.

    Raises:
        FieldError: naming the field that is wrong or not supported.
    """
    fields = {name: value for name, value in body.items() if value is not None}
    for name, allowed in NEUTRAL.items():
        if name in fields and not _is_one_of(fields.pop(name), allowed):
            raise FieldError(name, "is not supported, except as its default.")
    model = _take(fields, "model", _text, required=True)
    if chat:
        prompt = _take(fields, "messages", _messages, required=True)
    else:
        prompt = _take(fields, "prompt", _prompt, required=True)
    stream = _take(fields, "stream", _flag, False)
    include_usage = _take(fields, "stream_options", _stream_options, False)
    if include_usage and not stream:
        raise FieldError("stream_options", "only goes with stream.")
    options = _sampling(fields, chat, defaults) | _selecting(fields)
    _take(fields, "user", _text)  # a label for the provider's own records
    if fields:
        raise FieldError(min(fields), "is not supported by this server.")
    return Asked(model, prompt, chat, stream, include_usage, options)


Check = Callable[[str, Any], Any]


def _take(
    fields: dict[str, Any],
    name: str,
    check: Check,
    default: Any = None,
    *,
    required: bool = False,
) -> Any:
    if name in fields:
        return check(name, fields.pop(name))
    if required:
        raise FieldError(name, "is missing.")
    return default


def _sampling(fields: dict[str, Any], chat: bool, defaults: Defaults) -> dict[str, Any]:
    take = partial(_take, fields)
    count = _whole(1, 1 << 31)
    legacy = take("max_tokens", count)
    options = _decoding(fields, defaults) | {
        "max_tokens": take("max_completion_tokens", count, legacy) if chat else legacy,
        "seed": take("seed", _whole(-(1 << 63), 1 << 63)),
    }
    if chat:
        config = take("chat_template_kwargs", _object, {})
        if config := {**defaults.chat_template_config, **config}:
            options["chat_template_config"] = config
        options["logprobs"] = take("logprobs", _flag, False)
        options["top_logprobs"] = take("top_logprobs", _whole(0, 20), 0)
        options["json_schema"] = take("response_format", _response_format)
        if options["top_logprobs"] and not options["logprobs"]:
            raise FieldError("top_logprobs", "only goes with logprobs.")
    else:
        most = take("logprobs", _whole(0, 5))
        options |= {"logprobs": most is not None, "top_logprobs": most or 0}
    return options


def _decoding(fields: dict[str, Any], defaults: Defaults) -> dict[str, Any]:
    """Return the options of decoding that a request gives, or the server assumes."""
    known, asked = dict(defaults.decoding), dict[str, Any]()
    for name, (low, high) in BOUNDS.items():
        whole = isinstance(getattr(Decoding, name), int)
        check = _whole(int(low), MOST) if whole else _number(low, high)
        if name == "temp":  # OpenAI's name, and its bound
            asked[name] = _take(fields, "temperature", _number(0, 2))
        else:
            asked[name] = _take(fields, name, check)
    asked["stop_strings"] = _take(fields, "stop", _stops)
    asked["logit_bias"] = _take(fields, "logit_bias", _logit_bias)
    return known | {n: value for n, value in asked.items() if value is not None}


def _selecting(fields: dict[str, Any]) -> dict[str, Any]:
    given = _take(fields, "ifp", _object, {})
    given = {name: value for name, value in given.items() if value is not None}
    checks: dict[str, Check] = {
        "task": _text,
        "instruction": _text,
        "mask_file": _file_name,
        "keep": _keep,
        "selector": _one_of(SELECTORS),
        "allocation": _one_of(ALLOCATIONS),
        "min_agreement": _number(0, 1),
        "check": _check,
        "draft_tokens": _whole(1, MOST_DRAFT_TOKENS),
        "reselect": _one_of(RESELECTS),
    }
    if unknown := given.keys() - checks.keys():
        raise FieldError(f"ifp.{min(unknown)}", "is not supported by this server.")
    options = {name: checks[name](f"ifp.{name}", v) for name, v in given.items()}
    for share in ("keep", "min_agreement"):
        if options.get(share) == 0:
            raise FieldError(f"ifp.{share}", "must be above 0.")
    if options.get("reselect") == "drift" and options.get("check", "off") == "off":
        raise FieldError("ifp.reselect", "drift only goes with ifp.check.")
    sources = [n for n in ("task", "instruction", "mask_file") if n in options]
    if len(sources) > 1:
        raise FieldError(f"ifp.{sources[1]}", f"does not go with ifp.{sources[0]}.")
    return options


def _messages(name: str, value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise FieldError(name, "must be a list with at least one message.")
    messages = [_message(f"{name}[{n}]", message) for n, message in enumerate(value)]
    if not any(message["content"].strip() for message in messages):
        raise FieldError(name, "hold no text.")
    return messages


def _message(name: str, value: Any) -> dict[str, str]:
    message = {k: v for k, v in _object(name, value).items() if v is not None}
    role = _text(f"{name}.role", message.pop("role", None))
    if role not in ROLES:
        raise FieldError(f"{name}.role", f"{role!r} is not one of {', '.join(ROLES)}.")
    content = message.pop("content", None)
    if message:
        raise FieldError(f"{name}.{min(message)}", "is not supported by this server.")
    return {"role": ROLES[role], "content": _content(f"{name}.content", content)}


def _content(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise FieldError(name, "must be a text, or a list of text parts.")
    parts = []
    for number, part in enumerate(value):
        where = f"{name}[{number}]"
        if _object(where, part).get("type") != "text" or part.keys() != {
            "type",
            "text",
        }:
            raise FieldError(where, "is not a text part, and others are not supported.")
        parts.append(_text(f"{where}.text", part["text"]))
    return "".join(parts)


def _prompt(name: str, value: Any) -> Any:
    if isinstance(value, list) and len(value) == 1 and not _is_whole(value[0]):
        return _prompt(name, value[0])
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list) and value and all(map(_is_whole, value)):
        return value
    raise FieldError(name, "must be one text, or the token ids of one.")


def _response_format(name: str, value: Any) -> dict[str, Any] | None:
    form = dict(_object(name, value))
    kind = form.pop("type", None)
    if kind == "json_schema":
        given = _object(f"{name}.json_schema", form.pop("json_schema", None))
        spec = {key: part for key, part in given.items() if part is not None}
        schema: dict[str, Any] | None = _object(
            f"{name}.json_schema.schema", spec.pop("schema", None)
        )
        checks: dict[str, Check] = {
            "name": _string,
            "description": _string,
            "strict": _flag,
        }
        for key, part in spec.items():
            if key not in checks:
                raise FieldError(f"{name}.json_schema.{key}", "is not supported.")
            checks[key](f"{name}.json_schema.{key}", part)
    elif kind in ("text", "json_object"):
        schema = None if kind == "text" else dict(JSON_OBJECT)
    else:
        raise FieldError(
            f"{name}.type", f"{kind!r} is not one of text, json_object, json_schema."
        )
    if form:
        raise FieldError(f"{name}.{min(form)}", "is not supported by this server.")
    return schema


def _stream_options(name: str, value: Any) -> bool:
    options = dict(_object(name, value))
    usage = _flag(f"{name}.include_usage", options.pop("include_usage", False))
    if options.pop("include_obfuscation", False) or options:
        raise FieldError(f"{name}", "only knows include_usage.")
    return usage


def _stops(name: str, value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not 0 <= len(stops) <= 16:
        raise FieldError(name, "must be a text or a list of at most 16.")
    if not all(isinstance(stop, str) and stop for stop in stops):
        raise FieldError(name, "must hold texts that are not empty.")
    return tuple(stops)


def _logit_bias(name: str, value: Any) -> dict[int, float] | None:
    number = _number(-100, 100)
    bias = {}
    for token, amount in _object(name, value).items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise FieldError(name, f"has the key {token!r}, which is no token id.")
        bias[int(token)] = number(f"{name}.{token}", amount)
    return bias or None


def _keep(name: str, value: Any) -> Keep:
    if isinstance(value, str) and value != "auto":
        raise FieldError(name, "must be auto, or a number from 0 to 1.")
    return "auto" if value == "auto" else _number(0, 1)(name, value)


def _check(name: str, value: Any) -> str | float:
    if isinstance(value, str) and value in ("off", "exact"):
        return value
    if isinstance(value, float) and 0 < value < 1:
        return value
    raise FieldError(name, "must be exact, off, or a number above 0 and below 1.")


def _file_name(name: str, value: Any) -> str:
    text = _text(name, value)
    if "/" in text or "\\" in text or text.startswith(".") or "\0" in text:
        raise FieldError(name, "must be the name of a file in the server's library.")
    return text


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise FieldError(name, "must be a text that is not empty.")
    return value


def _string(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise FieldError(name, "must be a text.")
    return value


def _object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FieldError(name, "must be a JSON object.")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise FieldError(name, "must be true or false.")
    return value


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _whole(low: int, high: int) -> Check:
    def check(name: str, value: Any) -> int:
        if not _is_whole(value) or not low <= value <= high:
            raise FieldError(name, f"must be a whole number from {low} to {high}.")
        return value

    return check


def _number(low: float, high: float) -> Check:
    def check(name: str, value: Any) -> float:
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        if not numeric or not low <= value <= high:  # so NaN is none
            raise FieldError(name, f"must be a number from {low} to {high}.")
        return float(value)

    return check


def _one_of(choices: tuple[str, ...]) -> Check:
    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise FieldError(name, f"must be one of {', '.join(choices)}.")
        return value

    return check


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    return any(value == item and type(value) is type(item) for item in allowed)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")
