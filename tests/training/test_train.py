"""Gradients that arrive, runs that go on as if never stopped, and collapse that shows."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from conftest import relative_error, run_command, tiny_model, write_folder
from mlx.utils import tree_flatten

from ifp_mlx import train as train_module
from ifp_mlx.selection.predictor import SparsityPredictor
from ifp_mlx.training.batches import Batch
from ifp_mlx.training.maskers import PredictorMasker, checkpoint_layers
from ifp_mlx.training.recipe import TrainConfig
from ifp_mlx.training.run import train
from ifp_mlx.training.step import Pair, Step
from ifp_mlx.training.watch import CollapsedError, Watcher


def batch(seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(0, 250, (4, n)).astype(np.int32) for n in (6, 12)]
    return Batch(
        mx.array(tokens[0]),
        mx.array([6, 5, 4, 6]),
        mx.array(tokens[1]),
        mx.ones((4, 12)),
    )


def masker() -> PredictorMasker:
    backbone = tiny_model("llama", 1, num_hidden_layers=1)
    predictor = SparsityPredictor(backbone, 3, 64, 8)
    rng = np.random.default_rng(3)
    flat = tree_flatten(predictor.parameters())
    predictor.load_weights(
        [(n, mx.array(rng.normal(0, 0.3, v.shape).astype(np.float32))) for n, v in flat]
    )
    return PredictorMasker(predictor)


def gradient(*, compiled: bool, checkpointed: bool, gates: str) -> dict[str, mx.array]:
    model = tiny_model("llama")
    pair = Pair(model, masker())
    assert len(pair.inlets) == 3  # masked before anything looks at the structure
    if checkpointed:
        checkpoint_layers(model)
    step = Step(pair, TrainConfig(), compiled=compiled)
    arrays = list(batch())
    _, grads = step._backward(arrays, None, None, 32, mx.array(0.3), gates, 1)
    return dict(tree_flatten(grads))


@pytest.mark.parametrize("gates", ["soft", "binary"])
def test_the_predictor_gets_the_same_gradient_plain_and_checkpointed(gates):
    plain = gradient(compiled=False, checkpointed=False, gates=gates)
    again = gradient(compiled=False, checkpointed=True, gates=gates)
    name = "masker.predictor.reduce.weight"
    assert float(mx.abs(plain[name]).max()) > 0
    assert relative_error(again[name], plain[name]) < 1e-5


def weights(pair: Pair) -> dict[str, mx.array]:
    return dict(tree_flatten(pair.parameters()))


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    config = TrainConfig(steps=6, lr=1e-2, save_every=2, log_every=1, compile=False)
    whole, mask = tiny_model("llama"), masker()
    lines = train(whole, mask, batch, config, folder=tmp_path / "whole")

    def interrupted(number: int) -> Batch:
        if number == 5:
            raise KeyboardInterrupt
        return batch(number)

    with pytest.raises(KeyboardInterrupt):
        train(
            tiny_model("llama"), masker(), interrupted, config, folder=tmp_path / "cut"
        )
    model, own = tiny_model("llama", 9), masker()  # not even the same start
    again = train(model, own, batch, config, folder=tmp_path / "cut")
    assert bare(again) == bare(lines)
    expected = weights(Pair(whole, mask))
    for name, value in weights(Pair(model, own)).items():
        assert mx.array_equal(value, expected[name]), name


def test_a_corrupt_checkpoint_is_refused_and_the_one_before_used(tmp_path, capsys):
    config = TrainConfig(steps=4, save_every=2, log_every=1, compile=False)
    lines = train(tiny_model("llama"), masker(), batch, config, folder=tmp_path)
    folder = tmp_path / "checkpoints"
    (whole,) = folder.iterdir()  # one is kept
    newest = folder / "step-00000005" / "state.safetensors"
    shutil.copytree(whole, newest.parent)
    damaged = bytearray(newest.read_bytes())
    damaged[-1] ^= 255
    newest.write_bytes(damaged)
    again = train(tiny_model("llama"), masker(), batch, config, folder=tmp_path)
    assert "checksum" in capsys.readouterr().err
    assert again == lines


def bare(lines):
    """Return a log without how long things took."""
    pace = {"seconds_per_step", "tokens_per_second"}
    return [{k: v for k, v in line.items() if k not in pace} for line in lines]


def test_accumulation_is_the_same_step_as_one_batch():
    whole = batch()
    halves = [whole.share(0, 2), whole.share(1, 2)]
    settings = {"steps": 3, "log_every": 1, "compile": False}
    once = train(
        tiny_model("llama"), masker(), lambda i: whole, TrainConfig(**settings)
    )
    twice = train(
        tiny_model("llama"),
        masker(),
        lambda i: halves[i % 2],
        TrainConfig(accumulate=2, **settings),
    )
    for a, b in zip(once, twice, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_the_watcher_stops_masks_that_are_the_same_for_all():
    watcher = Watcher()
    healthy = {"overlap_chance": 0.25, "overlap_between": 0.3, "dependence": 0.93}
    same = {"overlap_chance": 0.25, "overlap_between": 0.99, "dependence": 0.01}
    watcher(same)
    watcher(healthy)
    watcher(same)
    with pytest.raises(CollapsedError, match=r"0\.990"):
        watcher(same)


def test_the_command_writes_a_checkpoint_that_slices_as_it_was_masked(tmp_path, capsys):
    words = ["alpha", "beta", "gamma", "delta"]
    rows = [
        {"prompt": f"{verb} {word}", "completion": word[::-1], "task": verb}
        for word in words
        for verb in ("turn", "flip", "swap")
    ]
    for name in ("train", "valid"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    model = write_folder(tmp_path / "tiny")
    status, out, err = run_command(
        train_module.main, capsys, "--model", model, "--data", tmp_path,
        "--output", tmp_path / "run", "--steps", 2, "--batch-size", 4, "--json",
        "--watch", "off", "--no-compile", "--warm-steps", 4,
    )  # fmt: skip
    assert status == 0, err
    report = json.loads(out)
    assert report["sliced_error"] < 1e-5
    assert report["loss_soft"] == pytest.approx(report["valid_loss"])
    (tmp_path / "train.jsonl").write_text('{"prompt": "only"}\n')
    status, _, err = run_command(
        train_module.main, capsys, "--model", model, "--data", tmp_path,
        "--output", tmp_path / "other",
    )  # fmt: skip
    assert status == 2 and "train.jsonl line 1" in err and "completion" in err


def test_a_loss_that_is_no_number_names_its_rows_and_loses_nothing(tmp_path):
    class Rows:
        bad = True

        def __call__(self, number: int) -> Batch:
            found = batch(number)
            if number == 3 and self.bad:
                found = found._replace(loss_mask=found.loss_mask * float("nan"))
            return found

        def places(self, number: int) -> list[str]:
            return [f"train.jsonl line {number * 4 + row}" for row in range(1, 5)]

    config = TrainConfig(steps=5, lr=1e-2, save_every=100, log_every=1, compile=False)
    rows, model, own = Rows(), tiny_model("llama"), masker()
    with pytest.raises(ValueError) as caught:
        train(model, own, rows, config, folder=tmp_path)
    said = str(caught.value)
    assert "step 4, which was not made" in said and "train.jsonl line 13" in said
    assert "line 16" in said and "line 12" not in said
    rows.bad = False
    resumed = train(tiny_model("llama"), masker(), rows, config, folder=tmp_path)
    whole = train(tiny_model("llama"), masker(), batch, config)
    assert bare(resumed) == bare(whole)
