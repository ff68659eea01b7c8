"""Every way of training, by the command: what moves, what stays, and what is written."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from conftest import run_command, write_folder
from mlx.utils import tree_flatten

from ifp_mlx import load, plan, train
from ifp_mlx.training.recipe import TrainConfig

WORDS = ["alpha", "beta", "gamma", "delta"]
ROWS = [
    {"prompt": f"{verb} {word}", "completion": word[::-1], "task": verb}
    for word in WORDS
    for verb in ("turn", "flip", "swap")
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("model") / "tiny")


def write_rows(folder, rows):
    folder.mkdir(exist_ok=True)
    for name in ("train", "valid"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def run(model, tmp_path, capsys, *options, rows=ROWS, data=None):
    data = data or write_rows(tmp_path / "data", rows)
    status, out, err = run_command(
        train.main, capsys, "--model", model, "--data", data, "--output",
        tmp_path / "run", "--steps", 3, "--batch-size", 4, "--lr", 0.01, "--json",
        "--log-every", 1, "--watch", "off", "--no-compile", "--warm-steps", 4, *options,
    )  # fmt: skip
    assert status == 0, err
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    return json.loads(out), [json.loads(line) for line in lines]


def weights(folder):
    return dict(tree_flatten(load(folder)[0].dense().parameters()))


def changed(before, after):
    assert before.keys() == after.keys()
    return {name for name in after if not mx.array_equal(before[name], after[name])}


def test_full_training_moves_every_weight(model, tmp_path, capsys):
    report, _ = run(model, tmp_path, capsys)
    moved = changed(weights(model), weights(tmp_path / "run" / "model"))
    assert moved == weights(model).keys()
    assert report["sliced_error"] < 1e-5


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_move_the_linear_layers_they_are_put_on(model, tmp_path, capsys, kind):
    options = ("--train", kind, "--lora-layers", 1, "--lora-rank", 2)
    report, _ = run(model, tmp_path, capsys, *options)
    moved = changed(weights(model), weights(tmp_path / "run" / "model"))
    assert moved and all("layers.2." in name and "proj" in name for name in moved)
    assert report["sliced_error"] < 1e-5


def test_a_frozen_model_keeps_its_bits_and_the_predictor_learns(
    model, tmp_path, capsys
):
    report, lines = run(model, tmp_path, capsys, "--train", "frozen")
    assert not changed(weights(model), weights(tmp_path / "run" / "model"))
    steps = [line for line in lines if "loss" in line]
    assert all(line["llm_grad_norm"] == 0 for line in steps)
    assert all(line["masker_grad_norm"] > 0 for line in steps)
    assert report["sliced_error"] < 1e-5


def test_distillation_alone_comes_closer_to_the_parent(model, tmp_path, capsys):
    options = ("--kl-weight", 1, "--ce-weight", 0, "--steps", 12)
    options += ("--keep", 0.125, "--lr", 1e-3)
    _, lines = run(model, tmp_path, capsys, *options)
    kl = [line["kl"] for line in lines if "kl" in line]
    assert 0 < kl[-1] < 0.7 * kl[0]


def test_the_parent_itself_has_no_divergence(model, tmp_path, capsys):
    options = ("--kl-weight", 1, "--masker", "dense", "--steps", 1)
    _, lines = run(model, tmp_path, capsys, *options)
    assert [line["kl"] for line in lines if "kl" in line] == [
        pytest.approx(0, abs=1e-5)
    ]


def test_shared_channels_are_in_every_selection(model, tmp_path, capsys):
    options = ("--target-size", 32, "--shared", 16, "--granularity", 8)
    run(model, tmp_path, capsys, *options)
    trained, _ = load(tmp_path / "run" / "model")
    texts = [f"{verb} {word}" for verb in ("turn", "swap", "paint") for word in WORDS]
    kept = np.stack([np.array(trained.select(text).mask()) > 0 for text in texts])
    assert trained.ifp.shared == 16
    assert (kept.all(axis=0).sum(axis=-1) >= 16).all()
    blocks = kept.reshape(*kept.shape[:2], -1, 8)
    assert (blocks.all(axis=-1) == blocks.any(axis=-1)).all()


def test_annealing_begins_dense_and_warm_and_ends_at_the_budget():
    config = TrainConfig(
        keep=0.25, anneal_keep=8, anneal_temperature=8, temperature=0.1
    )
    first, last = config.budget(64, 0), config.budget(64, 8)
    assert (first.k, last.k) == (64, 16)
    assert (first.temperature, last.temperature) == (1.0, pytest.approx(0.1))
    ks = [config.budget(64, step).k for step in range(9)]
    assert ks == sorted(ks, reverse=True)


def test_every_fourth_step_keeps_the_largest_share_and_every_fourth_one_between():
    config = TrainConfig(keep=0.25, largest_keep=1, seed=3)
    ks = [config.budget(64, step).k for step in range(400)]
    assert set(ks[::2]) == {16} and config.budget(64).k == 16
    assert set(ks[1::4]) == {64}
    assert set(ks[3::4]) == {16 + 3 * n for n in range(1, 16)}
    assert ks == [config.budget(64, step).k for step in range(400)]
    blocks = replace(config, granularity=8, largest_keep=0.75)
    found = [blocks.budget(64, step).k for step in range(400)]
    assert set(found) == {16, 24, 32, 40, 48} and set(found[1::4]) == {48}
    with pytest.raises(
        ValueError, match="largest_keep=0.1 must not be below keep=0.25"
    ):
        replace(config, model="m", data="d", output="o", largest_keep=0.1).check()
    with pytest.raises(ValueError, match="leave it out with masker: dense"):
        replace(config, model="m", data="d", output="o", masker="dense").check()


def test_a_run_for_several_shares_is_made(model, tmp_path, capsys):
    options = ("--largest-keep", 1, "--target-size", 32)
    report, _ = run(model, tmp_path, capsys, *options)
    assert load(tmp_path / "run" / "model")[0].ifp.target_size == 32
    assert report["sliced_error"] < 1e-5


def test_an_annealed_run_is_made(model, tmp_path, capsys):
    options = ("--anneal-keep", 3, "--anneal-temperature", 3, "--target-size", 32)
    report, _ = run(model, tmp_path, capsys, *options)
    assert load(tmp_path / "run" / "model")[0].ifp.target_size == 32
    assert report["sliced_error"] < 1e-5


def test_text_is_learned_chunk_by_chunk(model, tmp_path, capsys):
    rows = [{"text": f"{n} " + " ".join(WORDS) * 2} for n in range(8)]
    options = ("--stage", "pretrain", "--chunk", 16)
    report, _ = run(model, tmp_path, capsys, *options, rows=rows)
    assert report["targets"] > 0 and report["sliced_error"] < 1e-5


def test_a_hub_data_set_is_read_by_its_id(model, tmp_path, capsys, monkeypatch):
    parts = {"train": ROWS, "validation": ROWS[:4]}
    stand_in = SimpleNamespace(load_dataset=lambda name: {"org/set": parts}[name])
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    report, _ = run(model, tmp_path, capsys, data="org/set")
    assert report["steps"] == 3


def test_a_card_says_how_the_model_was_made_and_how_good_it_is(model, tmp_path, capsys):
    report, _ = run(model, tmp_path, capsys, "--keep", 0.25)
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "16 of 64" in card and "Stage sft, 3 steps of 4" in card
    assert f"{report['valid_loss']:.3f}" in card and str(tmp_path) not in card
    kept = json.loads((tmp_path / "run" / "report.json").read_text())
    assert kept["multiplications"] == report["multiplications"]


def test_a_plan_says_what_a_run_takes_before_it_is_made(model, tmp_path, capsys):
    data = write_rows(tmp_path / "data", ROWS)
    config = tmp_path / "run.yaml"
    settings = {"model": str(model), "data": str(data), "output": str(tmp_path / "run")}
    settings |= {"steps": 3, "batch_size": 4, "lr": 0.01, "log_every": 1}
    settings["warm_steps"] = 4
    config.write_text(json.dumps(settings))
    found = {}
    for way in ("full", "frozen"):
        config.write_text(json.dumps(settings | {"train": way}))
        status, out, err = run_command(
            plan.main, capsys, "--train", config, "--device", "m4", "--json"
        )
        assert status == 0, err
        found[way] = json.loads(out.splitlines()[-1])
    assert found["frozen"]["memory_bytes"] < found["full"]["memory_bytes"]
    assert found["frozen"]["multiplications"] < found["full"]["multiplications"]
    assert found["full"]["seconds"] > 0 and not (tmp_path / "run").exists()
    report, _ = run(model, tmp_path, capsys, data=data)
    total = sum(report["multiplications"].values())
    assert total == pytest.approx(found["full"]["multiplications"])
    given = ("--train", config, "--memory-gb", 1e-6)
    assert run_command(plan.main, capsys, *given)[0] == 1


def test_float16_is_refused_for_its_reason(model, tmp_path, capsys):
    data = write_rows(tmp_path / "data", ROWS)
    given = ("--model", model, "--data", data, "--output", tmp_path / "run")
    given += ("--warm-steps", 0, "--dtype", "float16")
    status, _, err = run_command(train.main, capsys, *given)
    assert status == 2 and "squares of gradients" in err and "bfloat16" in err


@pytest.mark.parametrize(
    ("option", "value"),
    [("target-size", 0), ("warm-start", -1), ("eval-batches", -1), ("warmup", -5),
     ("lr", 1e6), ("lr", "inf"), ("masker-lr", "nan"), ("keep", 1.5)],
)  # fmt: skip
def test_a_number_that_makes_no_sense_is_named(option, value, tmp_path, capsys):
    given = ("--model", "m", "--data", "d", "--output", tmp_path / "run")
    status, _, err = run_command(train.main, capsys, *given, f"--{option}={value}")
    name = option.replace("-", "_")
    assert status == 2 and f"{name}=" in err and "must be" in err
    assert err.count("\n") == 1


def test_a_part_of_a_step_is_no_number_of_steps(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("steps: 2.7")
    status, _, err = run_command(train.main, capsys, "--config", tmp_path / "c.yaml")
    assert status == 2 and "steps=2.7 must be of type int" in err


def test_one_row_is_data_too_and_a_byte_order_mark_is_no_text(model, tmp_path, capsys):
    data = write_rows(tmp_path / "data", ROWS[:1])
    for file in data.glob("*.jsonl"):
        file.write_text(file.read_text(), encoding="utf-8-sig")
    given = ("--model", model, "--data", data, "--output", tmp_path / "run")
    given += ("--steps", 1, "--batch-size", 1, "--no-compile", "--watch", "off")
    status, _, err = run_command(train.main, capsys, *given)
    assert status == 0 and "explains 0%" in err


def test_alpacas_rows_are_read(model, tmp_path, capsys):
    rows = [{"instruction": f"Turn {w}.", "input": w, "output": w[::-1]} for w in WORDS]
    report, _ = run(model, tmp_path, capsys, rows=rows)
    assert report["targets"] > 0
