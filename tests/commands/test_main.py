"""The console command."""

import ast
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from conftest import run_command

import ifp_mlx
from ifp_mlx.__main__ import GROUPS, MODULES, available, main


def test_version_and_help(capsys):
    assert run_command(main, capsys, "--version")[:2] == (
        0,
        f"ifp_mlx {ifp_mlx.__version__}\n",
    )
    for arguments in (["--help"], ["-h"], []):
        status, out, err = run_command(main, capsys, *arguments)
        assert (status, err) == (0, "")
        assert out.startswith("usage: ifp_mlx COMMAND")
        assert all(f"\n  {verb} " in out for verb in available())


def test_help_fits_a_terminal(capsys):
    _, out, _ = run_command(main, capsys, "--help")
    assert max(map(len, out.splitlines())) <= 80
    assert "\x1b" not in out


@pytest.mark.parametrize("verb", available())
def test_every_command_is_reached_and_shows_its_own_help(capsys, verb):
    status, out, err = run_command(main, capsys, verb, "--help")
    assert (status, err) == (0, "")
    assert out.startswith("usage: ")
    assert "COMMAND" not in out.splitlines()[0]


def test_help_groups_commands_by_what_a_person_wants_to_do(capsys):
    _, out, _ = run_command(main, capsys, "--help")
    listed, title = {}, ""
    for line in out.splitlines():
        if line.endswith(":"):
            title = line.removesuffix(":")
        elif line.startswith("  ") and not line.startswith("  -"):
            listed.setdefault(title, []).append(line.split()[0])
    assert listed == {title: [*group] for title, group in GROUPS.items()}


def test_only_what_is_there_is_listed(monkeypatch):
    assert {"chat", "compact", "server", "convert"} <= available().keys()
    monkeypatch.setitem(GROUPS, "nothing", {"nowhere": "not there", "far": "not there"})
    monkeypatch.setitem(MODULES, "far", "no_such_package.module")
    assert not {"nowhere", "far"} & available().keys()


def test_a_command_that_lacks_a_package_is_one_sentence(capsys, monkeypatch):
    def import_module(name):
        raise ModuleNotFoundError("No module named 'mlx'")

    monkeypatch.setattr("ifp_mlx.__main__.import_module", import_module)
    status, _, err = run_command(main, capsys, "plan")
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("ifp_mlx plan: error: ") and "ifp_mlx doctor says" in err


@pytest.mark.parametrize(
    ("word", "hint"),
    [("generat", "did you mean generate?"), ("xyzzy", "see ifp_mlx --help.")],
)
def test_a_mistyped_command_is_one_sentence(capsys, word, hint):
    status, out, err = run_command(main, capsys, word, "--model", "x")
    assert (status, out) == (2, "")
    assert err == f"ifp_mlx: error: there is no command '{word}'; {hint}\n"


def test_an_unknown_option_is_one_sentence(capsys):
    status, _, err = run_command(main, capsys, "--colour", "generate")
    assert status == 2 and "--colour" in err and err.count("\n") == 1


def test_arguments_go_on_to_the_command_unchanged(capsys):
    status, _, err = run_command(main, capsys, "compact", "--model", "/no/such")
    assert status == 2 and err.startswith("ifp_mlx.compact: error:")


def test_as_a_module_it_is_the_same_and_help_imports_neither_commands_nor_mlx():
    code = (
        "import sys, runpy; sys.argv = ['ifp_mlx', '--help']\n"
        "try: runpy.run_module('ifp_mlx', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(sorted(m for m in sys.modules if m.startswith('ifp_mlx.')), "
        "'mlx' in sys.modules, 'uvicorn' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"COLUMNS": "80"},
    )
    *_, last = done.stdout.splitlines()
    assert last.endswith("False False")
    loaded = set(ast.literal_eval(last.removesuffix(" False False")))
    assert not loaded & {*available().values()}
    assert find_spec("ifp_mlx.server")
