"""The chat app: its controller, its window's handlers, and a run in real widgets."""

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
from conftest import write_folder

from ifp_mlx.engine import (
    Cancelled,
    Done,
    Engine,
    ModelNotFound,
    OutOfMemory,
    Progress,
    Task,
    Token,
)

ROOT = Path(__file__).parents[2]
APP = ROOT / "examples" / "apps" / "macos_app"
sys.path.insert(0, str(APP))

from ifp_chat.controller import Controller  # noqa: E402

L, F = 3, 8
KEPT = {"Facts": [0, 1, 2, 3], "Code": [2, 3, 4, 5], "Stories": [3, 4, 5, 6]}


class FakeEngine:
    """Has the methods of an ``Engine`` that the app calls, and answers at once."""

    name, layers, unit, channels = "fake", L, "channel", F

    def __init__(self, path="", progress=lambda event: None, words=("Well", ", yes.")):
        if path == "nowhere":
            raise ModelNotFound("There is no model folder nowhere; give another one.")
        self.words, self.prepared, self.chats = words, {}, []
        self.resident, self.closed = set(), False
        self.hold = asyncio.Event()  # a chat waits here once it is told to
        self.hold.set()
        progress(Progress("load", 0, 1))

    def prepare(self, instruction, *, name, keep, progress, stop):
        if "enormous" in instruction:
            raise OutOfMemory("This needs 900 MB, more than the memory limit.")
        for layer in range(L + 1):
            while "until it is stopped" in instruction and not stop.cancelled:
                time.sleep(0.001)
            if stop.cancelled:
                raise Cancelled("Cancelled.")
            progress(Progress("channels", layer, L))
        self.prepared[name] = (instruction, keep)
        self.resident.add(name)
        return self._task(name, seconds={"select": 0.5, "load": 0.25})

    def _task(self, name, seconds=None):
        kept = len(KEPT.get(name, range(4)))
        return Task(
            name=name,
            mask_id=f"mask of {name}",
            identity=f"mask of {name}",
            kept_channels=L * kept,
            total_channels=L * F,
            channels=F,
            widths=(kept,) * L,
            bytes=2_000_000,
            resident=name in self.resident,
            info={},
            agreement=0.875,
            promise=0.95,
            seconds=seconds or {},
        )

    def tasks(self):
        return [self._task(name) for name in sorted(self.prepared)]

    def mask(self, name):
        mask = np.zeros((L, F), np.float32)
        mask[:, KEPT.get(name, range(4))] = 1
        return mask

    def chat(self, *, system, task):
        self.chats.append(FakeChat(self, system, task))
        return self.chats[-1]

    def memory(self):
        return {"active": 1_000_000 * (1 + len(self.resident))}

    def unload(self):
        self.resident.clear()

    def close(self):
        self.closed = True


class FakeChat:
    def __init__(self, engine, system, task):
        self.engine, self.system, self.task, self.asked = engine, system, task, []

    async def astream(self, text, *, stop, **options):
        self.asked.append((text, options))
        yield Progress("prefill", 4, 8)
        yield Progress("decode", 0, 0)
        number, reason = 0, "stop"
        for number, word in enumerate(self.engine.words, start=1):
            await self.engine.hold.wait()
            if stop.cancelled:
                number, reason = number - 1, "cancelled"
                break
            yield Token(word, 7, number)
        yield Done(
            reason,
            generation_tokens=number,
            seconds={"ttft": 0.125},
            tokens_per_second=20.0,
        )


def run(scenario, **fake):
    """Run ``scenario(controller, engines)`` on a loop; return the controller."""

    async def main():
        engines = []

        def open_engine(path, progress):
            engines.append(FakeEngine(path, progress, **fake))
            return engines[-1]

        controller = Controller(open_engine=open_engine)
        try:
            await scenario(controller, engines)
        finally:
            await controller.close()
        return controller

    return asyncio.run(main())


async def until(condition):
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never came")


def test_a_question_selects_first_and_is_answered_by_that_task():
    async def scenario(controller, engines):
        await controller.open("model")
        assert "3 layers of 8 channels" in controller.status
        controller.choose("Code")
        controller.keep = 0.5
        await controller.say("  Add two numbers. ", max_tokens=9)
        assert engines[0].prepared == {"Code": ("Write a short Python function.", 0.5)}
        asked, answer = controller.assignment.lines
        assert (asked.speaker, asked.text) == ("You", "Add two numbers.")
        assert (answer.speaker, answer.text) == ("Code", "Well, yes.")
        assert answer.figures == "2 tokens, 20.0 tokens/s; the first after 0.1 s"
        assert engines[0].chats[0].asked == [("Add two numbers.", {"max_tokens": 9})]
        assert controller.status == "Answered." and controller.speed == 20
        await controller.say("And three?")
        assert len(engines[0].chats) == 1  # the conversation goes on

    run(scenario)


def test_each_task_keeps_its_own_conversation_and_may_tell_its_instruction():
    async def scenario(controller, engines):
        await controller.open("model")
        await controller.say("One?")
        controller.tell = True
        await controller.select(" Mine ", " Rhyme. ")
        assert {keep for _, keep in engines[0].prepared.values()} == {None}  # auto
        assert controller.status == (
            "Mine keeps 50% of the channels (2 MB): 0.5 s to select, 0.2 s to read; at the "
            "instruction's end 88% as the whole model; in answers 95%, by its card."
        )
        assert controller.current == "Mine" and controller.assignment.lines == []
        await controller.say("Two?")
        first, second = engines[0].chats
        assert (first.task, first.system) == ("Facts", None)
        assert (second.task, second.system) == ("Mine", "Rhyme.")
        controller.choose("Facts")
        assert [line.text for line in controller.assignment.lines][0] == "One?"
        controller.restart()
        assert controller.assignment.lines == [] and len(engines[0].chats) == 3
        controller.choose("no such task")
        assert controller.current == "Facts"

    run(scenario)


def test_the_shares_are_what_is_kept_and_what_every_task_keeps():
    async def scenario(controller, engines):
        assert controller.shares() == []
        await controller.open("model")
        for name in ("Facts", "Code", "Stories"):
            await controller.select(name, "Do it.")
        assert controller.shares() == [(0.5, 0.125)] * L  # channel 3 alone is in all

    run(scenario)


def test_progress_comes_from_the_worker_and_late_reports_are_dropped():
    async def scenario(controller, engines):
        await controller.open("model")
        seen = []
        controller.redraw = lambda: seen.append(
            (controller.status, controller.fraction)
        )
        report = controller._reporter()
        frames = asyncio.create_task(controller.frames())
        engines[0].hold.clear()
        saying = asyncio.create_task(controller.say("Well?"))
        await until(lambda: ("Answering ...", None) in seen)
        assert controller.busy and controller.can_stop and not controller.ready
        await asyncio.to_thread(report, Progress("download", 5_000_000, 10_000_000))
        await until(lambda: ("Downloading 5 of 10 MB ...", 0.5) in seen)
        engines[0].hold.set()
        await saying
        report(Progress("select", 1, 2))
        await until(lambda: seen[-1] == ("Answered.", 0.0))
        frames.cancel()

    run(scenario)


def test_many_tokens_share_a_frame():
    async def scenario(controller, engines):
        await controller.open("model")
        drawn = []
        controller.redraw = lambda: drawn.append(controller.assignment.lines[-1].text)
        await controller.select("Facts", "Know.")
        frames = asyncio.create_task(controller.frames())
        await controller.say("Count.")
        await until(lambda: drawn and drawn[-1] == "x" * 500)
        assert len(drawn) < 50
        frames.cancel()

    run(scenario, words=["x"] * 500)


def test_stop_ends_an_answer_and_what_was_said_stays():
    async def scenario(controller, engines):
        controller.stop()  # nothing is being done: nothing happens
        await controller.open("model")
        await controller.select("Facts", "Know.")
        saying = asyncio.create_task(controller.say("Well?"))
        await until(lambda: controller.assignment.lines[-1:] != [])
        await until(lambda: controller.assignment.lines[-1].text == "Well")
        await controller.say("Another?")
        assert "Wait for" in controller.status
        await controller.select("Code", "Write.")
        controller.choose("Code")
        assert controller.current == "Facts"
        controller.stop()
        assert not controller.can_stop
        await saying
        assert controller.status == "Stopped."
        assert [line.text for line in controller.assignment.lines] == ["Well?", "Well"]
        assert not controller.busy

    class Words:
        """One word at once, the second when there was time to stop."""

        def __iter__(self):
            yield "Well"
            engine.hold.clear()
            asyncio.get_running_loop().call_later(0.2, engine.hold.set)
            yield ", yes."

    async def with_engine(controller, engines):
        nonlocal engine
        opened = controller._open_engine

        def open_engine(path, progress):
            nonlocal engine
            engine = opened(path, progress)
            return engine

        controller._open_engine = open_engine
        await scenario(controller, engines)

    engine = None
    run(with_engine, words=Words())


def test_a_stopped_selection_and_an_answer_of_nothing_leave_nothing_behind():
    async def scenario(controller, engines):
        await controller.open("model")
        endless = controller.select("New", "Go on until it is stopped.")
        selecting = asyncio.create_task(endless)
        await asyncio.sleep(0)
        controller.stop()
        await selecting
        assert controller.status == "Stopped." and "New" not in controller.assignments
        engines[0].words = []
        await controller.say("Anything?")
        assert controller.assignment.lines == []

    run(scenario)


def test_errors_become_the_status_and_the_app_goes_on():
    async def scenario(controller, engines):
        await controller.say("Hello?")
        assert controller.status == "Open a model first."
        await controller.unload()
        assert controller.status == "Open a model first."
        await controller.open("nowhere")
        assert "no model folder nowhere" in controller.status
        assert not controller.busy and not controller.ready
        await controller.open("model")
        await controller.select("Big", "An enormous task.")
        assert "900 MB" in controller.status and "Big" not in controller.assignments
        await controller.select("", "No name.")
        assert "needs a name" in controller.status
        await controller.say("   ")
        assert controller.assignment.lines == []
        await controller.say("Hello?")
        assert controller.status == "Answered."

    run(scenario)


def test_memory_is_watched_given_back_and_another_model_starts_afresh():
    async def scenario(controller, engines):
        watching = asyncio.create_task(controller.watch_memory(0.001))
        await controller.open("model")
        assert controller.memory == {"active": 1_000_000}
        await controller.select("Facts", "Know.")
        assert controller.memory == {"active": 2_000_000}
        assert controller.assignment.task.resident
        await controller.unload()
        assert controller.memory == {"active": 1_000_000}
        assert not controller.assignment.task.resident
        await controller.open("another")
        assert engines[0].closed and not engines[1].closed
        assert controller.assignment.task is None and controller.shares() == []
        watching.cancel()
        await controller.close()
        assert engines[1].closed and controller.memory == {}

    run(scenario)


def test_it_drives_a_real_engine(tmp_path):
    folder = write_folder(tmp_path / "tiny")

    async def scenario():
        controller = Controller()
        try:
            await controller.open(str(folder))
            controller.keep = 0.5
            await controller.select("French", "Translate.")
            await controller.say("Hello", max_tokens=4)
            assert len(controller.shares()) == 3
            assert controller.memory["active"] > 0
            answered = controller.assignment.lines
            await controller.unload()
            assert not controller.assignment.task.resident
            await controller.say("Again", max_tokens=4)
            return controller.status, answered
        finally:
            await controller.close()

    status, lines = asyncio.run(scenario())
    assert status in ("Answered.", "The answer has reached its greatest length.")
    with Engine.open(folder) as engine:
        engine.prepare("Translate.", name="French", keep=0.5)
        chat = engine.chat(task="French", max_tokens=4)
        expected = [chat.generate("Hello"), chat.generate("Again")]
    assert [line.text for line in lines if line.speaker == "French"] == expected


@pytest.fixture
def window(monkeypatch):
    """Run ``scenario(app, press)`` in an app of toga-dummy, and check what it shows."""
    if importlib.util.find_spec("toga_dummy") is None:
        pytest.skip("the handlers of the window are tested with toga-dummy")
    monkeypatch.setenv("TOGA_BACKEND", "toga_dummy")
    from ifp_chat.app import ChatApp

    def run_window(scenario):
        async def main():
            app = ChatApp("model", Controller(open_engine=FakeEngine))
            try:
                await until(lambda: "3 layers" in app.status.text)
                await scenario(app)
            finally:
                assert await app.on_exit(app)

        asyncio.run(main())

    return run_window


def shown(app):
    return [(row.task, row.kept, row.mb, row.where) for row in app.table.data]


def test_the_window_asks_and_shows_the_answer(window):
    async def scenario(app):
        assert app.model.value == "model"
        assert app.send_button.enabled and not app.stop_button.enabled
        assert shown(app)[1] == ("Code", "", "", "")
        app.table._impl.simulate_selection(1)
        await until(lambda: app.instruction.value == "Write a short Python function.")
        app.prompt.value = "Add."
        app.send_button._impl.simulate_press()
        await until(lambda: app.status.text == "Answered.")
        assert app.prompt.value == ""
        text = "You\nAdd.\n\nCode\nWell, yes.\n(2 tokens, 20.0 tokens/s; "
        assert app.transcript.value.startswith(text)
        assert shown(app)[1] == ("Code", "50%", "2", "memory")
        assert app.figures.text == "20.0 tokens/s   2 MB in use"
        app.restart_button._impl.simulate_press()
        await until(lambda: app.transcript.value == "")

    window(scenario)


def test_the_window_selects_for_a_task_of_ones_own_and_unloads(window):
    async def scenario(app):
        assert (app.keep.value, app.keep_label.text) == (75, "Keep auto")
        app.name.value, app.instruction.value = "Rhymes", "Rhyme."
        app.keep.value, app.tell.value = 50, True
        assert app.keep_label.text == "Keep 50 %"
        app.select_button._impl.simulate_press()
        await until(lambda: "Rhymes keeps 50%" in app.status.text)
        engine = app.controller._engine
        assert engine.prepared == {"Rhymes": ("Rhyme.", 0.5)}
        assert engine.chats[0].system == "Rhyme."
        assert shown(app)[-1] == ("Rhymes", "50%", "2", "memory")
        bars = [i for i in app.canvas._impl.draw_instructions if "rect" in str(i)]
        assert len(bars) >= 3 * L  # of each layer: all, kept, kept by all
        app.unload_button._impl.simulate_press()
        await until(lambda: shown(app)[-1] == ("Rhymes", "50%", "2", "disk"))

    window(scenario)


def test_the_window_stops_and_opens_another_model(window):
    async def scenario(app):
        engine = app.controller._engine
        engine.hold.clear()
        app.prompt.value = "Well?"
        app.prompt._impl.simulate_confirm()
        await until(lambda: app.status.text == "Answering ...")
        assert app.stop_button.enabled and not app.send_button.enabled
        app.prompt.value = "Meanwhile?"
        app.send_button._impl.simulate_press()
        app.stop_button._impl.simulate_press()
        engine.hold.set()
        await until(lambda: app.status.text == "Stopped.")
        assert app.prompt.value == "Meanwhile?" and app.transcript.value == ""
        app.model.value = "nowhere"
        app.open_button._impl.simulate_press()
        await until(lambda: "no model folder nowhere" in app.status.text)
        assert engine.closed and not app.send_button.enabled
        app.main_window._impl.dialog_responses["SelectFolderDialog"] = [Path("there")]
        app.folder_button._impl.simulate_press()
        await until(lambda: app.send_button.enabled)
        assert app.model.value == "there"

    window(scenario)


def take_screenshot(model, picture, timeout):
    if sys.platform != "linux" or importlib.util.find_spec("toga_qt") is None:
        pytest.skip("real widgets are tested on Linux, with pip install '.[app]'")
    qt = [sys.executable, "-c", "import PySide6.QtWidgets"]
    started = subprocess.run(qt, capture_output=True, text=True, check=False)
    if started.returncode:
        pytest.skip(f"Qt does not start here: {started.stderr.splitlines()[-1]}")
    done = subprocess.run(
        [sys.executable, APP / "screenshot.py", "--model", model, "--output", picture],
        env=os.environ | {"TOGA_BACKEND": "toga_qt", "QT_QPA_PLATFORM": "offscreen"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    return json.loads(done.stdout.splitlines()[-1])


def check_seen(seen):
    facts, code, *rest = seen["rows"]
    assert [facts[0], code[0]] == ["Facts", "Code"]
    assert {facts[1], code[1]} <= {"75%", "90%", "100%"}  # what auto tries
    assert all(row[1:] == ["", "", ""] for row in rest)
    assert "tokens/s" in seen["figures"] and "MB in use" in seen["figures"]
    assert seen["transcript"].startswith("You\nWrite a Python function")
    kept = [share for share, _ in seen["shares"]]
    assert kept == [width / seen["channels"] for width in seen["widths"]]


def test_it_runs_in_real_widgets(tmp_path):
    folder = write_folder(tmp_path / "tiny", intermediate_size=256)
    seen = take_screenshot(folder, tmp_path / "app.png", 120)
    check_seen(seen)


@pytest.mark.long
@pytest.mark.real
def test_it_answers_with_a_real_model_in_real_widgets(tmp_path):
    folder = ROOT / "models" / "smollm2"
    if not folder.is_dir():
        pytest.skip("SmolLM2 is fetched by make demo")
    seen = take_screenshot(folder, tmp_path / "app.png", 600)
    check_seen(seen)
    assert "def " in seen["transcript"] and "return" in seen["transcript"]


def test_the_briefcase_configuration_names_what_is_there():
    project = tomllib.loads((APP / "pyproject.toml").read_text())
    briefcase = project["tool"]["briefcase"]
    app = briefcase["app"]["ifp_chat"]
    assert [(APP / source / "__main__.py").is_file() for source in app["sources"]]
    mac = app["macOS"]
    assert mac["universal_build"] is False  # MLX has wheels for Apple silicon only
    assert float(mac["min_os_version"]) >= 14
    assert any("toga-cocoa" in line for line in mac["requires"])
    assert (APP / app["requires"][0] / "ifp_mlx").is_dir()
