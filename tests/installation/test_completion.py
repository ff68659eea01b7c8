"""Completion, tried in the shells themselves."""

import contextlib
import os
import shutil
import subprocess
import sys

import pytest
from conftest import run_command

from ifp_mlx.__main__ import available
from ifp_mlx.completion import PLACES
from ifp_mlx.completion import main as completion

pytest.importorskip("shtab")

# What bash does at the tabulator key, and what it would show.
TABULATOR = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_shtab_ifp_mlx
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """The script of every shell, in a file."""
    folder, files = tmp_path_factory.mktemp("scripts"), {}
    for shell in ("bash", "zsh", "fish"):
        files[shell] = folder / shell
        with files[shell].open("w") as out, contextlib.redirect_stdout(out):
            completion([shell])
    return files


@pytest.fixture
def bash(scripts, tmp_path):
    """Complete some words in a folder with a task; return what bash offers."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/french.safetensors").touch()

    def press(*words):
        run = ["bash", "--norc", "-c", TABULATOR, "bash", scripts["bash"], *words]
        done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        return set(done.stdout.split())

    return press


def test_bash_completes_commands_options_and_what_they_take(bash):
    assert bash("ifp_mlx", "") == {*available()}
    assert bash("ifp_mlx", "gen") == {"generate"}
    assert bash("ifp_mlx", "tasks", "m") == {"make", "merge"}
    assert bash("ifp_mlx", "chat", "--system") == {"--system-prompt"}
    assert bash("ifp_mlx", "chat", "--keep", "") == {"auto"}
    assert bash("ifp_mlx", "chat", "--selector", "p") == {"predictor", "prior"}
    assert bash("ifp_mlx", "chat", "--task", "") == {"french"}
    assert bash("ifp_mlx", "generate", "--model", "ta") == {"tasks"}
    assert bash("ifp_mlx", "completion", "") == {"bash", "zsh", "fish"}


def test_the_places_of_the_help_work_in_a_new_home(tmp_path):
    home = {**os.environ, "HOME": str(tmp_path)}
    command, places = "ifp_mlx() { echo $2; }", PLACES.split("\n\n")[0].splitlines()[1:]
    lines = [line.removeprefix(line[:6]).strip() for line in places]
    run = ["bash", "-ec", "\n".join([command, *lines])]
    done = subprocess.run(run, env=home, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    written = {
        file.read_text().strip() for file in tmp_path.rglob("*") if file.is_file()
    }
    assert written == {"bash", "zsh", "fish"}


def test_completing_starts_no_python(scripts):
    assert "python" not in scripts["bash"].read_text().lower()


def test_zsh_reads_the_script(scripts):
    if shutil.which("zsh") is None:
        pytest.skip("there is no zsh here")
    subprocess.run(["zsh", "-f", "-n", scripts["zsh"]], check=True)


def test_fish_completes(scripts, tmp_path):
    if shutil.which("fish") is None:
        pytest.skip("there is no fish here")
    code = f'source {scripts["fish"]}; complete -C "ifp_mlx gen"'
    run = ["fish", "--no-config", "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert done.stdout.split("\t")[0] == "generate" and done.stderr == ""


def test_without_shtab_one_sentence_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    status, out, err = run_command(completion, capsys, "bash")
    assert (status, out) == (2, "")
    assert err == (
        "ifp_mlx.completion: error: Completion needs shtab: pip install "
        "'ifp-mlx[completion]'.\n"
    )


def test_an_unknown_shell_is_refused(capsys):
    status, _, err = run_command(completion, capsys, "csh")
    assert status == 2 and "csh" in err and err.count("\n") == 1
