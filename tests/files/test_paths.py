"""Paths and caches of users, known and unknown."""

from pathlib import Path

import pytest
from conftest import run_command

from ifp_mlx.files.caches import cache_place
from ifp_mlx.files.paths import path_of
from ifp_mlx.generate import main


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
