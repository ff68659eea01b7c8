"""Requests of the OpenAI API: read, or refused with the field's name."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifp_mlx.engine import Dialect
from ifp_mlx.engine.engine import CHOOSING
from ifp_mlx.engine.errors import InvalidRequest
from ifp_mlx.engine.sampling import Sampling
from ifp_mlx.openai.asked import Asked, Defaults
from ifp_mlx.openai.fields import FieldError
from ifp_mlx.openai.protocol import (
    Chat,
    Completion,
    read_chat,
    read_completion,
    read_json,
)
from ifp_mlx.openai.responses import Response, read_response
from ifp_mlx.selection.request import Request

HELLO = [{"role": "user", "content": "Hello"}]
ADD = {"name": "add", "parameters": {"type": "object"}}
TOOLS = [{"type": "function", "function": ADD}]
CALLED = {"id": "a1", "type": "function"}
CALLED |= {"function": {"name": "add", "arguments": '{"x": 1}'}}
ABLE = Dialect(tools=True, parser="json_tools", form=("", "", ""))
KINDS = {
    Chat: (read_chat, {"model": "m", "messages": HELLO}),
    Completion: (read_completion, {"model": "m", "prompt": "x"}),
    Response: (read_response, {"model": "m", "input": "x"}),
}
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False)
JSON = st.recursive(
    SCALARS | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "role", "content", "text", "task", "keep", "5"])
            | st.sampled_from(["check", "draft_tokens", "reselect", "function", "name"])
            | st.sampled_from(["call_id", "output", "format", "schema", "arguments"])
            | st.text(max_size=4),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


def read(kind=Chat, dialect=ABLE, **fields):
    way, body = KINDS[kind]
    return way(body | fields, Defaults(), dialect)


def fields_of(kind):
    return [field.alias or name for name, field in kind.model_fields.items()]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_any_json_is_read_or_refused_by_name(kind, data):
    names = st.sampled_from(fields_of(kind)) | st.text(max_size=5)
    body = data.draw(st.dictionaries(names, JSON, max_size=5))
    good = data.draw(st.booleans())
    way, start = KINDS[kind]
    try:
        asked = way(body | start if good else body, Defaults(), ABLE)
    except FieldError as error:
        assert error.field.split(".")[0].split("[")[0] in {*body, *fields_of(kind)}
        assert str(error).startswith(error.field)
        assert str(error).endswith(".") and "\n" not in str(error)
    else:
        assert isinstance(asked, Asked)
        sampling = {k: v for k, v in asked.options.items() if hasattr(Sampling, k)}
        choice = {k: v for k, v in asked.options.items() if k in CHOOSING}
        assert Sampling(**sampling)  # the engine agrees with every bound
        choice.pop("seed", None)
        assert Request(**choice)


@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_any_bytes_are_a_json_object_or_refused(raw):
    try:
        assert read_json(raw) == json.loads(raw)
    except InvalidRequest as error:
        assert str(error)


def test_openai_names_become_the_engines():
    asked = read(
        temperature=0.5,
        max_completion_tokens=7,
        max_tokens=9,
        stop="x",
        logit_bias={"5": -1},
        seed=-3,
        response_format={"type": "json_object"},
        logprobs=True,
        top_logprobs=2,
        ifp={"keep": 0.25, "selector": "random", "min_agreement": 0.5},
        user="me",
        n=1,
        tools=[],
    )
    expected = {
        "temp": 0.5,
        "max_tokens": 7,
        "stop_strings": ("x",),
        "logit_bias": {5: -1.0},
        "seed": -3,
        "json_schema": {"type": "object"},
        "top_logprobs": 2,
        "keep": 0.25,
        "selector": "random",
        "min_agreement": 0.5,
    }
    assert expected.items() <= asked.options.items()


def test_a_keep_is_a_share_or_auto():
    assert read(ifp={"keep": "auto"}).options["keep"] == "auto"
    for wrong in ("half", ["auto"], 1.5):
        with pytest.raises(FieldError, match=r"ifp\.keep.*a number from 0 to 1"):
            read(ifp={"keep": wrong})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_null_is_as_good_as_nothing(kind):
    start = KINDS[kind][1]
    nulls = {n: None for n in [*fields_of(kind), "unheard_of"] if n not in start}
    assert read(kind, **nulls) == read(kind)


def test_text_parts_are_joined_and_developers_are_the_system():
    parts = [{"type": "text", "text": "Good "}, {"type": "text", "text": "day"}]
    asked = read(messages=[{"role": "developer", "content": "Be."}, *HELLO])
    assert asked.prompt[0] == {"role": "system", "content": "Be."}
    asked = read(messages=[{"role": "user", "content": parts}])
    assert asked.prompt == [{"role": "user", "content": "Good day"}]


@pytest.mark.parametrize("field", ["model", "messages"])
def test_what_is_missing_is_named(field):
    with pytest.raises(FieldError, match=f"{field} is missing"):
        read(**{field: None})


@pytest.mark.parametrize(
    ("spec", "field"),
    [({"name": 5}, "name"), ({"strict": "yes"}, "strict"), ({"title": "x"}, "title")],
)
def test_a_json_schema_has_a_name_of_text_and_nothing_unknown(spec, field):
    form = {"type": "json_schema", "json_schema": {"schema": {}} | spec}
    where = rf"response_format\.json_schema\.{field}"
    with pytest.raises(FieldError, match=where):
        read(response_format=form)


def test_a_conversation_with_tools_is_what_templates_want():
    said = {"role": "assistant", "content": None, "tool_calls": [CALLED]}
    told = {"role": "tool", "tool_call_id": "a1", "content": "2"}
    _, asked, answered = read(
        messages=[*HELLO, said | {"reasoning": "Hm."}, told]
    ).prompt
    assert asked["tool_calls"][0]["function"] == {"name": "add", "arguments": {"x": 1}}
    assert (asked["content"], asked["reasoning_content"]) == ("", "Hm.")
    assert answered == told | {"name": "add"}


def test_items_of_a_response_are_one_conversation():
    call = {"type": "function_call", "call_id": "a1", "name": "add", "arguments": "{}"}
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
        {"type": "reasoning", "id": "r", "summary": [], "content": []},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Let", "annotations": []}],
        },
        call,
        call | {"call_id": "a2"},
        {"type": "function_call_output", "call_id": "a2", "output": "2"},
    ]
    system, user, said, told = read(Response, input=items, instructions="Be.").prompt
    assert (system["content"], user["content"]) == ("Be.", "Hello")
    assert said["content"] == "Let"
    assert [one["id"] for one in said["tool_calls"]] == ["a1", "a2"]
    assert (told["role"], told["name"]) == ("tool", "add")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"tools": [{"type": "custom"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": TOOLS * 2}, "tools[1].function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        (
            {
                "tools": TOOLS,
                "tool_choice": {"type": "function", "function": {"name": "sub"}},
            },
            "tool_choice.function.name",
        ),
        (
            {
                "messages": [
                    *HELLO,
                    {"role": "tool", "tool_call_id": "b", "content": ""},
                ]
            },
            "messages[1].tool_call_id",
        ),
        (
            {"messages": [*HELLO, {"role": "assistant", "tool_calls": [CALLED]}]},
            "messages",
        ),
        ({"n": 17}, "n"),
        ({"store": True}, "store"),
    ],
)
def test_what_does_not_fit_is_named(fields, field):
    with pytest.raises(FieldError) as caught:
        read(**fields)
    assert caught.value.field == field


FLAT = [{"type": "function"} | ADD]


def test_a_wrong_value_with_braces_is_quoted_as_it_is():
    with pytest.raises(FieldError, match=r"one of .*, not '\{0\}'\.$"):
        read(ifp={"selector": "{0}"})
    with pytest.raises(FieldError, match=r"one of system, .*, not \{'a': 1\}\.$"):
        read(messages=[{"role": {"a": 1}}])


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"store": True}, "store"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": []}, "input"),
        ({"tools": TOOLS}, "tools[0].name"),
        (
            {"tools": FLAT, "tool_choice": {"type": "function", "name": "sub"}},
            "tool_choice.name",
        ),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"reasoning": {"effort": "low"}}, "reasoning"),
    ],
)
def test_what_a_response_cannot_have_is_named(fields, field):
    with pytest.raises(FieldError) as caught:
        read(Response, **fields)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"tools": TOOLS}, "tools"),
        (
            {
                "messages": [
                    *HELLO,
                    {"role": "assistant", "tool_calls": [CALLED]},
                    *HELLO,
                ]
            },
            "messages[1].tool_calls",
        ),
    ],
)
def test_a_model_without_tools_refuses_them_with_a_remedy(fields, field):
    with pytest.raises(FieldError, match="serve a model whose template") as caught:
        read(dialect=Dialect(), **fields)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"tools": [{"type": "function", "function": ADD | {"strict": True}}]},
            "tools[0].function.strict",
        ),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_a_format_that_no_grammar_holds_says_so(fields, field):
    free = Dialect(tools=True, parser="pythonic")
    assert read(dialect=free, tools=TOOLS).calling.tools
    with pytest.raises(FieldError, match="pythonic") as caught:
        read(dialect=free, **{"tools": TOOLS} | fields)
    assert caught.value.field == field
