"""The bench of selectors: its cheap passes are the compact model's, its means right."""

import json
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from conftest import write_folder

from examples.benchmarks.selectors import bench_calibration, quality, selectors_bench
from examples.benchmarks.selectors import bench_report as report
from examples.benchmarks.selectors.bench_attention import attention
from examples.benchmarks.selectors.bench_model import Bench, energy
from examples.benchmarks.selectors.bench_ways import (
    ACTIVATION,
    ALONE,
    COMPENSATED,
    DEFAULT,
    MAIN,
    PLAIN,
    STAGES,
    STATIC,
    Stage,
    Way,
)
from ifp_mlx import load
from ifp_mlx.evaluation import teacher
from ifp_mlx.evaluation.rows import Row
from ifp_mlx.evaluation.sensitivity import measure_sensitivity
from ifp_mlx.evaluation.teacher import Evaluator, log_probabilities, metrics
from ifp_mlx.model.decide import decide
from ifp_mlx.selection.request import Request
from ifp_mlx.selection.top_k import select
from ifp_mlx.selection.widths import MEASURED_SHARES
from ifp_mlx.slicing.compensation import compensated_down, evidence
from ifp_mlx.slicing.plan import plan_of
from ifp_mlx.slicing.reading import scores as use_scores

ROW = Row([7, 91, 30, 4, 55, 12, 80, 9], [33, 18, 2, 60, 77])
LONG = Row(ROW.prompt * 3, ROW.answer)  # a sliding window leaves its beginning


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def bench(request, tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("bench") / "tiny", request.param)
    rng = np.random.default_rng(1)
    arrays = {f"sketch.{layer}": rng.normal(0, 0.1, (9, 64)) for layer in range(3)}
    arrays = {
        name: mx.array(sketch.astype(np.float16)) for name, sketch in arrays.items()
    }
    scores = mx.array(rng.random((3, 64), np.float32))
    mx.save_safetensors(str(folder / "prior.safetensors"), arrays | {"scores": scores})
    return Bench(folder)


def selection_of(bench, seed=0):
    rng = np.random.default_rng(seed)
    return select(mx.array(rng.random((3, 64), np.float32)), [40, 20, 32])


@pytest.mark.parametrize("mask", [None, "causal", "window"])
def test_the_quick_attention_is_mlxs(mask):
    shapes = (2, 6, 5, 8), (2, 3, 9, 8), (2, 3, 9, 8)
    tensors = [
        mx.random.normal(shape, key=mx.random.key(seed))
        for seed, shape in enumerate(shapes)
    ]
    if mask == "window":
        mask = mx.random.uniform(shape=(5, 9), key=mx.random.key(3)) < 0.7
        mask[:, 4] = True  # every query sees something
    expected = mx.fast.scaled_dot_product_attention(*tensors, scale=0.3, mask=mask)
    found = attention(*tensors, scale=0.3, mask=mask)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("row", [ROW, Row(ROW.prompt, [33]), LONG])
def test_both_ways_of_reading_agree_with_the_evaluators(bench, row, monkeypatch):
    monkeypatch.setattr(teacher, "PREFILL_STEP", 5)
    selection, reading = selection_of(bench), bench.read(row)
    evaluator = Evaluator(load(bench.model.path)[0])
    reference = evaluator.reference(row, keep_cache=True)
    np.testing.assert_allclose(
        reading.reference, reference.log_probabilities, rtol=1e-4, atol=1e-5
    )
    modules = bench.sliced(selection)
    found = {
        "compact": bench.compact(row, modules),
        "dense": bench.decode(row, modules, reading),
    }
    for prefill, values in found.items():
        expected = evaluator.measure(row, selection.mask(), reference, prefill)
        measured = metrics(row, values, reading.reference)
        assert measured == pytest.approx(expected, rel=1e-3, abs=1e-5)
    again = bench.read(row)  # nothing of the compact model is left
    assert mx.array_equal(again.reference, reading.reference)


def test_a_reading_shows_the_prompts_channels(bench):
    reading = bench.read(ROW)
    assert [h.shape for h in reading.channels] == [(len(ROW.prompt), 64)] * 3
    scores = bench.model.scores(ROW.prompt, "activation", dense=bench.dense)
    local = mx.sqrt(mx.stack([energy(h) for h in reading.channels]))
    np.testing.assert_allclose(local, scores, rtol=1e-4)


def test_a_familys_scores_are_those_of_a_task_mask(bench, monkeypatch, tmp_path):
    rows = [ROW, Row([4, 8], [15, 16, 23]), Row([42, 7, 7], [5])]
    monkeypatch.setattr(bench_calibration, "read_rows", lambda *_, **__: rows)
    monkeypatch.setattr(bench_calibration, "write_families", lambda: tmp_path)
    (tmp_path / "calibration").mkdir()
    (tmp_path / "calibration" / "ant.jsonl").touch()
    scores = bench_calibration.Calibration(bench, tmp_path).scores("task", "ant")
    pairs = [(row.prompt, row.answer) for row in rows]
    np.testing.assert_allclose(
        scores, use_scores(bench.dense, plan_of(bench.dense), pairs), rtol=2e-3
    )


@pytest.mark.parametrize("alone", [False, True])
def test_compensated_slices_are_the_packages(bench, alone):
    selection, reading = selection_of(bench), bench.read(ROW)
    modules = bench.sliced(selection, bench.evidence(reading.channels, alone=alone))
    sketches = [None] * 3 if alone else bench.model.sketch()
    for ffn, module, h, sketch, index in zip(
        bench.ffns, modules, reading.channels, sketches, selection.indices, strict=True
    ):
        down = compensated_down(ffn.down_proj.weight, evidence(h, sketch), index)
        np.testing.assert_allclose(module._weights[2].T, down, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", [DEFAULT, ACTIVATION, PLAIN], ids=lambda way: way.name)
def test_a_way_of_a_prompt_is_what_the_package_makes_of_it(bench, way):
    calibration, reading = SimpleNamespace(bench=bench), bench.read(ROW)
    about = way.statistic, calibration, "ant", 0, reading, 0.5
    scores = selectors_bench.scores_of(*about)
    modules = selectors_bench.modules_of(
        calibration, "ant", reading, way, 0.5, {way.statistic: scores}
    )
    request = Request(
        instruction=ROW.prompt,
        keep=0.5,
        selector=way.scores,
        allocation=way.allocation,
        compensate=bool(way.compensation),
    )
    made = bench.model.prepare(decide(request, bench.model))
    expected = log_probabilities(made.model, ROW)
    found = bench.compact(ROW, modules)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_a_blend_is_of_ranks_unless_a_sketch_shows_the_merit_of_channels():
    assert (DEFAULT.statistic, DEFAULT.name) == (
        "merit",
        "blend, first-layer, compensated by prompt",
    )
    assert (ALONE.statistic, ALONE.name) == (
        "blend",
        "blend of ranks, first-layer, compensated by prompt alone",
    )
    assert (PLAIN.statistic, PLAIN.name) == ("blend", "blend, first-layer")
    assert ACTIVATION.statistic == "activation" and COMPENSATED.statistic == "task"


def lines_of(way, rows, keep=0.5):
    """Return a line for each of family → row → (tokens, KL)."""
    return [
        {"family": family, "row": number, "way": way, "keep": keep, "tokens": tokens}
        | {"kl": kl, "nll": 1.0, "agreement": 0.5, "seconds": 1.0}
        for family, found in rows.items()
        for number, (tokens, kl) in enumerate(found)
    ]


ROWS = {"a": [(1, 2.0), (3, 4.0)], "b": [(2, 1.0), (2, 3.0)], "boolq": [(1, 9.0)] * 2}


def families_of(rows):
    return {
        family: {n: {"tokens": t, "kl": kl} for n, (t, kl) in enumerate(found)}
        for family, found in rows.items()
    }


def test_means_are_over_tokens_or_rows_and_then_over_families():
    families = families_of(ROWS)
    assert report.macro(families, "kl") == pytest.approx((3.5 + 2) / 2)
    assert report.macro(families, "kl", per_token=False) == pytest.approx((3 + 2) / 2)


def test_intervals_are_of_paired_differences():
    one = families_of(ROWS)
    other = families_of({f: [(t, kl - 0.5) for t, kl in r] for f, r in ROWS.items()})
    assert report.interval(one, other) == pytest.approx((0.5, 0.5))
    assert report.interval(one, one) == (0, 0)
    low, high = report.interval(one)
    assert low < report.macro(one, "kl") < high


def test_a_table_has_only_rows_that_every_way_has():
    stage = Stage((DEFAULT, STATIC), 0.5, 1 / 2)
    lines = lines_of("dense", {"a": [(1, 0)] * 4, "b": [(1, 0)] * 4})
    lines += lines_of(DEFAULT.name, {"a": [(0, 1)] * 4, "b": [(0, 1)] * 4})
    lines += lines_of(STATIC.name, {"a": [(0, 2)] * 4, "b": [(0, 2)]})
    lines += lines_of(STATIC.name, {"b": [(0, 2)] * 4}, keep=0.75)
    ways = report.ways_of(lines, stage)
    assert {f: list(rows) for f, rows in ways[STATIC.name].items()} == {
        "a": [0, 1, 2, 3],
        "b": [0],
    }
    assert report.table(ways)[2].startswith(f"| {DEFAULT.name} | 1.000 [1.00, 1.00]")


def test_every_table_has_the_default_and_the_static_mask():
    for stage in STAGES:
        assert {DEFAULT, STATIC} <= set(stage.ways)
        assert len({way.name for way in stage.ways}) == len(stage.ways)


def test_a_page_is_made_of_its_rows_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "PAGES", tmp_path)
    rows = {"a": [(1, 0)] * 4, "b": [(2, 0)] * 4}
    lines = lines_of("dense", rows)
    for way in STAGES[0].ways:
        lines += lines_of(way.name, rows)
    page = report.write_report("tiny", lines).read_text()
    assert "Rows: a 4, b 4." in page and "KL per token by family" in page
    assert report.write_page("tiny").read_text() == page


def test_only_what_the_ways_need_is_measured():
    parts = bench_calibration.parts_of
    assert parts([DEFAULT, Way("random", "uniform")], 0.5) == set()
    assert parts([STATIC], 0.5) == {("statistics", 0.0)}
    both = [Way("task", "sensitivity"), Way("blend", "sensitivity", costs="package")]
    expected = {("statistics", 0.0), ("tasks", 0.75), ("package", 0.75)}
    assert parts(both, 0.75) == expected


def test_costs_on_the_packages_text_are_those_of_the_command(
    bench, tmp_path, monkeypatch
):
    monkeypatch.setattr(bench_calibration, "write_families", lambda: tmp_path)
    way = Way("blend", "sensitivity", costs="package")
    costs = bench_calibration.Calibration(bench, tmp_path).costs(way, "code", 0.5)
    kept = measure_sensitivity(bench.model)[:, MEASURED_SHARES.index(0.5)]
    np.testing.assert_allclose(costs[:, 0], kept, rtol=1e-3, atol=1e-7)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run on two families of three rows, in a folder of its own."""
    for part in ("calibration", "test"):
        for family in ("ant", "bee"):
            file = tmp_path / part / f"{family}.jsonl"
            file.parent.mkdir(exist_ok=True)
            prompt = f"Tell me of the {family}." * 3
            line = {"prompt": prompt, "completion": "It is so."}
            file.write_text((json.dumps(line) + "\n") * 3)
    folder = write_folder(tmp_path / "tiny")
    stages = (
        Stage((DEFAULT, Way("task", "sensitivity", "examples")), 0.5, 1),
        Stage((DEFAULT, STATIC), 0.5, 1),
    )
    for module in (selectors_bench, bench_calibration):
        monkeypatch.setattr(module, "write_families", lambda: tmp_path)
    monkeypatch.setattr(selectors_bench, "STAGES", stages)
    monkeypatch.setattr(selectors_bench, "fetch", lambda name: folder)
    monkeypatch.setattr(selectors_bench, "MODELS", tmp_path)
    monkeypatch.setattr(report, "PAGES", tmp_path)
    return selectors_bench.Run("tiny", 2, {"answer_tokens": 96})


def test_a_stopped_run_goes_on_and_measures_nothing_twice(run, monkeypatch):
    measured, real = [], selectors_bench.measure_row

    def stopped(calibration, todo):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append((todo.family, todo.number))
        return real(calibration, todo)

    monkeypatch.setattr(selectors_bench, "measure_row", stopped)
    for job in range(2):
        run.calibrate(job, 2)
    assert not run.unprepared()
    with pytest.raises(KeyboardInterrupt):
        run.measure(0, 1)
    assert measured == [("ant", 0), ("bee", 0), ("ant", 1)]
    found = {k: v for k, v in run.lines().items() if k[2] != "dense"}
    monkeypatch.setattr(selectors_bench, "measure_row", real)
    for job in range(2):
        run.measure(job, 2)
    after = run.lines()
    assert {k: v for k, v in after.items() if k in found} == found
    # Two jobs calibrated; of four rows the dense model and three ways.
    assert len(after) == 2 + 4 * (1 + 3)
    assert all(np.isfinite(v["kl"]) for k, v in after.items() if k[0] != report.ALL)
    monkeypatch.setattr(selectors_bench, "measure_row", None)
    run.measure(0, 1)
    run.calibrate(0, 1)
    assert run.lines() == after


def test_jobs_share_out_whole_families_that_weigh_about_the_same():
    lengths = {"ant": 8, "bee": 4, "cat": 3, "dog": 3}
    todo = [
        selectors_bench.Todo(0.5, family, number, Row([1] * length, [2]), [])
        for number in range(2)
        for family, length in lengths.items()
    ]
    shares = [selectors_bench.share(todo, job, 2) for job in range(2)]
    assert [sorted({entry.family for entry in part}) for part in shares] == [
        ["ant", "dog"],
        ["bee", "cat"],
    ]
    assert sum(map(len, shares)) == len(todo)


def test_a_run_goes_on_from_published_rows(run, monkeypatch):
    lines = lines_of("dense", {"ant": [(96, 0.0)] * 2, "bee": [(3, 0.0)] * 2})
    for way in (DEFAULT, STATIC):
        lines += lines_of(way.name, {"ant": [(96, 1.5)] * 2, "bee": [(3, 2.5)] * 2})
    for line in lines:  # as they are logged
        if line["way"] != "dense":
            del line["tokens"]
    report.write_report("tiny", lines)
    run.take_published()
    assert sorted(run.lines().values(), key=str) == sorted(lines, key=str)
    assert [[way.name for way in todo.ways] for todo in run.todo()] == [
        ["task, sensitivity, compensated by examples"]
    ] * 4
    run.take_published()
    assert len(run.lines()) == len(lines)
    run.settings["answer_tokens"] = 32
    run.folder = run.folder / "other"
    with pytest.raises(ValueError, match="compare 96 answer tokens at most"):
        run.take_published()


def test_only_the_ways_that_are_named_are_measured(run):
    run.ways = [DEFAULT.name]
    found = {(todo.number, *(way.name for way in todo.ways)) for todo in run.todo()}
    assert found == {(0, DEFAULT.name), (1, DEFAULT.name)}
    assert not run.unprepared()


def test_rows_of_another_sketch_are_not_mixed_with_these(run, monkeypatch):
    run.log(0)
    monkeypatch.setattr(selectors_bench, "SKETCH_VERSION", "another")
    with pytest.raises(ValueError, match="was begun with sketch '1', not 'another'"):
        run.lines()


MODELS = sorted(quality.MODELS)


@pytest.mark.parametrize("model", MODELS)
def test_the_published_rows_are_of_the_ways_there_are(model):
    names = {line["way"] for line in report.read_lines(model)}
    assert names <= {report.DENSE, report.CALIBRATION, *selectors_bench.WAYS}


@pytest.mark.parametrize("model", MODELS)
def test_a_models_page_is_what_its_rows_make(model):
    text = (report.PAGES / f"selectors-{model}.md").read_text(encoding="utf-8")
    assert report.page_of(model, report.read_lines(model)) == text


def test_the_page_on_quality_is_what_all_rows_make():
    text = (report.PAGES / "quality.md").read_text(encoding="utf-8")
    assert quality.page() == text
    for stage in STAGES:
        assert all(f"| {way.name} |" in text or way == DEFAULT for way in stage.ways)
    assert f"| **{DEFAULT.name}** (the default) |" in text


def test_the_page_of_all_benchmarks_quotes_the_published_rows():
    lines = report.read_lines("smollm2")
    text = (report.PAGES.parent / "README.md").read_text("utf-8")
    ways = report.ways_of(lines, Stage(MAIN, 0.5, 1))
    kl = [f"{report.macro(ways[w.name], 'kl'):.2f}" for w in (DEFAULT, STATIC, ALONE)]
    share = f"{report.macro(ways[DEFAULT.name], 'agreement'):.0%}".replace("%", " %")
    counted = ways[DEFAULT.name].items()
    rows = sum(len(own) for name, own in counted if name not in report.ONE_TOKEN)
    said = " ".join(text.split())
    assert f"next token {share} of the time" in said
    assert f"is then {kl[0]} nats per token" in said
    assert f"has {kl[1]} ({rows} prompts)" in said and f"alone it is {kl[2]}," in said
