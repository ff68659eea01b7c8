"""The prompt that a line is edited at."""

import os
import sys

import pytest

from ifp_mlx.terminal import reading
from ifp_mlx.terminal.reading import reader_of

pytest.importorskip("prompt_toolkit")

from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from ifp_mlx.terminal.editing import CommandCompleter, editor_of


class Named:
    name = "tiny"


class Talk:
    """What the editor asks of a conversation."""

    engine, source, status = Named(), None, ""

    def tasks(self):
        return ["french", "german"]


@pytest.fixture
def typed():
    """Return what an editor returns for some keys, line by line."""
    with create_pipe_input() as keys:
        read = editor_of(Talk(), "> ", input=keys, output=DummyOutput())

        def press(text):
            keys.send_text(text)
            return read()

        yield press


def completions(text):
    found = CommandCompleter(Talk()).get_completions(Document(text), None)
    return [text[: len(text) + one.start_position] + one.text for one in found]


def test_commands_tasks_and_shares_are_completed():
    assert completions("/s") == ["/select", "/system", "/save", "/stats"]
    assert completions("/task ") == ["/task french", "/task german", "/task off"]
    assert completions("/task g") == ["/task german"]
    assert completions("/keep a") == ["/keep auto"]
    assert completions("a message") == completions("and /s") == []


def test_files_are_completed(tmp_path):
    (tmp_path / "talk.json").touch()
    found = CommandCompleter(Talk()).get_completions(
        Document(f"/save {tmp_path}/ta"), None
    )
    assert [one.text for one in found] == ["lk.json"]


def test_a_line_is_edited_and_history_comes_back(typed):
    assert typed("helo\x1b[Dl\x1b[C!\r") == "hello!"
    assert typed("\x1b[A\x7f?\r") == "hello?"


def test_alt_enter_begins_another_line(typed):
    assert typed("one\x1b\rtwo\r") == "one\ntwo"


def test_ctrl_d_ends_and_ctrl_c_takes_the_line_back(typed):
    with pytest.raises(KeyboardInterrupt):
        typed("half a li\x03")
    with pytest.raises(EOFError):
        typed("\x04")


def test_history_is_kept_where_it_is_asked_for_and_only_its_owner_reads_it(tmp_path):
    file = tmp_path / "new/history"
    with create_pipe_input() as keys:
        read = editor_of(Talk(), "> ", file, input=keys, output=DummyOutput())
        keys.send_text("hello\r")
        assert read() == "hello"
    assert "hello" in file.read_text() and file.stat().st_mode & 0o777 == 0o600
    with create_pipe_input() as keys:
        read = editor_of(Talk(), "> ", file, input=keys, output=DummyOutput())
        keys.send_text("\x1b[A\r")
        assert read() == "hello"


def test_a_history_that_cannot_be_written_is_refused():
    with pytest.raises(OSError, match="/proc/no/history cannot be written"):
        editor_of(Talk(), "> ", reading.Path("/proc/no/history"))


def test_without_the_editor_one_sentence_says_how_to_get_it(monkeypatch, capsys):
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(reading, "find_spec", lambda name: None)
    monkeypatch.setattr("builtins.input", lambda prompt: f"after {prompt}")
    reader = reader_of(Talk())
    assert (reader.read(), reader.typed) == ("after > ", True)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "pip install 'ifp-mlx[chat]'" in err


def test_a_pipe_needs_no_editor(monkeypatch):
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    ends = os.pipe()
    with os.fdopen(ends[0]) as pipe, os.fdopen(ends[1], "w") as said:
        said.write("one\ntwo")
        said.close()
        monkeypatch.setattr(sys, "stdin", pipe)
        reader = reader_of(Talk())
        assert [reader.read(), reader.read(), reader.typed] == ["one", "two", False]
        with pytest.raises(EOFError):
            reader.read()
