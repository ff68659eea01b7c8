"""What each command does when nothing more can be written."""

import json

import pytest
from conftest import full_disk, run_command, write_folder

from ifp_mlx import load
from ifp_mlx.bundle import main as bundle
from ifp_mlx.channel_store import main as channel_store
from ifp_mlx.compact import main as compact
from ifp_mlx.convert.from_pytorch import main as convert
from ifp_mlx.generate import main as generate
from ifp_mlx.model.card import load_card
from ifp_mlx.model.decide import first_card
from ifp_mlx.sensitivity import main as sensitivity
from ifp_mlx.tasks import main as tasks

SAID = "cannot be written: "
INSTRUCTION = ("--instruction", "Hello", "--keep", 0.5)
WRITING = {
    "compact": (compact, "--model", *INSTRUCTION, "--mlx-path"),
    "bundle": (bundle, "--model", *INSTRUCTION, "--output"),
    "convert": (convert, "--hf-path", "--mlx-path"),
    "channel_store": (channel_store, "--model", "--output"),
    "tasks": (tasks, "--model", *INSTRUCTION, "--name", "new", "--tasks-folder"),
}


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """A folder that holds a model, and the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "disk/cache"))
    return write_folder(tmp_path / "disk/model").parent


def files_of(disk):
    return {path for path in disk.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", WRITING)
def test_a_command_says_that_its_output_does_not_fit(name, disk, capsys):
    command, model, *more = WRITING[name]
    verb = ["make"] if name == "tasks" else []
    before = files_of(disk)
    with full_disk():
        status, out, err = run_command(
            command, capsys, *verb, model, disk / "model", *more, disk / "out"
        )
    assert (status, out) == (2, "")
    assert f"{disk / 'out'}" in err.splitlines()[-1] and SAID in err.splitlines()[-1]
    assert files_of(disk) == before


def test_a_measurement_that_cannot_be_kept_is_said(disk, capsys):
    before = files_of(disk)
    with full_disk():
        status, _, err = run_command(sensitivity, capsys, "--model", disk / "model")
    assert status == 2 and f"sensitivity.safetensors {SAID}" in err.splitlines()[-1]
    assert files_of(disk) == before


@pytest.mark.parametrize(
    "options",
    [
        ("--selector", "prior", "--keep", 0.5),
        ("--keep", "auto"),
        ("--keep", 0.5, "--memory-gb", 1),
    ],
)
def test_an_answer_does_not_need_what_is_kept_for_the_next(options, disk, capsys):
    asked = ("--model", disk / "model", "--prompt", "Hello", "-m", 4, *options)
    before = files_of(disk)
    with full_disk():
        full = run_command(generate, capsys, *asked)
    assert files_of(disk) == before
    assert full[:2] == run_command(generate, capsys, *asked)[:2]
    assert full[0] == 0 and files_of(disk) > before


def test_an_answer_comes_before_a_mask_that_cannot_be_written(disk, capsys):
    mask = disk / "mask.safetensors"
    before = files_of(disk)
    with full_disk():
        status, out, err = run_command(
            generate, capsys, "--model", disk / "model", "--prompt", "Hello",
            "--keep", 0.5, "-m", 4, "--json", "--save-mask", mask,
        )  # fmt: skip
    assert status == 2 and f"{mask} {SAID}" in err.splitlines()[-1]
    assert json.loads(out.splitlines()[-1])["generation_tokens"] == 4
    assert files_of(disk) == before


def test_a_card_that_cannot_be_kept_is_used(disk):
    model, _ = load(disk / "model")
    before = files_of(disk)
    with full_disk():
        card = first_card(model)
    assert files_of(disk) == before
    assert model.card is card and load_card(load(disk / "model")[0]) is None
