"""The tools of a request, and the grammar of answers that must call them or be JSON."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .dialect import THINKING, Dialect
from .errors import InvalidRequest

ANY = r"/(?s:.*)/"
# JSON as templates write it; with free whitespace a model could fill its answer with
# it.
SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class Calling:
    """The tools that an answer may call.

    Attributes:
        tools: in the OpenAI API's form, which the chat template gets.
        must: whether the answer has to call.
        name: the only tool that it may call.
        parallel: whether one answer may have several calls.
        strict: names of the tools whose schema the arguments must follow.
    """

    tools: tuple[dict[str, Any], ...]
    must: bool = False
    name: str | None = None
    parallel: bool = True
    strict: frozenset[str] = frozenset()

    @property
    def functions(self) -> list[dict[str, Any]]:
        """The functions that may be called."""
        functions = [tool["function"] for tool in self.tools]
        return [f for f in functions if self.name in (None, f["name"])]

    @property
    def free(self) -> bool:
        """Whether any text is allowed: no call is required, and no schema applies."""
        return not (self.must or self.strict)


def grammar_of(
    dialect: Dialect,
    state: str,
    schema: dict[str, Any] | None,
    calling: Calling | None,
    spell: Callable[[str], str],
) -> str:
    """Return llguidance's grammar of an answer.

    Args:
        dialect: how the model writes.
        state: the state in which the answer begins.
        schema: a JSON schema for the answer's text.
        calling: the tools.
        spell: returns a mark as a grammar writes it.

    Raises:
        InvalidRequest: if calls must follow a grammar, and their format has none.
    """
    rules = {"start": "answer"}
    if schema is not None:
        rules["answer"] = "json"
        rules["json"] = (
            f"%json {_spaced(schema, item_separator=',', key_separator=':')}"
        )
    if calling is not None:
        rules |= _calls(dialect, calling, spell, with_json=schema is not None)
    if dialect.thinks:
        rules |= _thought(dialect, state, spell)
    lines = (f"{name}: {rule}" for name, rule in rules.items())
    return "\n".join(["%llguidance {}", *lines, ""])


def _calls(
    dialect: Dialect, calling: Calling, spell: Callable[[str], str], with_json: bool
) -> dict[str, str]:
    """Return the rules of answers that may, or must, call."""
    if dialect.form is None:
        raise InvalidRequest(
            f"Calls in this model's format ({dialect.parser}) cannot be held to a schema; "
            "leave tool_choice at auto, strict out, and response_format at text."
        )
    before, between, after = dialect.form
    opening, closing = map(spell, dialect.call_marks)
    rules = {"NL": r"/\n?/", "call": f"NL fun NL {closing}"}
    calls = []
    for number, function in enumerate(calling.functions):
        named = f"{json.dumps(before + function['name'])} {spell(between)}"
        calls.append(f"{named} args_{number} {json.dumps(after)}")
        rules[f"args_{number}"] = f"%json {_spaced(_schema(calling, function))}"
    rules["fun"] = " | ".join(calls)
    more = f" (NL {opening} call)*" if calling.parallel else ""
    rules["calls"] = f"{opening} call{more}"
    if calling.must:
        return rules | {"answer": "calls"}
    if with_json:
        return rules | {"answer": "json | calls"}
    return rules | _free(opening, dialect.call_marks[0], calling.parallel)


def _schema(calling: Calling, function: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of the arguments: an object at least."""
    held = calling.must or function["name"] in calling.strict
    return function["parameters"] if held else {"type": "object"}


def _free(opening: str, mark: str, parallel: bool) -> dict[str, str]:
    """Return the rules of text with calls in it, each of which follows its schema."""
    many = "*" if parallel else "?"
    if opening.startswith("<["):  # a token that is no text
        return {"answer": f"text ({opening} call text){many}", "text": ANY}
    escaped = re.escape(mark).replace("/", r"\/")
    rest = f"{ANY} & ~/(?s:.*){escaped}(?s:.*)/"
    rules = {"answer": f"(begun call){many} rest", "rest": "REST", "REST": rest}
    return rules | {f"begun[suffix={opening}]": ANY}


def _thought(
    dialect: Dialect, state: str, spell: Callable[[str], str]
) -> dict[str, str]:
    """Return the rules that let the model think before its answer."""
    opening, closing = map(spell, dialect.think_marks)
    if closing.startswith("<["):
        thought = {"thought": f"any_text {closing}", "any_text": ANY}
    else:
        thought = {f"thought[suffix={closing}]": ANY}
    start = "thought" if state == THINKING else f"({opening} thought)?"
    return {"start": f"{start} GAP answer", "GAP": r"/\n{0,2}/"} | thought


def _spaced(schema: dict[str, Any], **how: Any) -> str:
    return json.dumps(schema | {"x-guidance": SPACING | how})
