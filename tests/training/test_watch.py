"""The naive recipe collapses to one mask, and the watcher says so; a warm start does not."""

import json

import pytest
from conftest import run_command, write_folder

from ifp_mlx import train

VERBS = ("turn", "flip", "swap", "sort")
WORDS = ("alpha", "beta", "gamma", "delta", "omega", "kappa")
NAIVE = ("--predictor", "new", "--pooling", "last", "--warm-start", 0)
NAIVE += ("--masker-lr", 0.01)


@pytest.fixture
def data(tmp_path):
    answers = {"turn": lambda w: w[::-1], "flip": str.upper, "swap": str.title}
    rows = [
        {"prompt": f"{v} {w}", "completion": answers.get(v, sorted)(w), "task": v}
        for v in VERBS
        for w in WORDS
    ]
    rows = [row | {"completion": "".join(row["completion"])} for row in rows]
    for name in ("train", "valid"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    write_folder(tmp_path / "model")
    return tmp_path


def train_on(data, capsys, *options):
    return run_command(
        train.main, capsys, "--model", data / "model", "--data", data, "--output",
        data / "run", "--steps", 30, "--batch-size", 8, "--lr", 0.01, "--keep", 0.25,
        "--eval-every", 10, "--log-every", 10, "--no-compile", *options,
    )  # fmt: skip


def validations(data):
    lines = (data / "run" / "log.jsonl").read_text().splitlines()
    return [found for line in lines if "overlap_between" in (found := json.loads(line))]


def test_the_naive_recipe_collapses_and_is_stopped(data, capsys):
    status, out, err = train_on(data, capsys, *NAIVE)
    assert status == 2
    assert "The masks no longer depend on the instruction" in err
    first, *_, last = [line["overlap_between"] for line in validations(data)]
    assert first < 0.8 and last > 0.99
    assert not (data / "run" / "model").exists()
    assert any((data / "run" / "checkpoints").iterdir())


def test_a_warm_start_keeps_masks_apart(data, capsys):
    options = ("--warm-steps", 100, "--warm-lr", 3e-3)  # a third, three times as long
    status, _, err = train_on(data, capsys, "--scores", "centred", *options)
    assert status == 0, err
    last = validations(data)[-1]
    assert last["overlap_between"] < min(0.75, last["overlap_within"] - 0.1)
