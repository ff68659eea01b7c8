"""A mixture of experts through every command that measures."""

import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import run_command, write_family

from ifp_mlx import benchmark, evaluate, load, tasks
from ifp_mlx.evaluation import answers, measurement
from ifp_mlx.evaluation.quantised import QuantisedCompact
from ifp_mlx.evaluation.rivals import quantised, quantised_bytes, weight_bytes
from ifp_mlx.evaluation.rows import Row
from ifp_mlx.evaluation.runners import stock_of_width
from ifp_mlx.evaluation.tasks import TaskMask
from ifp_mlx.evaluation.teacher import Evaluator, Setting
from ifp_mlx.slicing.shapes import dense_shapes

ROW = Row([5, 9, 77, 200], [13, 40, 41])
# Sizes that are whole quantisation groups of 64, so that every class can round them.
WIDE = {"hidden_size": 64, "moe_intermediate_size": 64}
LATENT = {"kv_lora_rank": 64, "q_lora_rank": 64, "v_head_dim": 64}
FAMILIES = {
    "qwen3_moe": WIDE | {"head_dim": 16},
    "gemma4_text, experts": WIDE | {"head_dim": 16, "global_head_dim": 16},
    "deepseek_v3, groups": WIDE | LATENT | {"qk_nope_head_dim": 64},
}


@pytest.fixture(scope="module", params=FAMILIES)
def opened(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture") / "m"
    return load(write_family(folder, request.param, **FAMILIES[request.param]))


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "talk.jsonl"
    rows = [{"prompt": f"Say {word}", "completion": word} for word in ("ho", "hey!")]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_metrics_are_those_of_the_sliced_model(opened):
    model, _ = opened
    evaluator = Evaluator(model)
    reference = evaluator.reference(ROW)
    (_, selection), (_, whole) = evaluator.selections(
        ROW, [Setting("activation", keep, "uniform") for keep in (0.5, 1.0)]
    )
    assert selection.mask_id == model.select(ROW.prompt, keep=0.5).mask_id
    masked = evaluator.measure(ROW, selection.mask(), reference)
    sliced = evaluator.compare(ROW, model.compact(selection), reference)
    assert masked == pytest.approx(sliced, rel=1e-3, abs=1e-6) and sliced["kl"] > 1e-4
    same = evaluator.measure(ROW, whole.mask(), reference)
    assert same["agreement"] == 1 and same["kl"] == pytest.approx(0, abs=1e-6)


def test_sizes_are_those_of_the_compact_and_the_quantised_models(opened, tmp_path):
    from mlx_lm.utils import load_model

    from ifp_mlx.model.export import Quantisation, write_compact

    model, _ = opened
    selection = model.select(ROW.prompt, keep=0.5)
    settings = [Setting("random", 0.5, "uniform", bits=bits) for bits in (None, 4)]
    _, plain, rounded = measurement.arms_of(model, settings, [], ROW)
    assert plain.bytes == weight_bytes(model.compact(selection))
    small = quantised(model, 4).model
    assert quantised_bytes(model.dense(), 4) == weight_bytes(small)
    how = Quantisation(4, 64)
    folder = write_compact(model, selection, tmp_path / "out", quantisation=how)
    written, _ = load_model(folder)
    assert rounded.bytes == weight_bytes(written)


def test_a_quantised_mixture_is_cut_without_loss(opened, tmp_path):
    from mlx_lm.utils import load_model

    from ifp_mlx.model.export import Quantisation, write_compact

    model, _ = opened
    selection = model.select(ROW.prompt, keep=0.5)
    how, tokens = Quantisation(4, 64), mx.array([ROW.prompt])
    folder = write_compact(model, selection, tmp_path / "out", quantisation=how)
    small = QuantisedCompact(model, 4)
    small.of(model.select(ROW.prompt, selector="random", keep=0.5).mask())
    made = small.of(selection.mask())  # the second mask, from all experts again
    expected = load_model(folder)[0](tokens)
    np.testing.assert_allclose(made(tokens), expected, rtol=1e-5, atol=1e-5)


def test_a_sweep_compares_every_selector_and_the_rivals(opened, data, tmp_path, capsys):
    selectors = ["activation", "blend", "prior", "random"]
    given = ["--model", opened[0].path, "--data", data, "--keep", 0.5, "--json"]
    given += ["--output", tmp_path / "out", "--speed-tokens", 2]
    given += ["--prefill", "compact", "dense", "--selector", *selectors]
    status, out, err = run_command(evaluate.main, capsys, *given)
    assert status == 0, err
    found = json.loads(out.splitlines()[-1])["results"]
    settings = [result["setting"] for result in found if result["setting"]]
    assert len(settings) == 8 and {s["allocation"] for s in settings} == {"uniform"}
    assert not any(setting["compensate"] for setting in settings)
    assert "dense, 8 bits" in {result["name"] for result in found}
    assert all(result["tokens_per_second"] > 0 for result in found)


def test_what_a_mixture_cannot_have_is_one_line_and_exit_status_2(opened, data, capsys):
    given = ["--model", opened[0].path, "--data", data]
    for more, sentence in (
        (("--compensate",), "cannot make up for dropped ones"),
        (("--allocation", "first-layer"), "different numbers of experts"),
        (("--keep", 0.1), "too few for this model's router; keep at least"),
    ):
        status, out, err = run_command(evaluate.main, capsys, *given, *more)
        assert (status, out) == (2, "") and sentence in err and err.count("\n") == 1


def test_answers_and_tasks_are_measured_uncompensated(opened, tmp_path, capsys):
    check = {"kind": "yes-no", "expected": "no"}
    question = json.dumps({"prompt": "Is 2 odd?", "check": check})
    (tmp_path / "odd.jsonl").write_text(question)
    given = ["--model", opened[0].path, "--answers", tmp_path / "odd.jsonl", "--json"]
    status, out, err = run_command(evaluate.main, capsys, *given, "--max-tokens", 2)
    assert status == 0, err
    arms = json.loads(out.splitlines()[-1])["results"]["odd"]
    assert list(arms)[1:] == ["activation, keep 0.5, uniform, compact prompt"]
    questions = {"odd": answers.read_questions(tmp_path / "odd.jsonl")}
    assert len(questions["odd"]) == 1


def test_a_request_of_the_harness_selects_experts(opened):
    pytest.importorskip("lm_eval", reason="needs pip install '.[evaluate]'")
    from lm_eval.api.instance import Instance

    from ifp_mlx.evaluation import harness

    model, tokenizer = opened
    lm = harness.SelectingLM(model, chat=False)
    asked = [Instance("loglikelihood", {}, ("Is 2", " odd"), 0, metadata=("t", 0, 1))]
    (dense,) = lm.loglikelihood(asked)
    lm.use(Setting("activation", 0.5, "uniform"))
    (found,) = lm.loglikelihood(asked)
    tokens = tokenizer.encode("Is 2 odd")
    start = len(tokenizer.encode("Is 2"))
    compact = model.compact(model.select(tokens[:start], keep=0.5))
    logits = compact(mx.array([tokens[:-1]]))[0, start - 1 :].astype(mx.float32)
    spoken = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    answer = mx.take_along_axis(spoken, mx.array(tokens[start:])[:, None], axis=-1)
    assert found[0] == pytest.approx(float(answer.sum()), rel=1e-3)
    lm.use(Setting("random", 0.5, "uniform"))
    (other,) = lm.loglikelihood(asked)
    assert other[0] != pytest.approx(dense[0], rel=1e-3)


def test_a_benchmark_runs_its_rows_on_experts(opened, capsys):
    given = ["--model", opened[0].path, "--turns", 1, "--max-tokens", 3, "--json"]
    given += ["--prompt-tokens", 9, "--keep", 0.6]  # 5 of 8, in groups of two 4 or 6
    status, out, err = run_command(benchmark.main, capsys, *given)
    assert status == 0, err
    (case,) = json.loads(out.splitlines()[-1])["cases"]
    assert case["unit"] == "expert" and case["target_size"] in (4, 5)
    rows = case["seconds"]
    assert rows["compact"]["peak_bytes"][0] < rows["dense"]["peak_bytes"][0]


def test_the_stock_row_is_quantised_as_the_model_is(tmp_path):
    folder = write_family(tmp_path / "m", "deepseek_v3", quantised=True)
    model, _ = load(folder)
    compact = model.compact(model.select("Hi", selector="random", target_size=4))
    stock = stock_of_width(model, 4)
    assert dense_shapes(stock) == dense_shapes(compact)
    assert weight_bytes(stock) == weight_bytes(compact)


@pytest.fixture
def run(opened, tmp_path, capsys):
    def command(verb, *options):
        where = ("--model", opened[0].path, "--tasks-folder", tmp_path / "library")
        status, out, err = run_command(tasks.main, capsys, verb, *where, *options)
        assert status == 0, err
        return out

    return command


def test_tasks_of_a_mixture_are_made_merged_listed_and_compared(
    opened, data, run, tmp_path
):
    model, _ = opened
    half, held_out = ("--keep", 0.5), ("--held-out", data, "--limit", 1, "--json")
    made = json.loads(
        run("make", "--name", "talk", "--examples", data, *half, *held_out)
    )
    assert made["allocation"] == "uniform" and made["layers"] == [4] * model.layers
    assert made["evaluation"].keys() == {"nll", "kl", "agreement", "rows"}
    run("make", "--name", "sql", "--instruction", "Write a SQL query.", *half)
    # A profile of another tool, which keeps the same experts in every layer.
    profile = {path.split(".")[2]: [0, 1, 4, 5] for path in model.plan.paths}
    (tmp_path / "profile.json").write_text(json.dumps(profile))
    run("import", "--name", "theirs", "--profile", tmp_path / "profile.json")
    three = ("--tasks", "talk", "sql", "theirs")
    both = json.loads(run("merge", "--name", "all", *three, *half, "--json"))
    assert both["made"]["merged"] == [*three[1:]] and both["layers"] == made["layers"]
    merged = TaskMask.load(tmp_path / "library/all.safetensors")
    loaded = [TaskMask.load(tmp_path / f"library/{n}.safetensors") for n in three[1:]]
    squares = [mx.square(task.scores) for task in loaded]
    shares = sum(s / s.sum(axis=1, keepdims=True) for s in squares)
    assert mx.allclose(mx.square(merged.scores), shares, rtol=1e-2)
    model.check_fits(merged.selection)  # a router's groups keep equally many
    names = ("all", "sql", "talk", "theirs")
    listed = run("list", "--json").splitlines()
    assert [task["name"] for task in json.loads(listed[-1])] == [*names]
    assert "| theirs | 0.5 | uniform | a profile (reap) |" in "\n".join(listed)
    compared = run("overlap", "--json")
    assert compared.startswith("What two tasks share of their experts,")
    pairs = json.loads(compared.splitlines()[-1])
    assert len(pairs) == 6 and {c for pair in pairs for c in pair["chance"]} == {0.5}
