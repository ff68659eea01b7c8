"""How models write thoughts and calls: by their templates, as mlx-lm knows them."""

import json

import pytest
from conftest import CHAT_TEMPLATE, TOOLS_TEMPLATE, write_folder, write_tokenizer

from ifp_mlx.engine import Call, Calling, Engine, InvalidRequest
from ifp_mlx.engine.dialect import CALLING, TALKING, THINKING, Dialect, dialect_of
from ifp_mlx.selection.tokenizer import open_tokenizer

TOOL = {"type": "function"}
TOOL |= {"function": {"name": "add", "description": "", "parameters": {}}}
# What makes mlx-lm choose a parser, and one call in its format.
SHOWN = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
CALLS = {
    "json_tools": (
        "{# <tool_call> tool_call.name #}",
        '<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call>',
    ),
    "qwen3_coder": (
        "{# <tool_call>\n<function= #}",
        "<tool_call>\n<function=add>\n<parameter=a>\n2\n</parameter>\n</function>\n"
        "</tool_call>",
    ),
    "glm47": (
        "{# <arg_key> #}",
        "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>2</arg_value></tool_call>",
    ),
    "pythonic": (
        "{# <|tool_list_start|> #}",
        "<|tool_call_start|>[add(a=2)]<|tool_call_end|>",
    ),
    "gemma4": (
        "{# <|tool_call> <tool_call|> #}",
        "<|tool_call>call:add{a:2}<tool_call|>",
    ),
    "function_gemma": (
        "{# <start_function_call> #}",
        "<start_function_call>call:add{a:2}<end_function_call>",
    ),
    "kimi_k2": (
        "{# <|tool_calls_section_begin|> #}",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.add:0"
        '<|tool_call_argument_begin|>{"a": 2}<|tool_call_end|><|tool_calls_section_end|>',
    ),
    "mistral": ("{# [TOOL_CALLS] [ARGS] #}", '[TOOL_CALLS]add[ARGS]{"a": 2}'),
}
WITH_TYPES = {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}}}


def dialect(folder, template, *marks):
    folder.mkdir()
    write_tokenizer(folder, template, *marks)
    return dialect_of(open_tokenizer(folder, {}))


def split(dialect, text, size=3):
    """Return what the pieces of a text are parts of, put together."""
    state, told = dialect.begin(dialect.first), []
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    for piece in pieces:
        state, found = dialect.split(state, piece)
        told += found
    joined = [["", ""]]
    for name, part in [*told, dialect.rest(state)]:
        if name != joined[-1][0]:
            joined.append([name, ""])
        joined[-1][1] += part
    return [tuple(one) for one in joined if one[1]]


@pytest.mark.parametrize("parser", CALLS)
def test_calls_of_every_format_are_read(tmp_path, parser):
    mark, call = CALLS[parser]
    known = dialect(tmp_path / "m", mark + SHOWN + CHAT_TEMPLATE)
    assert (known.tools, known.parser) == (True, parser)
    said, called = split(known, f"Well. {call}")[:2]
    assert said == (TALKING, "Well. ") and called[0] == CALLING
    tools = [{"type": "function", "function": WITH_TYPES}]
    assert known.calls(called[1], tools) == [Call("add", '{"a": 2}')]


def test_a_template_that_does_not_show_tools_has_none(tmp_path):
    mark, call = CALLS["json_tools"]
    for number, template in enumerate([CHAT_TEMPLATE, mark + CHAT_TEMPLATE, None]):
        known = dialect(tmp_path / str(number), template)
        assert not known.tools
        assert split(known, call) == [(TALKING, call)]


def test_thoughts_are_told_by_their_marks_or_by_how_the_template_ends(tmp_path):
    marks = "<think>", "</think>"
    closed = dialect(tmp_path / "closed", CHAT_TEMPLATE, *marks)
    said = split(closed, "<think>Hm</think>So < it")
    assert said == [(THINKING, "Hm"), (TALKING, "So < it")]
    ending = CHAT_TEMPLATE.replace("assistant\n{% endif", "assistant\n<think>{% endif")
    opened = dialect(tmp_path / "opened", ending, *marks)
    assert split(opened, "Hm</think>So") == [(THINKING, "Hm"), (TALKING, "So")]
    user = [{"role": "user", "content": "Say <think>"}]
    assert closed.opening(user) == TALKING and opened.opening(user) == THINKING
    begun = [*user, {"role": "assistant", "content": "<think>Hm"}]
    assert closed.opening(begun) == THINKING
    begun[-1]["content"] += "</think>So"
    assert opened.opening(begun) == TALKING
    assert Dialect().opening(begun) == TALKING


@pytest.mark.parametrize("answer", ["[]", "5", '"x"', '{"name": 3}', '{"name": ""}'])
def test_what_the_parser_takes_for_a_call_must_be_one(tmp_path, answer):
    known = dialect(tmp_path / "m", TOOLS_TEMPLATE)
    assert known.calls(answer, [TOOL]) in (None, [])
    named = {"name": "add", "arguments": "[1]"}
    assert known.calls(json.dumps(named), [TOOL]) is None
    assert known.calls('{"name": "add"', [TOOL]) is None


def test_the_engine_refuses_tools_that_no_template_shows(tmp_path):
    with Engine.open(write_folder(tmp_path / "m")) as engine:
        assert not engine.dialect.tools
        with pytest.raises(InvalidRequest, match="shows tools"):
            engine.generate("Hello", calling=Calling((TOOL,)))


def test_a_format_without_a_grammar_is_refused_by_the_engine_too(tmp_path):
    pytest.importorskip("llguidance")
    folder = write_folder(tmp_path / "m")
    write_tokenizer(folder, CALLS["pythonic"][0] + SHOWN + CHAT_TEMPLATE)
    with Engine.open(folder) as engine:
        with pytest.raises(InvalidRequest, match="pythonic"):
            engine.generate("Hello", calling=Calling((TOOL,), must=True))


def test_calls_with_a_mark_that_is_no_text_are_held_too(tmp_path):
    pytest.importorskip("llguidance")
    folder = write_folder(tmp_path / "m", vocab_size=261)
    template = CALLS["mistral"][0] + SHOWN + CHAT_TEMPLATE
    write_tokenizer(folder, template, "<s>", "</s>")
    how = {"max_tokens": 60, "temp": 1.5, "keep": 0.5}
    schema = {"type": "object", "properties": {"a": {"enum": [2]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    tool = {"type": "function", "function": {"name": "add", "parameters": schema}}
    with Engine.open(folder) as engine:
        must = Calling((tool,), must=True, parallel=False)
        text = engine.generate("Hello", calling=must, seed=1, **how)
        [(name, call)] = split(engine.dialect, text)
    assert engine.dialect.calls(call, [tool]) == [Call("add", '{"a": 2}')]
    assert name == CALLING
