import itertools
import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import FAMILIES, run_command, tiny_model, write_folder
from hypothesis import given
from hypothesis import strategies as st

from ifp_mlx import load
from ifp_mlx.evaluation import sensitivity
from ifp_mlx.evaluation.sensitivity import measure_sensitivity
from ifp_mlx.model import calibration
from ifp_mlx.model.calibration import calibration_texts
from ifp_mlx.selection.top_k import select
from ifp_mlx.selection.widths import MEASURED_SHARES, layer_sizes
from ifp_mlx.sensitivity import main
from ifp_mlx.slicing.masked import mask_model, set_masks
from ifp_mlx.slicing.plan import plan_of
from ifp_mlx.slicing.reading import scores as use_scores

SHARES = np.array(MEASURED_SHARES)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(calibration, "TEXTS", 2)
    monkeypatch.setattr(sensitivity, "TOKENS", 40)
    monkeypatch.setattr(calibration, "TOKENS", 40)


def log_softmax(logits):
    logits = np.array(logits, dtype=np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def test_costs_are_the_kl_of_the_model_with_one_layer_pruned(small, tmp_path):
    model, _ = load(write_folder(tmp_path / "tiny"))
    costs = np.array(measure_sensitivity(model))
    assert costs.shape == (3, 6) and np.all(costs[:, -1] == 0)
    texts = calibration_texts(model)
    start = next(i for i in range(40) if texts[0][i] != texts[1][i])
    dense = model.dense()
    scores = use_scores(dense, plan_of(dense), [(text,) for text in texts])
    masked = mask_model(dense, plan_of(dense))
    for layer, column in itertools.product(range(3), (0, 2, 4)):
        mask = mx.ones((3, 64)) * (mx.arange(3) != layer)[:, None]
        if k := round(SHARES[column] * 64):
            mask = mask + select(scores, [k] * 3).mask() * (1 - mask)
        found = []
        for text in texts:
            set_masks(masked, mx.ones((3, 64)))
            p = log_softmax(dense(mx.array([text]))[0, start:])
            set_masks(masked, mask)
            q = log_softmax(dense(mx.array([text]))[0, start:])
            found.append((np.exp(p) * (p - q)).sum(-1).mean())
        assert costs[layer, column] == pytest.approx(np.mean(found), rel=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_replaying_a_block_gives_the_same_logits_and_leaves_no_trace(family):
    model, text = tiny_model(family), [5, 9, 77, 200, 13]
    blocks = list(model.layers)
    outputs, logits = sensitivity._record(model, text)
    assert len(outputs) == 3
    with sensitivity._replayed(model, 1, outputs):
        # Another text below changes nothing: its blocks are not what is read.
        again = model(mx.array([text]))
    assert mx.array_equal(again, logits)
    assert all(a is b for a, b in zip(model.layers, blocks, strict=True))


def test_the_measurement_is_kept_with_the_model_and_goes_on_after_a_stop(
    small, tmp_path, monkeypatch
):
    folder = write_folder(tmp_path / "tiny")
    whole = measure_sensitivity(load(write_folder(tmp_path / "other"))[0])
    costs, done = sensitivity.Probe.costs, []

    def stopped(probe, layer):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(layer)
        return costs(probe, layer)

    monkeypatch.setattr(sensitivity.Probe, "costs", stopped)
    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(load(folder)[0])
    assert load(folder)[0].sensitivity is None
    done = []
    again = measure_sensitivity(load(folder)[0])
    assert done == [2]
    np.testing.assert_allclose(again, whole, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(load(folder)[0].sensitivity, again)
    assert not (folder / sensitivity.PARTIAL_FILE).exists()


def test_a_selection_can_be_allocated_by_sensitivity(tmp_path):
    folder = write_folder(tmp_path / "tiny")
    with pytest.raises(ValueError, match="run python -m ifp_mlx.sensitivity"):
        load(folder)[0].select("Hello", allocation="sensitivity")
    costs = np.outer([1.0, 20.0, 1.0], 1 - SHARES)
    mx.save_safetensors(
        str(folder / "sensitivity.safetensors"), {"kl": mx.array(costs)}
    )
    selection = load(folder)[0].select("Hello", keep=0.5, allocation="sensitivity")
    assert selection.sizes[1] == 62 and sum(selection.sizes) == 96
    assert selection.origin.allocation == "sensitivity"


def test_a_damaged_measurement_is_refused(tmp_path):
    folder = write_folder(tmp_path / "tiny")
    (folder / "sensitivity.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="does not hold kl for 3 layers of 6; delete"):
        load(folder)[0].select("Hello", allocation="sensitivity")


@given(
    seed=st.integers(0, 10**6),
    granularity=st.sampled_from([1, 8, 32]),
    keep=st.floats(0.05, 1),
)
def test_the_budget_is_spent_and_never_overspent(seed, granularity, keep):
    channels, layers = 256, 5
    k = max(1, round(keep * channels / granularity)) * granularity
    costs = mx.array(np.random.default_rng(seed).exponential(size=(layers, 6)))
    sizes = layer_sizes(k, layers, channels, "sensitivity", granularity, costs)
    assert sum(sizes) == layers * k
    assert all(0 < size <= channels and size % granularity == 0 for size in sizes)
    more = layer_sizes(channels, layers, channels, "sensitivity", granularity, costs)
    assert more == [channels] * layers


def test_layers_lose_channels_in_inverse_proportion_to_their_costs():
    # At half of the channels the first layer costs 4 times, the second twice as much.
    costs = np.outer([4.0, 2.0, 1.0, 1.0], 1 - SHARES)
    sizes = layer_sizes(500, 4, 1000, "sensitivity", 1, mx.array(costs))
    lost = 1000 - np.array(sizes)
    np.testing.assert_allclose(lost, 2000 / 2.75 * 1 / np.array([4, 2, 1, 1]), atol=1)


def test_no_layer_is_emptied():
    costs = np.outer([50.0, 1.0, 40.0], 1 - SHARES)
    sizes = layer_sizes(64, 3, 128, "sensitivity", 1, mx.array(costs))
    assert sizes[1] == 16 and sum(sizes) == 192 and min(sizes) == 16
    even = layer_sizes(8, 3, 128, "sensitivity", 8, mx.array(costs))
    assert even == [8, 8, 8]
    assert layer_sizes(64, 3, 128, "sensitivity", 1, mx.zeros((3, 6))) == [64] * 3


def test_the_command_measures_once(small, tmp_path, capsys, monkeypatch):
    folder = write_folder(tmp_path / "tiny")
    status, out, _ = run_command(main, capsys, "--model", folder, "--json")
    assert status == 0 and "| layer | keep 0 | keep 0.125 |" in out
    monkeypatch.setattr(sensitivity, "measure_sensitivity", None)
    status, again, _ = run_command(main, capsys, "--model", folder, "--json")
    assert status == 0 and again == out
    report = json.loads(out.splitlines()[-1])
    assert len(report["kl"]) == 3 and report["shares"] == list(MEASURED_SHARES)


def write_examples(path, word):
    lines = [
        {"prompt": f"Say {word} {number} times, please.", "completion": word * number}
        for number in range(1, 9)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_command_measures_again_on_a_users_own_files(
    small, tmp_path, capsys, monkeypatch
):
    folder = write_folder(tmp_path / "tiny")
    files = [write_examples(tmp_path / f"{w}.jsonl", w) for w in ("one", "two")]
    command = ("--model", folder, "--json")
    _, stock, _ = run_command(main, capsys, *command)
    status, own, _ = run_command(main, capsys, *command, "--data", *files)
    assert status == 0 and own != stock
    model = load(folder)[0]
    texts = sensitivity.data_texts(model, files)
    assert (
        len(texts) == sensitivity.DATA_TEXTS
        and max(map(len, texts)) <= calibration.TOKENS
    )
    again = measure_sensitivity(load(write_folder(tmp_path / "other"))[0], texts)
    np.testing.assert_allclose(json.loads(own.splitlines()[-1])["kl"], again, rtol=1e-4)
    monkeypatch.setattr(sensitivity, "measure_sensitivity", None)
    # What was measured on these files stays, and is used whatever it was measured on.
    for options in (("--data", *files), ()):
        assert run_command(main, capsys, *command, *options)[1] == own


def test_a_stopped_measurement_on_other_texts_is_not_gone_on_with(
    tmp_path, monkeypatch
):
    folder = write_folder(tmp_path / "tiny")
    model = load(folder)[0]
    file = write_examples(tmp_path / "one.jsonl", "one")
    costs = sensitivity.Probe.costs

    def stopped(probe, layer):
        if layer == 1:
            raise KeyboardInterrupt
        return costs(probe, layer)

    monkeypatch.setattr(sensitivity.Probe, "costs", stopped)
    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(model)
    monkeypatch.setattr(sensitivity.Probe, "costs", costs)
    texts = sensitivity.data_texts(model, [file])
    found = measure_sensitivity(load(folder)[0], texts)
    whole = measure_sensitivity(load(write_folder(tmp_path / "other"))[0], texts)
    np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-7)


def test_files_without_examples_are_refused(tmp_path, capsys):
    folder, empty = write_folder(tmp_path / "tiny"), tmp_path / "empty.jsonl"
    empty.write_text("")
    status, _, error = run_command(main, capsys, "--model", folder, "--data", empty)
    assert status == 2 and "empty.jsonl hold no example" in error
