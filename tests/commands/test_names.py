"""Folders whose names look like patterns, or whose files lie elsewhere."""

import shutil

import pytest
from conftest import run_command

from ifp_mlx.channel_store import main as channel_store
from ifp_mlx.compact import main as compact
from ifp_mlx.convert.from_pytorch import main as convert
from ifp_mlx.generate import main as generate
from ifp_mlx.storage.folder import SHIPPED

ASKED = ("--prompt", "What is Germany called in French?", "-m", 4)
MAKERS = {
    "compact": (compact, "--model", "--instruction", "Hello", "--mlx-path"),
    "channel_store": (channel_store, "--model", "--output"),
    "convert": (convert, "--hf-path", "--mlx-path"),
}


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(SHIPPED, tmp_path / "model [4bit]")


def answer(capsys, folder):
    status, out, err = run_command(generate, capsys, "--model", folder, *ASKED)
    assert status == 0, err
    return out


@pytest.mark.parametrize("name", MAKERS)
def test_a_name_that_looks_like_a_pattern_is_a_name(name, folder, tmp_path, capsys):
    assert answer(capsys, folder) == answer(capsys, SHIPPED)
    maker, model, *more = MAKERS[name]
    answers = []
    for source, out in ((SHIPPED, "out"), (folder, "out [1]")):
        made = run_command(maker, capsys, model, source, *more, tmp_path / out)
        assert made[0] == 0, made[2]
        answers.append(answer(capsys, tmp_path / out))
    assert answers[0] == answers[1]


def test_a_folder_of_links_answers_as_the_folder_that_has_the_files(tmp_path, capsys):
    linked = tmp_path / "linked"
    for file in filter(lambda file: file.is_file(), SHIPPED.rglob("*")):
        link = linked / file.relative_to(SHIPPED)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    assert answer(capsys, linked) == answer(capsys, SHIPPED)
    said = run_command(
        compact,
        capsys,
        "--model",
        linked,
        "--instruction",
        "Hello",
        "--mlx-path",
        tmp_path / "out",
    )
    assert said[0] == 0, said[2]
    assert not any(file.is_symlink() for file in (tmp_path / "out").rglob("*"))
    assert answer(capsys, tmp_path / "out")
