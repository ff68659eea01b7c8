"""What a model says is no order to a terminal."""

import io
import sys

import pytest
from conftest import run_command, write_folder
from hypothesis import given
from hypothesis import strategies as st

from ifp_mlx import cli
from ifp_mlx.generate import main as generate
from ifp_mlx.terminal.visible import visible


class Terminal(io.StringIO):
    def isatty(self):
        return True


@given(st.text())
def test_no_control_character_is_left_but_line_ends_and_tabs(text):
    codes = {*map(ord, visible(text))}
    assert not codes & ({*range(32), 127, *range(128, 160)} - {9, 10})


def test_letters_of_all_scripts_stay_and_orders_are_spelled_out():
    assert visible("Añö 語 🙂\n\tשלום") == "Añö 語 🙂\n\tשלום"
    assert visible("\x1b]0;title\x07 \x9b2J\r\n") == "^[]0;title^G \\x9b2J\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("bytes") / "tiny")


def test_generate_shows_a_terminal_no_orders_and_a_pipe_the_text_as_it_is(
    folder, monkeypatch, capsys
):
    # A random model whose tokens are bytes says all of them.
    asked = ("--model", folder, "--keep", "0.5", "-p", "Hi", "--temp", "9", "-m", "60")
    _, raw, _ = run_command(generate, capsys, *asked)
    assert {*raw} & {*map(chr, range(32))} - {"\n", "\t"}
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    generate([*map(str, asked)])
    assert terminal.getvalue() == visible(raw) and sys.stdout is terminal


def test_an_error_that_quotes_a_file_is_visible(capsys):
    def command():
        raise ValueError("model_type \x1b[2J is unknown.")

    with pytest.raises(SystemExit):
        cli.run(command, "verb")
    assert capsys.readouterr().err == "verb: error: model_type ^[[2J is unknown.\n"
