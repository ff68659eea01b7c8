"""How a model's chat template writes thoughts and calls of tools, as mlx-lm knows it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

from ..selection.prompts import Message, render

THINKING, TALKING, CALLING = "reasoning", "normal", "tool"  # mlx-lm's names
SAMPLE = "name_of_a_sample"
# What mlx-lm's parsers expect before, between and after a call's name and arguments,
# where a grammar can enforce both.
FORMS = {
    "json_tools": ('{"name": "', '", "arguments": ', "}"),
    "mistral": ("", "[ARGS]", ""),
}


@dataclass(frozen=True)
class Call:
    """A call of a tool that a model has written.

    Attributes:
        name: of the tool.
        arguments: a JSON object, as text.
    """

    name: str
    arguments: str


@dataclass(frozen=True)
class Dialect:
    """How a model's text is divided: by default all of it is the answer. Its functions
    may be called from any thread.

    Attributes:
        tools: whether the chat template shows tools, and their calls can be read.
        thinks: whether thoughts are told from the answer.
        parser: mlx-lm's tool parser by its module's name, ``json_tools`` for example;
            empty if there is none.
        form: what comes before, between and after a call's name and its arguments, if a
            grammar can enforce that.
        call_marks: what begins and ends a call; the second may be empty.
        think_marks: what begins and ends a thought.
        first: the state that an answer begins in.
    """

    tools: bool = False
    thinks: bool = False
    parser: str = ""
    form: tuple[str, str, str] | None = None
    call_marks: tuple[str, str] = ("", "")
    think_marks: tuple[str, str] = ("", "")
    first: str = TALKING
    _first: Any = field(default=None, repr=False, compare=False)
    _machine: Any = field(default=None, repr=False, compare=False)
    _parse: Any = field(default=None, repr=False, compare=False)

    def opening(
        self, messages: Sequence[Message], config: Mapping[str, Any] | None = None
    ) -> str:
        """Return the state that the answer to a conversation begins in; where its last
        message is the beginning of the answer, that decides.

        Args:
            messages: the conversation.
            config: options of the chat template.
        """
        last = messages[-1]
        if last["role"] != "assistant" or not self.thinks:
            return self._first(config) if config and self._first else self.first
        return THINKING if _is_open(last["content"], self.think_marks) else TALKING

    def begin(self, state: str) -> Any:
        """Return what :meth:`split` takes for the first text."""
        return self._machine and self._machine.make_state(state)

    def split(self, state: Any, text: str) -> tuple[Any, list[tuple[str, str]]]:
        """Take in text; return the new state, and pairs of state name and text for all
        that is certain, without marks.
        """
        if self._machine is None:
            return state, [(TALKING, text)]
        return self._machine.split(state, text)

    def rest(self, state: Any) -> tuple[str, str]:
        """Return the state's name, and the text that waited for the rest of a mark."""
        if self._machine is None:
            return TALKING, ""
        _, text, name = self._machine.flush(state)
        return name, text

    def calls(self, text: str, tools: Sequence[dict[str, Any]]) -> list[Call] | None:
        """Return the calls in a text from between the marks; ``None`` if there is no
        call in it, or not a whole one.

        Args:
            text: as the model wrote it.
            tools: those it was shown; some parsers need their parameters' types.
        """
        try:
            found = self._parse(text, list(tools))
            return [
                _call(one) for one in (found if isinstance(found, list) else [found])
            ]
        except Exception:  # a parser may raise anything on what a model wrote
            return None


def dialect_of(tokenizer: Any) -> Dialect:
    """Return the dialect of a model.

    Args:
        tokenizer: mlx-lm's ``TokenizerWrapper``.
    """
    from mlx_lm.generate import make_text_state_machine

    if not tokenizer.has_chat_template:
        return Dialect()
    thinks = tokenizer.has_thinking
    tools = tokenizer.has_tool_calling and _shows_tools(tokenizer)
    parser = tokenizer.tool_parser.__module__.rpartition(".")[2] if tools else ""
    call_marks = (tokenizer.tool_call_start, tokenizer.tool_call_end)
    think_marks = (tokenizer.think_start, tokenizer.think_end) if thinks else ("", "")
    first = partial(_first, tokenizer, think_marks)
    return Dialect(
        tools=tools,
        thinks=thinks,
        parser=parser,
        form=_form(tokenizer, parser),
        call_marks=call_marks if tools else ("", ""),
        think_marks=think_marks,
        first=first(None),
        _first=first,
        _machine=make_text_state_machine(tokenizer if tools else _without(tokenizer)),
        _parse=tokenizer.tool_parser,
    )


def _without(tokenizer: Any) -> SimpleNamespace:
    """Return what mlx-lm's state machine needs of a tokenizer, without tools."""
    names = ("has_thinking", "think_start", "think_end", "structural_markers")
    marks = {name: getattr(tokenizer, name) for name in names}
    return SimpleNamespace(has_tool_calling=False, response_transitions={}, **marks)


def _call(found: dict[str, Any]) -> Call:
    name, arguments = found["name"], found.get("arguments", {})
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not (isinstance(name, str) and name and isinstance(arguments, dict)):
        raise ValueError(f"{found!r} is no call.")
    return Call(name, json.dumps(arguments, ensure_ascii=False))


def _form(tokenizer: Any, parser: str) -> tuple[str, str, str] | None:
    """Return the form of a call; Mistral's first template had another one."""
    old = parser == "mistral" and "[ARGS]" not in str(tokenizer.chat_template)
    return None if old else FORMS.get(parser)


def _shows_tools(tokenizer: Any) -> bool:
    """Whether the chat template puts the tools into the prompt."""
    schema = {"type": "object", "properties": {"x": {"type": "string"}}}
    sample = {"name": SAMPLE, "description": "A sample.", "parameters": schema}
    tools = [{"type": "function", "function": sample}]
    try:
        shown = render(tokenizer, [{"role": "user", "content": "Hello"}], tools=tools)
    except ValueError:
        return False
    return SAMPLE in shown


def _first(
    tokenizer: Any, think_marks: tuple[str, str], config: Mapping[str, Any] | None
) -> str:
    """Return the state that the template leaves the model in before its answer."""
    if (known := tokenizer.response_initial_state) is not None:
        return str(known)
    try:
        asked = render(tokenizer, [{"role": "user", "content": "Hello"}], config=config)
    except ValueError:  # the template takes another kind of conversation
        return TALKING
    return THINKING if _is_open(asked, think_marks) else TALKING


def _is_open(text: str, marks: tuple[str, str]) -> bool:
    """Whether the last thought in a text has not ended."""
    return bool(marks[0]) and text.rfind(marks[0]) > text.rfind(marks[1])
