"""Tools, thoughts and several choices, over the official client."""

import json

import pytest
from conftest import CHAT_TEMPLATE, TOOLS_TEMPLATE

from ifp_mlx.engine import Engine
from ifp_mlx.openai.api import Policy, make_app

openai = pytest.importorskip("openai")
pytest.importorskip("starlette")
from served import HELLO, ask, chat, chunks_of, script, write_able  # noqa: E402

ADD = {
    "name": "add",
    "description": "Adds.",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer", "maximum": 99}, "b": {"enum": ["x"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
}
TOOLS = [{"type": "function", "function": ADD}]
TOOLS += [{"type": "function", "function": {"name": "now"}}]
STRICT = [{"type": "function", "function": ADD | {"strict": True}}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": "x"}}\n</tool_call>'
NOW = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'


THINK = ("<think>", "</think>")


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with Engine.open(write_able(tmp_path_factory.mktemp("able") / "able")) as engine:
        yield engine


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    folder = tmp_path_factory.mktemp("thinker") / "able"
    with Engine.open(write_able(folder, TOOLS_TEMPLATE, *THINK)) as engine:
        yield make_app(engine, Policy("tiny"))


@pytest.fixture
def app(engine):
    return make_app(engine, Policy("tiny"))


def calls_of(message):
    return [
        (c.function.name, json.loads(c.function.arguments)) for c in message.tool_calls
    ]


def test_a_call_is_told_apart_from_what_is_said(app, monkeypatch):
    script(monkeypatch, f"I add.\n{CALL}\n{NOW}")
    [choice] = chat(app, tools=TOOLS, max_tokens=300).choices
    assert calls_of(choice.message) == [("add", {"a": 2, "b": "x"}), ("now", {})]
    assert choice.message.content == "I add.\n"
    assert choice.finish_reason == "tool_calls"
    ids = {call.id for call in choice.message.tool_calls}
    assert len(ids) == 2 and all(len(id) == 9 and id.isalnum() for id in ids)


def test_a_streamed_call_has_its_name_first_and_then_its_arguments(app, monkeypatch):
    script(monkeypatch, f"I add. {CALL}{NOW}")
    *chunks, last = chunks_of(app, tools=TOOLS)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == "I add. "
    one, rest, two, more = [call for d in deltas for call in d.tool_calls or ()]
    assert (one.index, one.function.name, one.function.arguments) == (0, "add", "")
    assert (rest.index, rest.id, rest.function.name) == (0, None, None)
    assert json.loads(rest.function.arguments) == {"a": 2, "b": "x"}
    assert (two.index, two.function.name, more.function.arguments) == (1, "now", "{}")
    assert last.choices[0].finish_reason == "tool_calls"


def test_the_official_stream_helper_puts_a_call_together(app, monkeypatch):
    script(monkeypatch, CALL)

    async def stream(client):
        options = {"model": "tiny", "messages": HELLO, "tools": TOOLS}
        async with client.chat.completions.stream(**options) as events:
            return await events.get_final_completion()

    [choice] = ask(app, stream).choices
    assert calls_of(choice.message) == [("add", {"a": 2, "b": "x"})]


def test_the_whole_loop_of_call_result_and_answer(app, monkeypatch):
    def says(prompt):
        assert '"description": "Adds."' in prompt  # the tools are shown each time
        return "It is 3." if "<|im_start|>tool\n3<|im_end|>" in prompt else CALL

    script(monkeypatch, says)
    asked = chat(app, tools=TOOLS, max_tokens=200).choices[0].message
    [call] = asked.tool_calls
    told = {"role": "tool", "tool_call_id": call.id, "content": "3"}
    messages = [*HELLO, asked.model_dump(), told]
    [choice] = chat(app, messages=messages, tools=TOOLS, max_tokens=200).choices
    assert (choice.message.content, choice.finish_reason) == ("It is 3.", "stop")
    assert choice.message.tool_calls is None


def test_one_call_at_a_time_ends_after_the_first(app, monkeypatch):
    script(monkeypatch, f"{CALL}{NOW} and so on")
    [choice] = chat(app, tools=TOOLS, parallel_tool_calls=False, max_tokens=300).choices
    assert [name for name, _ in calls_of(choice.message)] == ["add"]
    assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")


@pytest.mark.parametrize(
    "said",
    ["<tool_call>{oh dear}</tool_call>", '<tool_call>{"name": "add"', "<tool_ca"],
)
def test_what_is_no_whole_call_stays_as_it_was_written(app, monkeypatch, said):
    script(monkeypatch, said)
    [choice] = chat(app, tools=TOOLS, max_tokens=200).choices
    assert (choice.message.content, choice.finish_reason) == (said, "stop")
    assert choice.message.tool_calls is None


def test_without_tools_or_with_none_a_call_is_text(app, monkeypatch):
    script(monkeypatch, NOW)
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        [choice] = chat(app, max_tokens=200, **fields).choices
        assert (choice.message.content, choice.finish_reason) == (NOW, "stop")


@pytest.mark.parametrize("seed", range(3))
def test_a_call_that_must_come_comes_and_follows_its_schema(app, seed):
    pytest.importorskip("llguidance")
    named = {"type": "function", "function": {"name": "add"}}
    how = {"temperature": 1.5, "seed": seed, "max_tokens": 400}
    [choice] = chat(app, tools=TOOLS, tool_choice=named, **how).choices
    for name, arguments in calls_of(choice.message):
        assert (name, arguments["b"]) == ("add", "x") and arguments["a"] <= 99
    [choice] = chat(
        app, tools=STRICT, tool_choice="required", parallel_tool_calls=False, **how
    ).choices
    assert [name for name, _ in calls_of(choice.message)] == ["add"]
    assert choice.finish_reason == "tool_calls"


def test_strict_arguments_are_held_to_their_schema_and_text_is_free(app, monkeypatch):
    pytest.importorskip("llguidance")
    script(monkeypatch, f"Free text, {{and}} <more>.{CALL}")
    [choice] = chat(app, tools=STRICT, max_tokens=300).choices
    assert choice.message.content == "Free text, {and} <more>."
    assert calls_of(choice.message) == [("add", {"a": 2, "b": "x"})]


def test_beside_tools_an_answer_is_json_or_a_call(app):
    pytest.importorskip("llguidance")
    form = {"type": "json_schema"}
    form |= {"json_schema": {"name": "n", "schema": {"type": "integer", "maximum": 9}}}
    for seed in range(4):
        [choice] = chat(
            app,
            tools=STRICT,
            response_format=form,
            temperature=1.5,
            seed=seed,
            max_tokens=400,
        ).choices
        called = choice.message.tool_calls
        assert called or json.loads(choice.message.content) <= 9


def test_tools_select_with_the_system_message(app, engine):
    def identity(**fields):
        extra = {"extra_body": {"ifp": {"keep": 0.5}}}
        return chat(app, **extra, **fields).ifp["identity"]

    bare, with_tools = identity(), identity(tools=TOOLS)
    assert bare != with_tools != identity(tools=STRICT)
    assert identity(tools=TOOLS, tool_choice="none") == bare
    told = [*HELLO, {"role": "assistant", "content": "Hi"}, *HELLO]
    assert identity(tools=TOOLS, messages=told) == with_tools


def test_thoughts_are_reasoning_whole_and_streamed(thinker, monkeypatch):
    script(monkeypatch, f"<think>\nHm, hm.</think>\n\nSo: {NOW}")
    answer = chat(thinker, tools=TOOLS, max_tokens=200)
    message = answer.choices[0].message
    assert (message.reasoning, message.content) == ("Hm, hm.", "So: ")
    assert [name for name, _ in calls_of(message)] == ["now"]
    assert answer.usage.completion_tokens_details.reasoning_tokens == 9
    deltas = [chunk.choices[0].delta for chunk in chunks_of(thinker, tools=TOOLS)]
    thought = "".join(getattr(delta, "reasoning", None) or "" for delta in deltas)
    said = "".join(delta.content or "" for delta in deltas)
    assert (thought, said) == ("Hm, hm.", "So: ")


def test_a_template_that_opens_a_thought_begins_in_it(tmp_path, monkeypatch):
    opened = CHAT_TEMPLATE.replace(
        "assistant\n{% endif", "assistant\n<think>\n{% endif"
    )
    with Engine.open(write_able(tmp_path / "m", opened, *THINK)) as engine:
        app = make_app(engine, Policy("tiny"))
        script(monkeypatch, "Hm.\n</think>\n\nYes.")
        message = chat(app, max_tokens=200).choices[0].message
        assert (message.reasoning, message.content) == ("Hm.\n", "Yes.")
        ended = [*HELLO, {"role": "assistant", "content": "<think>Hm.</think>So"}]
        script(monkeypatch, "it is.")
        message = chat(app, messages=ended, max_tokens=200).choices[0].message
        assert (message.content, hasattr(message, "reasoning")) == ("it is.", False)


def test_a_template_that_is_told_not_to_think_begins_with_what_is_said(
    tmp_path, monkeypatch
):
    asked = (
        "{% if enable_thinking %}<think>\n{% else %}<think>\n\n</think>\n{% endif %}"
    )
    template = CHAT_TEMPLATE.replace(
        "assistant\n{% endif", f"assistant\n{asked}{{% endif"
    )
    with Engine.open(write_able(tmp_path / "m", template, *THINK)) as engine:
        app = make_app(engine, Policy("tiny"))
        script(monkeypatch, "Yes.")
        for thinks, field in ((True, "reasoning"), (False, "content")):
            extra = {"chat_template_kwargs": {"enable_thinking": thinks}}
            message = chat(app, extra_body=extra).choices[0].message
            assert getattr(message, field) == "Yes."


@pytest.mark.parametrize("marks", [THINK, ("<longcat_think>", "</longcat_think>")])
def test_what_must_come_comes_after_the_thought(tmp_path, monkeypatch, marks):
    pytest.importorskip("llguidance")
    thought = f"{marks[0]}Which {{one}}?{marks[1]}\n"
    with Engine.open(write_able(tmp_path / "m", TOOLS_TEMPLATE, *marks)) as engine:
        app = make_app(engine, Policy("tiny"))
        script(monkeypatch, f'{thought}{{"a":1}}')
        form = {"type": "json_object"}
        message = chat(app, response_format=form, max_tokens=200).choices[0].message
        assert message.reasoning == "Which {one}?"
        assert json.loads(message.content) == {"a": 1}
        script(monkeypatch, thought + CALL)
        must = {"tools": TOOLS, "tool_choice": "required", "max_tokens": 200}
        message = chat(app, **must).choices[0].message
        assert calls_of(message) == [("add", {"a": 2, "b": "x"})]


def test_several_choices_are_each_as_alone(app):
    how = {"temperature": 1.0, "max_tokens": 8}
    together = chat(app, n=3, seed=5, **how)
    alone = [chat(app, seed=5 + number, **how) for number in range(3)]
    texts = [choice.message.content for choice in together.choices]
    assert texts == [answer.choices[0].message.content for answer in alone]
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    assert together.usage.completion_tokens == 24
    assert together.usage.prompt_tokens == alone[0].usage.prompt_tokens


def test_several_streamed_choices_have_their_index_and_usage_comes_once(app):
    how = {"temperature": 1.0, "seed": 5, "max_tokens": 8, "n": 2}
    usage = {"stream_options": {"include_usage": True}}
    *chunks, last = chunks_of(app, **how, **usage)
    said = ["", ""]
    for chunk in chunks:
        [choice] = chunk.choices
        said[choice.index] += choice.delta.content or ""
        assert "usage" in chunk.model_fields_set and chunk.usage is None
    whole = chat(app, **how)
    assert said == [choice.message.content for choice in whole.choices]
    assert last.choices == [] and last.usage == whole.usage
    assert all("usage" not in chunk.model_fields_set for chunk in chunks_of(app, **how))


def test_completions_have_several_choices_too(app):
    async def complete(client):
        how = {"model": "tiny", "prompt": "Once", "max_tokens": 5, "logprobs": 1}
        return await client.completions.create(n=2, seed=1, temperature=1.0, **how)

    answer = ask(app, complete)
    assert [len(choice.logprobs.tokens) for choice in answer.choices] == [5, 5]
    assert answer.choices[0].text != answer.choices[1].text


def test_a_call_that_must_come_does_not_go_with_checks(app):
    pytest.importorskip("llguidance")
    with pytest.raises(openai.BadRequestError, match="never back"):
        chat(
            app,
            tools=TOOLS,
            tool_choice="required",
            extra_body={"ifp": {"check": "exact", "keep": 0.5}},
        )


def test_a_schema_of_a_tool_that_cannot_be_followed_is_refused(app):
    pytest.importorskip("llguidance")
    odd = {"name": "odd", "strict": True, "parameters": {"type": "nothing"}}
    with pytest.raises(openai.BadRequestError, match="schema"):
        chat(app, tools=[{"type": "function", "function": odd}])
