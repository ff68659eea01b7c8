"""The plug-in for `llm`, through `llm`'s own Python API and command."""

import asyncio
import json
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from conftest import write_family, write_folder

llm = pytest.importorskip("llm", reason="the extra llm is not installed")

from ifp_mlx import llm_plugin  # noqa: E402
from ifp_mlx.engine import Engine  # noqa: E402
from ifp_mlx.selection.request import MIN_AGREEMENT  # noqa: E402


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path / "llm"))
    yield str(write_folder(tmp_path / "tiny"))
    for engine in opened:
        engine.close()
    opened.clear()
    llm_plugin._engine.cache_clear()


opened: list[Engine] = []


@pytest.fixture(autouse=True)
def remember_engines(monkeypatch):
    real = Engine.open

    def remembered(folder):
        opened.append(real(folder))
        return opened[-1]

    monkeypatch.setattr(Engine, "open", staticmethod(remembered))


def expected(folder: str, messages: object, **options: object) -> str:
    with Engine.open(folder) as engine:
        return engine.generate(messages, max_tokens=5, **options)


def test_llm_finds_the_plug_in():
    found = entry_points(group="llm", name="ifp")
    assert [entry.load() for entry in found] == [llm_plugin]


def test_the_answer_is_the_engines_and_says_what_was_selected(folder):
    model = llm_plugin.IFP()
    options = {"model": folder, "keep": 0.5, "max_tokens": 5}
    response = model.prompt("hello", system="You greet.", options=options)
    pieces = [piece for piece in response if piece]
    messages = [
        {"role": "system", "content": "You greet."},
        {"role": "user", "content": "hello"},
    ]
    assert len(pieces) > 1
    assert "".join(pieces) == expected(folder, messages, keep=0.5)
    about = response.response_json
    assert (about["kept_channels"], about["total_channels"]) == (96, 192)
    assert 0 <= about["agreement"] <= 1 and about["promise"] is None
    assert response.usage().output == 5


def test_experts_that_agree_too_little_are_an_error_of_llms(tmp_path):
    folder = str(write_family(tmp_path / "mixture", "qwen3_moe"))
    options = {"model": folder, "keep": 0.25, "max_tokens": 2}
    response = llm_plugin.IFP().prompt("hello", options=options)
    assert response.text()
    about = response.response_json
    assert (about["unit"], about["kept_channels"]) == ("expert", 6)
    assert 0 < about["agreement"] < 1 and 0 < about["router_mass"] < 1
    strict = options | {"min_agreement": 1.0}
    with pytest.raises(llm.ModelError, match="25% of the experts, chooses the dense"):
        llm_plugin.IFP().prompt("hello", options=strict).text()


def test_a_checked_answer_is_the_whole_models(folder):
    from click.testing import CliRunner
    from llm.cli import cli

    options = {"model": folder, "keep": 0.5, "max_tokens": 5, "check": "exact"}
    response = llm_plugin.IFP().prompt("hello", options=options)
    assert response.text() == expected(folder, "hello", keep=1.0)
    assert response.response_json["check"]["mode"] == "exact"
    given = ["-o", "check", "0.5", "-o", "draft_tokens", "2", "-o", "max_tokens", "2"]
    command = ["prompt", "-m", "ifp", "-o", "model", folder, *given, "--no-log", "hi"]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    with pytest.raises(llm.ModelError, match="'nearly'"):
        llm_plugin.IFP().prompt("hello", options=options | {"check": "nearly"}).text()


def test_a_conversation_keeps_the_mask_of_its_first_turn(folder):
    talk = llm_plugin.IFP().conversation()
    options = {"model": folder, "keep": 0.5, "max_tokens": 3}
    first = talk.prompt("count to three", options=options)
    first.text()
    second = talk.prompt("now backwards, please", options=options)
    second.text()
    assert second.response_json["mask_id"] == first.response_json["mask_id"]
    alone = llm_plugin.IFP().prompt("now backwards, please", options=options)
    alone.text()
    assert alone.response_json["mask_id"] != first.response_json["mask_id"]


def test_auto_is_a_way_to_keep(folder):
    options = {"model": folder, "max_tokens": 2}
    said = []
    for more in ({}, {"keep": "auto"}):
        response = llm_plugin.IFP().prompt("hello", options=options | more)
        response.text()
        said.append(response.response_json)
    assert said[0]["mask_id"] == said[1]["mask_id"]
    assert said[1]["promise"] >= MIN_AGREEMENT
    with pytest.raises(llm.ModelError, match="keep='half'.*or auto"):
        llm_plugin.IFP().prompt("hello", options=options | {"keep": "half"}).text()


def test_a_task_of_the_library_selects(folder):
    with Engine.open(folder) as engine:
        task = engine.prepare("You greet.", name="greet", keep=0.25)
        (Path(folder) / "tasks").mkdir()
        engine.save("greet", Path(folder) / "tasks" / "greet.safetensors")
    options = {"model": folder, "task": "greet", "max_tokens": 3}
    response = llm_plugin.IFP().prompt("hello", options=options)
    response.text()
    assert response.response_json["mask_id"] == task.mask_id
    for more in ({"keep": 0.5}, {"mask_file": "x"}, {"task": "none"}):
        with pytest.raises(llm.ModelError, match="keep|give one|tasks there are greet"):
            llm_plugin.IFP().prompt("hello", options=options | more).text()


def test_the_async_model_answers_the_same(folder):
    async def ask() -> str:
        model = llm_plugin.AsyncIFP()
        return await model.prompt(
            "hello", options={"model": folder, "max_tokens": 5}
        ).text()

    assert asyncio.run(ask()) == expected(folder, "hello")


def test_mistakes_are_one_sentence(folder):
    model = llm_plugin.IFP()
    with pytest.raises(llm.ModelError, match="-o model FOLDER"):
        model.prompt("hello").text()
    with pytest.raises(llm.ModelError, match="nowhere"):
        model.prompt("hello", options={"model": "nowhere"}).text()
    with pytest.raises(llm.ModelError, match=r"keep=7"):
        model.prompt("hello", options={"model": folder, "keep": 7.0}).text()


def test_the_command_of_llm_runs_it(folder):
    from click.testing import CliRunner
    from llm.cli import cli

    command = ["prompt", "-m", "ifp", "-o", "model", folder, "-o", "max_tokens", "5"]
    done = CliRunner().invoke(cli, [*command, "--no-log", "hello"])
    assert done.exit_code == 0, done.output
    assert done.output.removesuffix("\n") == expected(folder, "hello")
    logged = CliRunner().invoke(cli, ["logs", "--json"])
    assert json.loads(logged.output or "[]") == []
