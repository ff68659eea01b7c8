"""The tools of a request, and which of them the model may, must or must not call."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import PlainValidator, StringConstraints
from pydantic_core import PydanticCustomError

from ..engine import Calling, Dialect
from .fields import FieldError, Fields, Words, by, must

Name = Annotated[
    str,
    StringConstraints(pattern=r"^[\w.-]{1,64}$"),
    must("must be 1 to 64 letters, digits, or any of _ - ."),
]
CHOICES = ("none", "auto", "required")


class Function(Fields):
    """What can be called."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = False

    def shown(self) -> dict[str, Any]:
        """Return the tool as chat templates expect it."""
        nothing = {"type": "object", "properties": {}}
        function = {"name": self.name, "description": self.description or ""}
        function |= {"parameters": self.parameters or nothing}  # type: ignore[dict-item]
        return {"type": "function", "function": function}


class FunctionTool(Fields):
    """A tool as chats have it."""

    type: Literal["function"]
    function: Function


class FlatTool(Function):
    """A tool as responses have it."""

    type: Literal["function"]

    @property
    def function(self) -> Function:
        """What can be called."""
        return self


class Named(Fields):
    """The choice of one tool, as responses have it."""

    type: Literal["function"]
    name: Words


class NamedFunction(Fields):
    """What :class:`NamedTool` names."""

    name: Words


class NamedTool(Fields):
    """The choice of one tool, as chats have it."""

    type: Literal["function"]
    function: NamedFunction

    @property
    def name(self) -> str:
        """Its name."""
        return self.function.name


def _choice(kind: type[Fields]) -> PlainValidator:
    named = by("type", function=kind).func

    def check(value: Any) -> Any:
        if isinstance(value, str) and value in CHOICES:
            return value
        if isinstance(value, dict):
            return named(value)  # type: ignore[call-arg]
        message = f"must be one of {', '.join(CHOICES)}, or name a function"
        raise PydanticCustomError("must", "{words}", {"words": message})

    return PlainValidator(check)


ChatTool = Annotated[FunctionTool, by("type", function=FunctionTool)]
Tool = Annotated[FlatTool, by("type", function=FlatTool)]
ToolChoice = Annotated[str | NamedTool, _choice(NamedTool)]
FlatToolChoice = Annotated[str | Named, _choice(Named)]


def calling_of(
    tools: Sequence[FunctionTool | FlatTool],
    choice: str | NamedTool | Named,
    parallel: bool,
    dialect: Dialect,
) -> Calling | None:
    """Return the tools that an answer may call; ``None`` if none.

    Raises:
        FieldError: if the choice and the tools do not fit, or the model cannot do that.
    """
    if choice == "none":
        return None  # the model does not see tools that it may not call
    name = None if isinstance(choice, str) else choice.name
    must = choice == "required" or name is not None
    functions = [tool.function for tool in tools]
    _check_names(tools, choice, must)
    if not tools:
        return None
    calling = Calling(
        tools=tuple(function.shown() for function in functions),
        must=must,
        name=name,
        parallel=parallel,
        strict=frozenset(f.name for f in functions if f.strict),
    )
    _check_dialect(tools, calling, dialect)
    return calling


def check_schema(
    field: str, schema: dict[str, Any] | None, calling: Calling | None, dialect: Dialect
) -> None:
    """Raise ``FieldError`` if an answer cannot be either JSON by a schema or a call."""
    if schema is not None and calling is not None and dialect.form is None:
        raise FieldError(field, f"must be text beside tools: {_why(dialect)}.")


def _check_names(
    tools: Sequence[FunctionTool | FlatTool],
    choice: str | NamedTool | Named,
    must: bool,
) -> None:
    if must and not tools:
        raise FieldError("tool_choice", "asks for a call, and there are no tools.")
    names = [tool.function.name for tool in tools]
    for number, name in enumerate(names):
        if name in names[:number]:
            field = f"{_path(tools, number)}.name"
            raise FieldError(field, f"{name!r} is there already; give it another one.")
    if not isinstance(choice, str) and choice.name not in names:
        inside = ".function" if isinstance(choice, NamedTool) else ""
        known = f"is none of the tools: {', '.join(names)}."
        raise FieldError(f"tool_choice{inside}.name", f"{choice.name!r} {known}")


def _check_dialect(
    tools: Sequence[FunctionTool | FlatTool], calling: Calling, dialect: Dialect
) -> None:
    if not dialect.tools:
        raise FieldError(
            "tools",
            "are not in this model's chat template; leave them out, or serve a model "
            "whose template shows tools.",
        )
    if dialect.form is not None:
        return
    if calling.must:
        why = _why(dialect)
        raise FieldError("tool_choice", f"must be auto or none here: {why}.")
    for number, tool in enumerate(tools):
        if tool.function.strict:
            field = f"{_path(tools, number)}.strict"
            raise FieldError(field, f"must be false here: {_why(dialect)}.")


def _why(dialect: Dialect) -> str:
    return f"calls in this model's format ({dialect.parser}) cannot be held to a schema"


def _path(tools: Sequence[FunctionTool | FlatTool], number: int) -> str:
    inside = ".function" if isinstance(tools[number], FunctionTool) else ""
    return f"tools[{number}]{inside}"
