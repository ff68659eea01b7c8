"""Paths and caches of users, known and unknown."""

from argparse import Namespace
from importlib import import_module
from pathlib import Path

import pytest
from conftest import run_command

from ifp_mlx import cli
from ifp_mlx.__main__ import available
from ifp_mlx.compact import main as compact
from ifp_mlx.files.caches import cache_place
from ifp_mlx.files.paths import named_path, path_of
from ifp_mlx.generate import main
from ifp_mlx.installation.completion import _actions
from ifp_mlx.model.checkpoint import open_model
from ifp_mlx.selection.masks import Selection
from ifp_mlx.storage.folder import SHIPPED
from ifp_mlx.training.recipe import TrainConfig

# Options that say where something is written; a shell leaves the ~ of --output=~/a.
WRITTEN = {"output", "mlx_path", "save_mask", "plot", "png_folder", "history"}
WRITTEN |= {"cache_folder", "tasks_folder"}


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/users/me")
    assert path_of("~/a") == Path("/users/me/a")
    assert path_of("a~") == Path("a~")


def test_a_user_whom_nobody_knows_is_one_sentence(capsys):
    given = ("--model", "~nobody-knows/model", "-p", "Hi")
    status, _, err = run_command(main, capsys, *given)
    assert status == 2 and "begins with ~nobody-knows" in err and err.count("\n") == 1


def test_without_a_home_nothing_is_kept(monkeypatch):
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(OSError, match="Not a directory"):
        cache_place("compact").mkdir(parents=True)


@pytest.mark.parametrize("command", sorted(available().keys() - {"train"}))
def test_a_command_takes_a_tilde_wherever_it_writes(command):
    parser = import_module(available()[command]).build_parser()
    writing = [action for action in _actions(parser) if action.dest in WRITTEN]
    assert all(action.type is named_path for action in writing)
    assert not [action.dest for action in _actions(parser) if action.type is Path]


def test_what_is_written_under_a_tilde_is_in_the_home_folder(
    monkeypatch, tmp_path, capsys
):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir(), here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    asked = ("--instruction", "What is Norway called in Polish?", "--mlx-path=~/small")
    status, out, _ = run_command(compact, capsys, *asked)
    assert status == 0 and out.strip() == str(home / "small")
    assert (home / "small/config.json").exists() and not list(here.iterdir())
    mask = Selection.load("~/small/ifp.mask")
    assert mask.origin.instruction == asked[1]


def test_a_run_and_its_settings_may_be_under_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/users/me")
    assert TrainConfig(output="~/run").folder == Path("/users/me/run")


def test_the_tasks_of_a_model_under_a_tilde_are_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m/tasks").mkdir(parents=True)
    asked = Namespace(tasks_folder=None, model="~/m")
    assert cli.library_folder(asked) == tmp_path / "m/tasks"


def test_a_model_under_a_tilde_has_its_folders_name(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").symlink_to(SHIPPED)
    assert open_model("~/mine").name == open_model(tmp_path / "mine").name
