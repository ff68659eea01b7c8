"""An agent that is no work of ours, with tools, against the server."""

import asyncio
import json

import pytest
from conftest import TOOLS_TEMPLATE, fetch

from ifp_mlx.engine import Engine
from ifp_mlx.openai.api import Policy, make_app

pytest.importorskip("pydantic_ai")
from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.openai import (
    OpenAIChatModel,
    OpenAIResponsesModel,
)
from pydantic_ai.providers.openai import OpenAIProvider
from served import http, script, write_able

CALL = '<tool_call>{"name": "population", "arguments": {"city": "%s"}}</tool_call>'
KINDS = [OpenAIChatModel, OpenAIResponsesModel]


class City(BaseModel):
    name: str
    people: int


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    folder = tmp_path_factory.mktemp("able") / "able"
    marks = "<think>", "</think>"
    with Engine.open(write_able(folder, TOOLS_TEMPLATE, *marks)) as engine:
        yield make_app(engine, Policy("tiny"))


def run(app, kind, act, **options):
    """Run ``act(agent)`` with an agent that can look populations up."""

    async def inside():
        async with http(app) as transport:
            provider = OpenAIProvider(
                base_url="http://127.0.0.1/v1", api_key="none", http_client=transport
            )
            model = kind("tiny", provider=provider)
            agent = Agent(model, instructions="You know cities.", **options)
            asked = []

            @agent.tool_plain
            def population(city: str) -> int:
                """Look up how many people live in a city."""
                asked.append(city)
                return {"Oslo": 700_000, "Bergen": 290_000}[city]

            return await act(agent), asked

    return asyncio.run(inside())


def says(prompt):
    """Look both cities up at once, then answer."""
    assert "You know cities." in prompt and '"name": "population"' in prompt
    if "700000" in prompt and "290000" in prompt:
        return "Oslo is larger."
    return "<think>Two.</think>" + CALL % "Oslo" + CALL % "Bergen"


@pytest.mark.parametrize("kind", KINDS)
def test_an_agent_calls_tools_and_answers_from_what_they_return(app, monkeypatch, kind):
    script(monkeypatch, says)
    result, asked = run(app, kind, lambda agent: agent.run("Which is larger?"))
    assert (result.output, sorted(asked)) == ("Oslo is larger.", ["Bergen", "Oslo"])
    assert result.usage.requests == 2 and result.usage.output_tokens > 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_agent_that_streams_does_too(app, monkeypatch, kind):
    script(monkeypatch, says)

    async def act(agent):
        async with agent.run_stream("Which is larger?") as result:
            return [
                text async for text in result.stream_text(delta=True, debounce_by=None)
            ]

    pieces, asked = run(app, kind, act)
    assert "".join(pieces) == "Oslo is larger." and len(pieces) > 3
    assert sorted(asked) == ["Bergen", "Oslo"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_agent_gets_its_answer_as_a_type(app, monkeypatch, kind):
    pytest.importorskip("llguidance")  # it is asked for by a tool that must be called
    answer = '{"name": "final_result", "arguments": {"name": "Oslo", "people": 700000}}'
    script(monkeypatch, f"<tool_call>{answer}</tool_call>")
    act = lambda agent: agent.run("The larger one?")  # noqa: E731
    result, _ = run(app, kind, act, output_type=City)
    assert result.output == City(name="Oslo", people=700_000)


@pytest.mark.long
@pytest.mark.real
def test_a_real_model_is_held_to_calls_that_an_agent_understands(tmp_path):
    """SmolLM2 was not trained to call tools; what it calls may be wrong, but is a call."""
    pytest.importorskip("llguidance")
    folder = tmp_path / "smollm2"
    folder.mkdir()
    for file in fetch("smollm2").iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").unlink()
    config["chat_template"] = TOOLS_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    how = {"max_tokens": 60, "extra_body": {"ifp": {"keep": 0.75}}}

    async def act(agent):
        asking = "What is the population of Oslo? It is 700000."
        return await Agent(agent.model, output_type=City, model_settings=how).run(
            asking
        )

    with Engine.open(folder) as engine:
        app = make_app(engine, Policy("tiny"))
        result, _ = run(app, OpenAIChatModel, act)
    assert isinstance(result.output, City) and result.output.people >= 0
