"""``/v1/responses``, stateless, over the official client."""

import json

import pytest
from conftest import TOOLS_TEMPLATE
from pydantic import BaseModel

from ifp_mlx.engine import Engine
from ifp_mlx.openai.api import Policy, make_app

openai = pytest.importorskip("openai")
pytest.importorskip("starlette")
from served import ask, post, script, write_able  # noqa: E402

ADD = {"type": "function", "name": "add", "description": "Adds.", "strict": False}
ADD |= {"parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
CALL = '<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call>'
THOUGHT = "<think>Hm.</think>"


class Sum(BaseModel):
    of: int


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("able") / "able"
    marks = "<think>", "</think>"
    with Engine.open(write_able(folder, TOOLS_TEMPLATE, *marks)) as engine:
        engine.prepare("Add.", name="add", keep=0.5)
        yield engine


@pytest.fixture
def app(engine):
    return make_app(engine, Policy("tiny"))


def respond(app, **options):
    options = {"model": "tiny", "input": "Hello", "max_output_tokens": 200} | options
    return ask(app, lambda client: client.responses.create(**options))


def events_of(app, **options):
    options = {"model": "tiny", "input": "Hello", "max_output_tokens": 200} | options

    async def stream(client):
        events = await client.responses.create(stream=True, **options)
        return [event async for event in events]

    return ask(app, stream)


def test_a_response_says_what_a_chat_would(app, engine):
    answer = respond(
        app,
        model="tiny@add",
        instructions="Be brief.",
        max_output_tokens=6,
        metadata={"a": "b"},
    )
    messages = [{"role": "system", "content": "Be brief."}]
    messages += [{"role": "user", "content": "Hello"}]
    expected = engine.generate(messages, task="add", max_tokens=6)
    assert answer.output_text == expected
    assert (answer.status, answer.object) == ("incomplete", "response")
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert (answer.instructions, answer.metadata) == ("Be brief.", {"a": "b"})
    assert (answer.store, answer.previous_response_id) == (False, None)
    assert answer.usage.output_tokens == 6
    assert answer.usage.total_tokens == answer.usage.input_tokens + 6
    assert answer.ifp["mask_id"] == engine.task("add").mask_id


def test_events_tell_the_response_item_by_item(app, monkeypatch):
    script(monkeypatch, f"{THOUGHT}So. {CALL}")
    events = events_of(app, tools=[ADD])
    assert [event.sequence_number for event in events] == list(range(len(events)))
    steps = [event.type.removeprefix("response.") for event in events]
    folded = [s for n, s in enumerate(steps) if s != steps[n - 1] or "delta" not in s]
    said = ["content_part.added", "output_text.delta", "output_text.done"]
    said += ["content_part.done", "output_item.done"]
    thought = [step.replace("output_text", "reasoning_text") for step in said]
    called = ["function_call_arguments.delta", "function_call_arguments.done"]
    assert folded == [
        *("created", "in_progress", "output_item.added", *thought),
        *("output_item.added", *said),
        *("output_item.added", *called, "output_item.done", "completed"),
    ]
    response = events[-1].response
    kinds = [item.type for item in response.output]
    assert kinds == ["reasoning", "message", "function_call"]
    assert response.output[0].content[0].text == "Hm."
    deltas = [event.delta for event in events if event.type.endswith("text.delta")]
    assert "".join(deltas) == "Hm.So. "
    assert response.output_text == "So. "
    assert json.loads(response.output[2].arguments) == {"a": 2}
    done = [event.item for event in events if event.type.endswith("item.done")]
    assert done == response.output


def test_a_stream_ends_with_what_is_answered_whole(app, monkeypatch):
    script(monkeypatch, f"{THOUGHT}So. {CALL}{CALL}")
    whole, streamed = (
        respond(app, tools=[ADD]),
        events_of(app, tools=[ADD])[-1].response,
    )

    def bare(response):
        items = [item.model_dump(exclude={"id", "call_id"}) for item in response.output]
        return items, response.usage, response.status, response.tools

    assert bare(whole) == bare(streamed)
    assert whole.usage.output_tokens_details.reasoning_tokens > 0


def test_the_official_stream_helper_puts_a_response_together(app, monkeypatch):
    script(monkeypatch, f"So. {CALL}")

    async def stream(client):
        how = {"model": "tiny", "input": "Hello", "tools": [ADD]}
        async with client.responses.stream(**how) as events:
            async for _ in events:
                pass
            return await events.get_final_response()

    response = ask(app, stream)
    assert response.output_text == "So. "
    assert response.output[1].name == "add"


def test_the_whole_loop_of_call_result_and_answer(app, monkeypatch):
    def says(prompt):
        assert '"description": "Adds."' in prompt
        if "<|im_start|>tool\n3<|im_end|>" not in prompt:
            return THOUGHT + CALL
        assert f"<|im_start|>assistant\n{THOUGHT}{CALL}<|im_end|>" in prompt
        return "It is 3."

    script(monkeypatch, says)
    asked = respond(app, tools=[ADD])
    called = asked.output[-1]
    said = [{"role": "user", "content": "Hello"}]
    said += [item.model_dump(exclude_none=True) for item in asked.output]
    said.append(
        {"type": "function_call_output", "call_id": called.call_id, "output": "3"}
    )
    assert respond(app, input=said, tools=[ADD]).output_text == "It is 3."


def test_an_answer_of_a_type_is_parsed(app, monkeypatch):
    pytest.importorskip("llguidance")
    script(monkeypatch, '{"of":3}')

    async def parse(client):
        how = {"model": "tiny", "input": "Hello", "text_format": Sum}
        return await client.responses.parse(**how)

    assert ask(app, parse).output_parsed == Sum(of=3)


def test_a_tool_can_be_asked_for_by_name(app, monkeypatch):
    pytest.importorskip("llguidance")
    script(monkeypatch, CALL)
    named = {"type": "function", "name": "add"}
    strict = [ADD | {"strict": True}]
    response = respond(app, tools=strict, tool_choice=named, parallel_tool_calls=False)
    [item] = response.output
    assert (item.type, item.name, item.status) == ("function_call", "add", "completed")
    assert response.tool_choice.name == "add" and response.tools[0].strict is True


def test_an_answer_without_a_word_is_an_empty_message(app, monkeypatch):
    script(monkeypatch, "")
    response = respond(app)
    assert (response.output_text, response.status) == ("", "completed")
    assert events_of(app)[-1].response.output[0].content[0].text == ""


def test_a_failure_in_a_stream_is_an_event(app, monkeypatch):
    script(monkeypatch, lambda prompt: 1 / 0)
    *_, last = events_of(app)
    assert (last.type, last.response.status) == ("response.failed", "failed")
    assert "ZeroDivisionError" in last.response.error.message


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"extra_body": {"colour": 1}}, "colour"),
    ],
)
def test_what_is_not_supported_is_named(app, fields, field):
    with pytest.raises(openai.BadRequestError) as caught:
        respond(app, **fields)
    assert caught.value.body["param"] == field


def test_stored_responses_are_not_there(app):
    assert post(app, "/v1/responses/resp_1", json={}).status_code == 404
