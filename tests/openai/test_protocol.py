"""Requests of the OpenAI API: read, or refused with the field's name."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifp_mlx.engine.engine import CHOOSING
from ifp_mlx.engine.errors import InvalidRequest
from ifp_mlx.engine.sampling import Sampling
from ifp_mlx.openai.protocol import (
    NEUTRAL,
    Asked,
    Defaults,
    FieldError,
    read_json,
    read_request,
)
from ifp_mlx.selection.request import Request

HELLO = [{"role": "user", "content": "Hello"}]
FIELDS = """model messages prompt stream stream_options max_tokens temperature top_p
max_completion_tokens top_k min_p seed stop presence_penalty frequency_penalty logprobs
repetition_penalty logit_bias top_logprobs response_format user ifp""".split()
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False)
JSON = st.recursive(
    SCALARS | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "role", "content", "text", "task", "keep", "5"])
            | st.sampled_from(["check", "draft_tokens", "reselect"])
            | st.text(max_size=4),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


def read(chat=True, **fields):
    body = {"model": "m"} | ({"messages": HELLO} if chat else {"prompt": "x"}) | fields
    return read_request(body, chat=chat, defaults=Defaults())


@given(
    body=st.dictionaries(
        st.sampled_from([*FIELDS, *NEUTRAL]) | st.text(max_size=5), JSON, max_size=5
    ),
    good=st.booleans(),
    chat=st.booleans(),
)
def test_any_json_is_read_or_refused_by_name(body, good, chat):
    if good:
        body = {"model": "m", "messages": HELLO, "prompt": "x"} | body
        body.pop("prompt" if chat else "messages")
    try:
        asked = read_request(body, chat=chat, defaults=Defaults())
    except FieldError as error:
        assert error.field.split(".")[0].split("[")[0] in {*body, *FIELDS}
        assert str(error).startswith(error.field)
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


def test_null_is_as_good_as_nothing():
    fields = [name for name in FIELDS if name not in ("model", "messages", "prompt")]
    assert read(**dict.fromkeys([*fields, *NEUTRAL, "unheard_of"])) == read()


def test_text_parts_are_joined_and_developers_are_the_system():
    parts = [{"type": "text", "text": "Good "}, {"type": "text", "text": "day"}]
    asked = read(messages=[{"role": "developer", "content": "Be."}, *HELLO])
    assert asked.prompt[0] == {"role": "system", "content": "Be."}
    asked = read(messages=[{"role": "user", "content": parts}])
    assert asked.prompt == [{"role": "user", "content": "Good day"}]


@pytest.mark.parametrize("field", ["model", "messages"])
def test_what_is_missing_is_named(field):
    body = {"model": "m", "messages": HELLO}
    del body[field]
    with pytest.raises(FieldError, match=f"{field} is missing"):
        read_request(body, chat=True, defaults=Defaults())


@pytest.mark.parametrize(
    ("spec", "field"),
    [({"name": 5}, "name"), ({"strict": "yes"}, "strict"), ({"title": "x"}, "title")],
)
def test_a_json_schema_has_a_name_of_text_and_nothing_unknown(spec, field):
    form = {"type": "json_schema", "json_schema": {"schema": {}} | spec}
    where = rf"response_format\.json_schema\.{field}"
    with pytest.raises(FieldError, match=where):
        read(response_format=form)
