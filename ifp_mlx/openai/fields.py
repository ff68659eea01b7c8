"""Fields of requests: pydantic reads them strictly, mistakes become one sentence."""

import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    PlainValidator,
    ValidationError,
    WrapValidator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from ..engine.errors import InvalidRequest

# Our words instead of pydantic's; its other messages begin with "Input should".
SENTENCES = {
    "missing": "is missing",
    "extra_forbidden": "is not supported by this server",
    "model_type": "must be a JSON object",
    "dict_type": "must be a JSON object",
    "string_type": "must be a text",
    "list_type": "must be a list",
    "bool_type": "must be true or false",
    "too_short": "must hold at least {min_length}",
    "too_long": "must hold at most {max_length}",
}
SHOWN = 40  # characters of a wrong value


class FieldError(InvalidRequest):
    """A field of a request is wrong or not supported.

    Attributes:
        field: its name, with a path where it is inside another.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field} {message}")
        self.field = field


class Fields(BaseModel):
    """An object of a request: types are strict, unknown fields are refused, and null
    counts as absent.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_nothing(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None}


Read = TypeVar("Read", bound=Fields)


def read(kind: type[Read], body: Any) -> Read:
    """Return an object of a request.

    Raises:
        FieldError: naming the first field that is wrong or not supported.
    """
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    raise FieldError(path_of(first["loc"]), _sentence(first))


def path_of(place: Sequence[int | str]) -> str:
    """Return a place in a request as people write it: ``messages[0].content``."""
    # "[key]" is pydantic's mark of a dict's key.
    named = (part for part in place if part != "[key]")
    parts = (f"[{p}]" if isinstance(p, int) else f".{p}" for p in named)
    return "".join(parts).removeprefix(".")


def wrong(place: Sequence[int | str], message: str) -> ValidationError:
    """Return the error of a field inside a validator's value."""
    error = PydanticCustomError("wrong", "{words}", {"words": message})
    details = InitErrorDetails(type=error, loc=tuple(place), input=None)
    return ValidationError.from_exception_data("request", [details])


def _sentence(error: Any) -> str:
    if (words := SENTENCES.get(error["type"])) is not None:
        words = words.format(**error.get("ctx", {}))
    else:
        words = re.sub(r"^\w+ should ", "must ", error["msg"])
    return f"{words}{_shown(error)}."


def _shown(error: Any) -> str:
    """Return the wrong value where it says something and is short."""
    value = error["input"]
    if error["type"] in ("missing", "extra_forbidden", "too_short", "too_long"):
        return ""
    if not isinstance(value, str | int | float) or len(str(value)) > SHOWN:
        return ""
    return f", not {value!r}"


def must(sentence: str) -> WrapValidator:
    """Return a validator that says in our words what a field must be."""

    def check(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("must", "{words}", {"words": sentence}) from None

    return WrapValidator(check)


def within(low: float, high: float) -> WrapValidator:
    """Return a validator of numbers from ``low`` to ``high``: of whole numbers if
    ``low`` is one.
    """
    kind = "a whole number" if isinstance(low, int) else "a number"
    words = {"words": f"must be {kind} from {low:.20g} to {high:.20g}"}

    def check(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            if low <= (number := handler(value)) <= high:
                return number
        except ValidationError:
            pass
        raise PydanticCustomError("must", "{words}", words)

    return WrapValidator(check)


def among(choices: Sequence[str]) -> WrapValidator:
    """Return a validator that allows some texts only."""

    def check(value: Any, handler: Callable[[Any], Any]) -> Any:
        if isinstance(value, str) and value in choices:
            return value
        words = {"choices": ", ".join(choices)}
        raise PydanticCustomError("must", "must be one of {choices}", words)

    return WrapValidator(check)


def by(field: str, **kinds: type[Fields]) -> PlainValidator:
    """Return a validator that reads an object as the kind that one of its fields
    names.
    """

    def check(value: Any) -> Fields:
        if not isinstance(value, dict):
            raise wrong((), "must be a JSON object")
        kind = value.get(field)
        if not isinstance(kind, str) or kind not in kinds:
            allowed = f"must be one of {', '.join(kinds)}, not {kind!r:.{SHOWN}}"
            raise wrong((field,), "is missing" if kind is None else allowed)
        return kinds[kind].model_validate(value)

    return PlainValidator(check)


def _words(value: Any, handler: Callable[[Any], Any]) -> str:
    if isinstance(value, str) and value.strip():
        return value
    raise PydanticCustomError("must", "must be a text that is not empty")


Words = Annotated[str, WrapValidator(_words)]
