"""The method's two stages: one goes on from the other, and each from where it was cut."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import run_command, write_folder
from mlx.utils import tree_flatten
from test_train import bare

from ifp_mlx import load, train
from ifp_mlx.selection.predictor import SparsityPredictor
from ifp_mlx.training.batches import Batch, collate
from ifp_mlx.training.maskers import Budget, PredictorMasker
from ifp_mlx.training.records import Reader
from ifp_mlx.training.step import Pair

WORDS = ["alpha", "beta", "gamma", "delta", "omega", "kappa"]
ROWS = [
    {"prompt": f"{verb} {word}", "completion": word[::-1], "task": verb}
    for word in WORDS
    for verb in ("turn", "flip", "swap")
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, and data for both stages."""
    folder = tmp_path_factory.mktemp("stages")
    write_folder(folder / "tiny")
    texts = [{"text": f"{n} " + " ".join(WORDS)} for n in range(12)]
    for name, rows in (("texts", texts), ("rows", ROWS)):
        (folder / name).mkdir()
        for split in ("train", "valid"):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / name / f"{split}.jsonl").write_text(text)
    return folder


def arguments(place, model, data, output, *options):
    given = ("--model", model, "--data", place / data, "--output", output)
    given += ("--steps", 4, "--batch-size", 4, "--lr", 0.01, "--log-every", 1)
    given += ("--watch", "off", "--no-compile", "--warm-steps", 4, "--chunk", 16)
    given += options
    return [str(part) for part in given]


def run(place, capsys, *given):
    status, out, err = run_command(
        train.main, capsys, *arguments(place, *given), "--json"
    )
    assert status == 0, err
    return json.loads(out), err


def log_of(folder):
    lines = (folder / "log.jsonl").read_text().splitlines()
    return bare([json.loads(line) for line in lines])


@pytest.fixture(scope="module")
def first(place):
    """A run of the first stage, with settings that are not the defaults."""
    options = ("--stage", "pretrain", "--target-size", 24, "--temperature", 0.4)
    given = arguments(place, place / "tiny", "texts", place / "first", *options)
    train.main(given)
    return place / "first"


def weights(folder):
    return dict(tree_flatten(load(folder)[0].dense().parameters()))


def head(folder):
    predictor = SparsityPredictor.load(folder / "predictor")
    return dict(tree_flatten(predictor.parameters()))


def test_the_second_stage_begins_where_the_first_ended(place, first, tmp_path, capsys):
    options = ("--stage", "pretrain", "--steps", 1, "--lr", 1e-9)
    _, err = run(place, capsys, first / "model", "texts", tmp_path / "again", *options)
    ended, begun = log_of(first)[-1], log_of(tmp_path / "again")[0]
    assert ended["valid_loss"] == pytest.approx(begun["valid_loss"], abs=1e-6)
    assert ended["overlap_between"] == begun["overlap_between"]
    assert "The predictor goes on from" in err
    # Nothing was asked for again: sizes and gates are the first stage's.
    report, _ = run(place, capsys, first / "model", "rows", tmp_path / "second")
    ifp = load(tmp_path / "second" / "model")[0].ifp
    assert (ifp.target_size, ifp.temperature, ifp.gates) == (24, 0.4, "soft")
    assert report["sliced_error"] < 1e-5


def test_backbone_and_head_are_carried_over_bit_for_bit(place, first, tmp_path, capsys):
    options = ("--lr", 1e-30, "--masker-lr", 1e-30, "--weight-decay", 0, "--steps", 1)
    run(place, capsys, first / "model", "rows", tmp_path / "second", *options)
    for of in (weights, head):
        before, after = of(first / "model"), of(tmp_path / "second" / "model")
        assert before.keys() == after.keys()
        assert all(mx.array_equal(before[name], after[name]) for name in after)


def test_a_trained_predictor_can_be_given_by_its_folder(place, first, tmp_path, capsys):
    given = ("--predictor", first / "model" / "predictor", "--train", "frozen")
    _, err = run(place, capsys, place / "tiny", "rows", tmp_path / "run", *given)
    assert f"goes on from {first / 'model' / 'predictor'}" in err
    _, err = run(
        place, capsys, first / "model", "rows", tmp_path / "new",
        "--predictor", "first-layers",
    )  # fmt: skip
    assert "goes on from" not in err and "Warm start" in err


@pytest.mark.long  # three processes that each import everything
@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_a_killed_stage_goes_on_bit_for_bit(stage, place, first, tmp_path):
    model, data = (
        (place / "tiny", "texts") if stage == "pretrain" else (first / "model", "rows")
    )
    options = ("--stage", stage, "--save-every", 3, "--steps", 30, "--eval-every", 100)

    def command(name):
        given = arguments(place, model, data, tmp_path / name, *options)
        return [sys.executable, "-m", "ifp_mlx.train", *given]

    subprocess.run(command("whole"), check=True, stderr=subprocess.DEVNULL)
    cut = subprocess.Popen(command("cut"), stderr=subprocess.DEVNULL)
    log = tmp_path / "cut" / "log.jsonl"
    while cut.poll() is None and not (
        log.exists() and log.read_text().count("\n") > 10
    ):
        time.sleep(0.01)
    os.kill(cut.pid, signal.SIGKILL)
    cut.wait()
    assert not (tmp_path / "cut" / "model").exists()
    subprocess.run(command("cut"), check=True, stderr=subprocess.DEVNULL)
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
    for file in ("model.safetensors", "predictor/head.safetensors"):
        files = [tmp_path / name / "model" / file for name in ("cut", "whole")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_finished_run_goes_on_when_more_steps_are_asked_for(place, tmp_path, capsys):
    given = (place, capsys, place / "tiny", "rows", tmp_path / "run")
    run(*given)
    before = weights(tmp_path / "run" / "model")
    status, _, err = run_command(train.main, capsys, *arguments(*given[:1], *given[2:]))
    assert status == 2 and "is finished: it made 4 steps; give more steps" in err
    _, err = run(*given, "--steps", 6)
    assert "The run goes on after 4 steps" in err
    assert [line["step"] for line in log_of(tmp_path / "run")][-1] == 6
    aside = weights(tmp_path / "run" / "model-4")
    assert all(mx.array_equal(before[name], aside[name]) for name in before)
    after = weights(tmp_path / "run" / "model")
    assert any(not mx.array_equal(before[name], after[name]) for name in before)
    options = ("--steps", 9, "--keep", 0.25)
    status, _, err = run_command(
        train.main, capsys, *arguments(*given[:1], *given[2:], *options)
    )
    assert status == 2 and "keep" in err and (tmp_path / "run" / "model").exists()


@pytest.fixture
def reader(place):
    tokenizer = load(place / "tiny")[1]
    return Reader(tokenizer, "pretrain", chunk=8, max_length=32, chunk_masks="each")


def test_a_text_of_several_chunks_is_one_example_and_each_chunk_is_learned_once(reader):
    text = "".join(chr(97 + i % 26) for i in range(75))
    tokens = list(reader.tokenizer.encode(text))
    learned = []
    for record in reader.records({"text": text}):
        chunks = [record.tokens[i : i + 8] for i in range(0, len(record.tokens), 8)]
        assert len(record.instruction) == len(chunks) - 1 <= 3
        for place, number in enumerate(record.selectors):
            expected = chunks[max(0, place // 8 - 1)]
            assert np.array_equal(record.instruction[number], expected)
        assert not record.loss[:8].any() and record.loss[8:].all()
        learned += list(record.tokens[record.loss])
    assert learned == tokens[8:]


def test_two_chunks_are_learned_alike_either_way(place, first, reader):
    model, _ = load(first / "model")
    records = list(reader.records({"text": "abcdefgh12345678"[:16]}))
    each = collate(records)
    one = each._replace(
        instruction=each.instruction[:, 0], lengths=each.lengths[:, 0], selectors=None
    )
    pair = Pair(model.dense(), PredictorMasker(model.predictor))
    budget = Budget(24, 0.4)
    found = [pair.logits(batch, budget, None) for batch in (each, one)]
    assert np.allclose(*map(np.array, found), atol=1e-5)


def test_every_chunk_is_under_the_mask_of_the_one_before(place, first, reader):
    model, _ = load(first / "model")
    pair = Pair(model.dense(), PredictorMasker(model.predictor))
    rows = ("abcdefgh12345678ijklmnop", "12345678abcdefgh")
    batch = collate([r for text in rows for r in reader.records({"text": text})])
    masks = pair.masker(batch, Budget(24, 0.4))
    tokens = batch.instruction[0, 1:2]
    alone = pair.masker(
        Batch(tokens, batch.lengths[0, 1:2], batch.tokens, batch.loss_mask),
        Budget(24, 0.4),
    )
    # What predicts the third chunk's first token stands at the end of the second.
    assert np.allclose(masks[:, 0, 15], alone[:, 0, 0], atol=1e-6)
    assert not np.allclose(masks[:, 0, 14], alone[:, 0, 0], atol=1e-3)
    assert masks.shape[2] == batch.tokens.shape[1] - 1


def test_pretraining_with_each_chunks_mask_trains_and_slices(place, tmp_path, capsys):
    options = ("--stage", "pretrain", "--chunk-masks", "each", "--chunk", 8)
    options += ("--grad-checkpoint",)
    report, _ = run(place, capsys, place / "tiny", "texts", tmp_path / "run", *options)
    assert report["sliced_error"] < 1e-5 and report["masker_grad_norm"] > 0
    assert Path(report["output"]).is_dir()
