"""The frontier's bench: a fair start, bytes as on disk, the package's own selections."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import write_folder
from mlx.utils import tree_flatten

from examples.benchmarks.frontier import distilled, measure, models, quantisers, report
from examples.benchmarks.frontier.points import (
    AFFINE,
    AS_FILED,
    BASES,
    DENSE,
    FILE,
    MIXED,
    POINTS,
    REFERENCE,
    WHOLE,
    Point,
)
from examples.benchmarks.frontier.reference import (
    Dense,
    compare,
    logits_of,
    perturbed,
    write_model,
    write_reference,
)
from ifp_mlx import load
from ifp_mlx.evaluation import teacher
from ifp_mlx.evaluation.rows import Row
from ifp_mlx.model.checkpoint import IFPModel
from ifp_mlx.model.decide import decide
from ifp_mlx.selection.request import Request

SHAPE = {
    "hidden_size": 64,
    "head_dim": 16,
    "intermediate_size": 256,
    "tie_word_embeddings": True,
}
ROW = Row([7, 91, 30, 4, 55, 12, 80, 9], [33, 18, 2, 60, 77])
FOUR = Point("affine", 4)
SELECT = Point("select", 4, keep=0.5)


def weights_of(folder):
    return dict(mx.load(str(folder / "model.safetensors")))


def bytes_on_disk(folder):
    """Return what follows the header of a safetensors file."""
    data = (folder / "model.safetensors").read_bytes()
    return len(data) - 8 - int.from_bytes(data[:8], "little")


@pytest.fixture(params=["llama", "gemma3_text"])
def dense(request, tmp_path):
    return write_folder(tmp_path / "dense", request.param, **SHAPE)


@pytest.fixture
def short_text(monkeypatch):
    """Four short pieces to calibrate with, and few steps of training."""
    text = mx.array(np.random.default_rng(0).integers(0, 259, (4, 128)))
    monkeypatch.setattr(quantisers, "calibration", lambda dense: text)
    monkeypatch.setattr(distilled, "STEPS", 2)


def test_noise_is_repeatable_and_within_half_a_step():
    weight = mx.random.normal((8, 96), key=mx.random.key(1))
    found, again = (perturbed(weight, mx.random.key(0)) for _ in range(2))
    assert mx.array_equal(found, again)
    groups = np.array(weight).reshape(8, 3, 32)
    step = np.ptp(groups, axis=-1, keepdims=True) / 15
    share = np.abs(np.array(found - weight).reshape(groups.shape)) / step
    assert 0.45 < share.max() <= 0.5 + 1e-5


def test_noise_refuses_a_width_that_is_not_whole_groups():
    with pytest.raises(ValueError, match=r"\(8, 40\) has no whole groups of 32"):
        perturbed(mx.zeros((8, 40)), mx.random.key(0))


def test_norms_and_the_tokenizer_stay_as_they_were(dense, tmp_path):
    write_reference(dense, tmp_path / "reference")
    before, after = weights_of(dense), weights_of(tmp_path / "reference")
    same = {name for name in before if mx.array_equal(before[name], after[name])}
    assert same == {name for name in before if "norm" in name}
    tokenizer = "tokenizer.json"
    assert (dense / tokenizer).read_bytes() == (
        tmp_path / "reference" / tokenizer
    ).read_bytes()


@pytest.mark.parametrize("point", [FOUR, Point("affine", 3, 32), *MIXED[:1]])
def test_bytes_are_those_of_the_folder_that_mlx_lm_writes(point, dense, tmp_path):
    folder = tmp_path / "small"
    write_model(folder, *quantisers.quantised(point, dense), dense)
    assert models.Whole(folder).bytes == bytes_on_disk(folder)


@pytest.mark.parametrize("kind", ["awq", "gptq", "dwq", "dynamic"])
def test_every_quantiser_leaves_a_folder_that_loads(kind, dense, tmp_path, short_text):
    point = Point(kind, 4)
    folder = tmp_path / "small"
    write_model(folder, *quantisers.quantised(point, dense), dense)
    whole = models.Whole(folder)
    assert whole.bytes == bytes_on_disk(folder) < bytes_on_disk(dense) / 2
    found, known = (logits_of(m, ROW) for m in (whole.model, load(dense)[0].dense()))
    assert np.isfinite(found).all() and found.shape == known.shape


@pytest.mark.parametrize("embedding", [False, True])
def test_unpacked_layers_compute_what_quantised_ones_do(embedding):
    layer = nn.Embedding(8, 64) if embedding else nn.Linear(64, 8)
    layer = layer.to_quantized(32, 4)
    stock = type(layer)
    x = mx.random.normal((3, 64), key=mx.random.key(1))
    known = layer.as_linear(x) if embedding else layer(x)
    distilled.unpack(layer)
    found = layer.as_linear(x) if embedding else layer(x)
    assert type(layer) is not stock and mx.allclose(found, known, atol=1e-5)
    distilled.pack(layer)
    assert type(layer) is stock and "_codes" not in layer


def test_training_moves_scales_and_biases_and_nothing_is_left_behind(dense, short_text):
    before, _ = quantisers.quantised(FOUR, dense)
    after, _ = quantisers.quantised(Point("dwq", 4), dense)
    old, new = (dict(tree_flatten(m.parameters())) for m in (before, after))
    moved = {name for name in old if not mx.array_equal(old[name], new[name])}
    assert {name.rpartition(".")[2] for name in moved} >= {"scales", "biases"}
    assert not any(old[name].dtype == mx.uint32 for name in moved)
    assert {type(m) for m in before.modules()} == {type(m) for m in after.modules()}


def test_a_selection_is_the_packages_own_of_the_quantised_model(dense, tmp_path):
    base, plain = tmp_path / "base", tmp_path / "plain"
    write_model(base, *quantisers.quantised(FOUR, dense), dense)
    _, model = models.unpacked(base)
    write_model(plain, model, json.loads((dense / "config.json").read_text()), dense)
    # The same numbers as float32, so that the package's own path is exact on a CPU.
    whole, config = (
        load(base)[0].dense(),
        json.loads((base / "config.json").read_text()),
    )
    whole.set_dtype(mx.float32)
    exact = tmp_path / "exact"
    write_model(exact, whole, config, base)
    selected = models.Selected(SELECT, base, plain)
    found = logits_of(selected.model_for(ROW.prompt), ROW)
    package, _ = load(exact)
    request = Request(instruction=ROW.prompt, keep=0.5, selector="blend")
    made = package.prepare(decide(request, package))
    known = logits_of(made.model, ROW)
    assert np.abs(found - known).max() < 2e-2 * np.abs(known).max()
    made.model.set_dtype(mx.float16)
    sizes = (a.nbytes for _, a in tree_flatten(made.model.parameters()))
    assert selected.bytes == sum(sizes)


def test_hidden_states_give_the_dense_models_logits(dense, tmp_path):
    known = logits_of(load(dense)[0].dense(), ROW)
    kept = Dense(dense, tmp_path / "states")
    kept.read({("code", 0): ROW})
    assert np.allclose(kept.logits(("code", 0)), known, atol=1e-4)


def test_figures_are_the_packages_metrics(dense):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (2, 5, 259)).astype(np.float32)
    found, known = (mx.array(part) for part in logits)
    logs = [
        part - mx.logsumexp(part, axis=-1, keepdims=True) for part in (found, known)
    ]
    figures = compare(*logits, ROW.answer)
    assert figures == pytest.approx(teacher.metrics(ROW, *logs), abs=1e-5)
    assert compare(logits[0], logits[0], ROW.answer)["kl"] == 0


def test_short_prompts_come_first_and_then_the_shortest():
    rows = [Row([1] * length, [2]) for length in (200, 10, 170, 160, 161)]
    lengths = [len(row.prompt) for row in measure.first_rows(rows, 4)]
    assert lengths == [10, 160, 161, 170]


def test_points_have_names_of_their_own_and_are_all_on_the_page():
    names = {point.name for point in POINTS}
    assert len(names) == len(POINTS)
    selections = {point for point in POINTS if point.kind == "select"}
    assert set(POINTS) == {DENSE, *AS_FILED, *WHOLE, *selections}
    assert all(point.base in AFFINE for point in selections)
    assert all(kind in quantisers.MAKERS for kind in {p.kind for p in WHOLE})
    assert {point.compared for point in AS_FILED} == {REFERENCE, FILE}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of a tiny model, of two points and one that cannot be made."""
    tiny = write_folder(tmp_path / "tiny", **SHAPE)
    for family in ("code", "math", "boolq"):
        lines = [{"prompt": f"{family} {n}", "completion": "Yes."} for n in range(3)]
        file = tmp_path / "families/test" / f"{family}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    chats = "ifp_mlx.model.checkpoint.calibration_chats"  # of a prior in no time
    monkeypatch.setattr(chats, lambda: [[{"role": "user", "content": "Hello"}]])
    monkeypatch.setattr(measure, "fetch", lambda name: tiny)
    monkeypatch.setattr(measure, "write_families", lambda: tmp_path / "families")

    def refuse(*_):
        raise NotImplementedError("AWQ is not for tiny models.\nmore")

    monkeypatch.setitem(quantisers.MAKERS, "awq", refuse)
    points = [Point("awq", 2), SELECT, Point("affine", 2)]
    found = measure.Run("smollm2", 2, points, tmp_path / "frontier")
    found.prepare()
    return found


def test_the_sketch_that_all_jobs_compensate_by_is_made_before_them(run, monkeypatch):
    monkeypatch.setattr(IFPModel, "compute_prior", None)
    for bits in BASES:
        assert len(load(run.plain(Point("affine", bits)))[0].sketch()) == 3


def test_a_run_that_goes_on_repeats_no_line(run):
    first = measure.Run(run.name, 1, run.points, run.folder)
    first.measure(0, 1)
    assert len(first.lines()) == 4  # two points, two families
    run.measure(0, 2)
    run.measure(1, 2)
    run.measure(1, 2)
    files = run.folder.glob("rows/*/rows.jsonl")
    lines = [line for file in files for line in file.read_text().splitlines()]
    assert len(lines) == len(run.lines()) == 8


def test_a_point_that_cannot_be_made_is_written_down(run, tmp_path, monkeypatch):
    run.measure(0, 1)
    monkeypatch.setattr(report, "write", lambda: None)
    monkeypatch.setattr(report.write_results, "__defaults__", (tmp_path,))
    run.write()
    model = report.Model("smollm2", tmp_path)
    said = "NotImplementedError: AWQ is not for tiny models."
    assert model.about["failed"] == {"awq 2/64": said}
    assert f"- *awq 2/64*: {said}" in model.failures()
    assert set(model.results) == {SELECT.name, "affine 2/64"}


def test_a_point_counts_once_all_of_its_rows_are_measured(run, tmp_path, monkeypatch):
    measure.Run(run.name, 1, run.points[1:2], run.folder).measure(0, 1)
    run.measure(2, 3)  # the last point
    monkeypatch.setattr(report, "write", lambda: None)
    monkeypatch.setattr(report.write_results, "__defaults__", (tmp_path,))
    run.write()
    assert set(report.Model("smollm2", tmp_path).results) == {"affine 2/64"}


def test_what_was_filed_is_not_measured_again(run, tmp_path, monkeypatch):
    run.measure(0, 1)
    monkeypatch.setattr(report, "write", lambda: None)
    monkeypatch.setattr(report.write_results, "__defaults__", (tmp_path,))
    run.write()
    before = (tmp_path / "results-smollm2.csv").read_bytes()
    elsewhere = tmp_path / "fresh clone"
    again = measure.Run(run.name, run.count, run.points, elsewhere, filed=tmp_path)
    assert not any(key not in again.lines() for key in run.lines())
    report.write_results("smollm2", again.lines().values(), {"failed": {}})
    assert (tmp_path / "results-smollm2.csv").read_bytes() == before
