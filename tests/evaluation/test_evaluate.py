import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from conftest import run_command, swept, write_family, write_folder
from mlx.utils import tree_flatten

from ifp_mlx import load
from ifp_mlx.evaluate import main
from ifp_mlx.evaluation import measurement, statistics
from ifp_mlx.evaluation.measurement import evaluate
from ifp_mlx.evaluation.quantised import QuantisedCompact
from ifp_mlx.evaluation.report import report, summary
from ifp_mlx.evaluation.rivals import (
    choose_bits,
    quantised,
    quantised_bytes,
    smaller,
    weight_bytes,
)
from ifp_mlx.evaluation.rows import Row, read_rows, retokenize, same_tokens
from ifp_mlx.evaluation.teacher import Evaluator, Setting

ROW = Row([5, 9, 77, 200], [13, 40, 41])
HALF = Setting("activation", 0.5, "uniform")


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("evaluate") / "tiny")
    prior = mx.array(np.random.default_rng(0).random((3, 64), dtype=np.float32))
    mx.save_safetensors(str(folder / "prior.safetensors"), {"scores": prior})
    return load(folder)


def log_softmax(logits):
    logits = np.array(logits, dtype=np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def test_metrics_are_those_of_the_sliced_model(opened):
    model, _ = opened
    selection = model.select(ROW.prompt, keep=0.5, allocation="uniform")
    tokens = mx.array([ROW.prompt + ROW.answer])
    at = slice(len(ROW.prompt) - 1, -1)
    dense = log_softmax(model.dense()(tokens)[0])[at]
    sliced = log_softmax(model.compact(selection)(tokens)[0])[at]
    evaluator = Evaluator(model)
    found = evaluator.measure(ROW, selection.mask(), evaluator.reference(ROW))
    nll = -sliced[np.arange(3), ROW.answer].mean()
    kl = (np.exp(dense) * (dense - sliced)).sum(axis=-1).mean()
    agreement = (dense.argmax(-1) == sliced.argmax(-1)).mean()
    assert found["nll"] == pytest.approx(nll, rel=1e-4)
    assert found["kl"] == pytest.approx(kl, rel=1e-3)
    assert found["agreement"] == pytest.approx(agreement)


def test_a_dense_prefill_leaves_only_the_answer_to_the_pruned_model(opened):
    model, _ = opened
    mask = model.select(ROW.prompt, keep=0.5, allocation="uniform").mask()
    evaluator = Evaluator(model)
    first = Row(ROW.prompt, ROW.answer[:1])  # which the prompt's last token gives
    reference = evaluator.reference(first, keep_cache=True)
    free = evaluator.measure(first, mask, reference, "dense")
    assert free["kl"] == pytest.approx(0, abs=1e-6)
    assert evaluator.measure(first, mask, reference)["kl"] > 1e-3
    reference = evaluator.reference(ROW, keep_cache=True)
    found = [evaluator.measure(ROW, mask, reference, "dense") for _ in range(2)]
    assert found[0]["kl"] > 1e-3 and found[0] == found[1]  # the cache is not used up
    whole = evaluator.reference(ROW).log_probabilities
    assert mx.allclose(whole, reference.log_probabilities, atol=1e-5)


def test_keeping_everything_costs_nothing(opened):
    model, _ = opened
    whole = Setting("activation", 1.0, "uniform")
    dense, kept, half = evaluate(model, {"a": [ROW]}, [whole, HALF])
    mean = summary(kept, kept)
    assert mean["kl"] == pytest.approx(0, abs=1e-6) and mean["agreement"] == 1
    assert mean["nll"] == pytest.approx(summary(dense, kept)["nll"])
    assert kept.bytes == dense.bytes > half.bytes
    assert summary(half, kept)["kl"] > 0


@pytest.mark.parametrize("selector", ["activation", "blend", "prior", "random"])
def test_masks_are_those_that_select_gives(opened, selector):
    model, _ = opened
    evaluator = Evaluator(model)
    settings = [Setting(selector, keep, "uniform") for keep in (0.5, 0.25)]
    for _ in range(2):  # the second time after a masked pass
        found = dict(evaluator.selections(ROW, settings))
        masks = {setting: selection.mask() for setting, selection in found.items()}
        evaluator.measure(ROW, masks[settings[1]], evaluator.reference(ROW))
        options = {"selector": selector, "allocation": "uniform"}
        expected = model.select(ROW.prompt, keep=0.5, **options)
        assert mx.array_equal(masks[settings[0]], expected.mask())


@pytest.mark.parametrize("selector", ["activation", "blend"])
@pytest.mark.parametrize("prefill", ["compact", "dense"])
def test_a_compensated_setting_is_the_model_that_a_sweep_makes(
    opened, prefill, selector
):
    model, _ = opened
    setting = Setting(selector, 0.5, "first-layer", prefill, compensate=True)
    assert setting.label == f"{selector}, keep 0.5, first-layer, compensated"
    _, arm = evaluate(model, {"a": [ROW]}, [setting])
    options = {"keep": 0.5, "selector": selector, "compensate": True}
    _, compact, kv = swept(model, ROW.prompt, **options)
    tokens = mx.array([[*ROW.prompt, *ROW.answer[:-1]]])
    answer = slice(len(ROW.prompt) - 1, None)
    if prefill == "compact":
        logits = compact(tokens)[0, answer]
    else:
        rest = compact(mx.array([ROW.answer[:-1]]), cache=kv)[0]
        first = model.dense()(mx.array([ROW.prompt]))[0, -1:]
        logits = mx.concatenate([first, rest])
    q = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    dense = model.dense()(tokens)[0, answer]
    p = dense - mx.logsumexp(dense, axis=-1, keepdims=True)
    kl = (mx.exp(p) * (p - q)).sum(axis=-1).mean()
    assert arm.rows["a"][0]["kl"] == pytest.approx(float(kl), rel=1e-3)
    plain = evaluate(model, {"a": [ROW]}, [replace(setting, compensate=False)])[1]
    assert plain.rows["a"][0]["kl"] != pytest.approx(float(kl), rel=1e-3)


def test_every_file_counts_the_same():
    assert statistics.macro_mean({"many": [1.0, 1.0, 1.0], "few": [3.0]}) == 2.0


def test_both_formats_are_read(opened, tmp_path):
    _, tokenizer = opened
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    lines = [{"messages": chat}, {"prompt": "Hi", "completion": "Ho"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    first, second = read_rows(file, tokenizer)
    assert first == second and tokenizer.decode(first.answer) == "Ho"
    assert tokenizer.decode(first.prompt).endswith("assistant\n")
    assert len(read_rows(file, tokenizer, limit=1)) == 1


def test_plain_text_is_cut_in_the_middle_and_has_no_template(opened, tmp_path):
    file = tmp_path / "prose.jsonl"
    file.write_text(json.dumps({"text": "0123456789"}))
    (row,) = read_rows(file, opened[1], answer_tokens=3)
    assert opened[1].decode(row.prompt) == "01234"
    assert opened[1].decode(row.answer) == "567"


def test_the_command_compares_settings(opened, tmp_path, capsys):
    file = tmp_path / "greetings.jsonl"
    file.write_text('{"prompt": "Hi", "completion": "Hello"}\n' * 2)
    arguments = ["--model", opened[0].path, "--data", file, "--keep", "0.5"]
    status, out, _ = run_command(main, capsys, *arguments, "--json")
    report = json.loads(out.splitlines()[-1])
    assert status == 0 and "rows: greetings 2" in out
    assert "read by the compact model" in out and "by the dense model**" not in out
    settings = [r["setting"] for r in report["results"] if r["setting"]]
    assert [(s["selector"], s["allocation"]) for s in settings] == [
        ("activation", "uniform"),
        ("activation", "first-layer"),
        ("random", "uniform"),
        ("random", "first-layer"),
    ]
    assert all(len(r["rows"]["greetings"]) == 2 for r in report["results"])


def test_mistakes_are_one_line_and_exit_status_2(opened, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "Hi"}\n')
    (tmp_path / "none.jsonl").write_text("")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    for name, sentence in (
        ("gone.jsonl", "There is no data file"),
        ("bad.jsonl", "Line 1 of"),
        ("none.jsonl", "none hold no example"),
        ("list.jsonl", "Line 1 of"),
        ("deep.jsonl", "Line 1 of"),
    ):
        given = ["--model", opened[0].path, "--data", tmp_path / name]
        status, _, err = run_command(main, capsys, *given)
        assert status == 2 and sentence in err and err.count("\n") == 1


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "talk.jsonl"
    rows = [{"prompt": f"Say {word}", "completion": word} for word in ("ho", "hey!")]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def sweep_of(folder, data, output, *more):
    return ["--model", folder, "--data", data, "--output", output, *more]


def test_a_sweep_writes_a_page_figures_and_a_picture(opened, data, tmp_path, capsys):
    given = sweep_of(opened[0].path, data, tmp_path / "out", "--speed-tokens", "2")
    given += ["--keep", "0.5", "--selector", "activation", "--prefill", "compact"]
    status, out, err = run_command(main, capsys, *given, "dense")
    assert status == 0, err
    assert (tmp_path / "out/report.md").read_text().strip() == out.strip()
    for words in ("read by the compact model**", "read by the dense model**", "8 bits"):
        assert words in out
    assert (tmp_path / "out/quality.png").stat().st_size > 1000
    results = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert [r["name"] for r in results][0] == "dense" and len(results) == 6
    assert all(r["tokens_per_second"] > 0 and r["bytes"] > 0 for r in results)
    first, other = results[1:3]
    assert first["kl_minus_first"] is None
    low, high = other["kl_minus_first"]
    difference = other["kl"] - first["kl"]
    assert low - 1e-9 <= difference <= high + 1e-9


def test_a_stopped_sweep_goes_on_where_it_was(
    opened, data, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    given = sweep_of(opened[0].path, data, out, "--speed-tokens", "0", "--json")
    _, whole, _ = run_command(main, capsys, *given)
    lines = (out / "rows.jsonl").read_text().splitlines(keepends=True)
    (out / "rows.jsonl").write_text("".join(lines[:-3]) + lines[-3][:20])  # killed
    read = []
    reference = Evaluator.reference

    def counted(self, row, **options):
        read.append(row)
        return reference(self, row, **options)

    monkeypatch.setattr(Evaluator, "reference", counted)
    _, again, _ = run_command(main, capsys, *given)
    assert len(read) == 1  # only the row that is incomplete
    figures = [json.loads(text.splitlines()[-1])["results"] for text in (whole, again)]
    assert figures[0] == figures[1]
    run_command(main, capsys, *given)
    assert len(read) == 1  # nothing was left to measure


def test_results_of_another_model_are_not_mixed(opened, data, tmp_path, capsys):
    out = tmp_path / "out"
    other = write_folder(tmp_path / "other", seed=5)
    run_command(main, capsys, *sweep_of(opened[0].path, data, out, "--no-alternatives"))
    status, _, err = run_command(main, capsys, *sweep_of(other, data, out))
    assert status == 2 and "was begun with model 'tiny', not 'other'" in err


def test_the_size_of_a_quantised_rival_is_foretold(opened):
    model, _ = opened
    for bits in (8, 4, 3):
        foretold = quantised_bytes(model.dense(), bits)
        halves = {mx.float32: 2, mx.uint32: 4}
        arrays = dict(tree_flatten(quantised(model, bits).model.parameters())).values()
        assert foretold == sum(a.size * halves[a.dtype] for a in arrays)
    assert weight_bytes(model.dense()) > foretold


def test_a_selection_has_the_size_of_its_compact_model(opened):
    model, _ = opened
    compact = model.compact(model.select([5, 6], keep=0.25, allocation="uniform"))
    (_, arm) = measurement.arms_of(model, [Setting("random", 0.25, "uniform")], [], ROW)
    assert arm.bytes == weight_bytes(compact)


def test_a_smaller_model_with_the_same_tokens_has_a_kl(opened, data, tmp_path, capsys):
    small = write_folder(tmp_path / "small", num_hidden_layers=2)
    given = ["--model", opened[0].path, "--data", data, "--smaller-model", small]
    _, out, _ = run_command(main, capsys, *given, "--json")
    last = json.loads(out.splitlines()[-1])["results"][-1]
    assert last["name"] == "dense, small" and last["kl"] > 0
    assert "NLL per byte" not in out


def test_a_smaller_model_inside_another_has_a_vocabulary_too(opened, tmp_path):
    small = smaller(str(write_family(tmp_path / "small", "mistral3")), opened[0])
    assert small.tokenizer is None  # as many tokens, and the same


def test_a_smaller_model_with_other_tokens_is_compared_by_bytes(
    opened, data, tmp_path, capsys
):
    small = write_folder(tmp_path / "small", vocab_size=260)
    text = (small / "tokenizer.json").read_text()
    (small / "tokenizer.json").write_text(text.replace('"a":', '"bb":', 1))
    given = ["--model", opened[0].path, "--data", data, "--smaller-model", small]
    _, out, _ = run_command(main, capsys, *given, "--json")
    last = json.loads(out.splitlines()[-1])["results"][-1]
    assert last["kl"] is None and last["nll_per_byte"] > 0
    assert "NLL per byte" in out


def test_rows_say_the_same_in_other_tokens(opened, data):
    tokenizer = opened[1]
    (row, _) = read_rows(data, tokenizer, answer_tokens=1)
    assert retokenize(row, tokenizer, tokenizer) == row
    assert same_tokens(tokenizer, tokenizer)


def test_intervals_hold_what_is_known():
    rng = np.random.default_rng(1)
    low, high = statistics.bootstrap({"a": list(rng.normal(3, 1, 400))})
    assert low < 3 < high and 0.15 < high - low < 0.25  # 4 standard errors of 1/20
    assert statistics.bootstrap({"a": [2.0] * 5, "b": [4.0]}) == (3.0, 3.0)
    low, high = statistics.binomial_interval(45, 100)  # Wilson, by hand
    assert (low, high) == pytest.approx((0.3561, 0.5476), abs=1e-4)
    assert statistics.binomial_interval(0, 10)[0] == 0
    assert statistics.binomial_interval(10, 10)[1] == 1
    assert statistics.mcnemar(1, 6) == pytest.approx(16 / 128)
    assert statistics.mcnemar(0, 0) == statistics.mcnemar(3, 3) == 1


def test_a_quantised_compact_model_is_the_one_that_compact_writes(opened, tmp_path):
    from mlx_lm.utils import load_model

    from ifp_mlx.model.export import Quantisation, write_compact

    model, _ = opened
    selection = model.select(ROW.prompt, keep=0.5, allocation="uniform")
    how = Quantisation(4, 32)
    folder = write_compact(model, selection, tmp_path / "out", quantisation=how)
    written, _ = load_model(folder)
    small = QuantisedCompact(model, 4)
    small.of(model.select([7, 8], keep=0.5, allocation="uniform").mask())
    made = small.of(selection.mask())  # the second mask, from whole weights again
    tokens = mx.array([ROW.prompt])
    assert mx.allclose(made(tokens), written(tokens), atol=1e-5)
    by_text = selection.compensated(ROW.prompt, "a prompt")
    folder = write_compact(model, by_text, tmp_path / "better", quantisation=how)
    compact = model.compact(by_text)
    small.round(compact)
    assert mx.allclose(compact(tokens), load_model(folder)[0](tokens), atol=1e-5)
    setting = Setting("random", 0.5, "uniform", bits=4)
    (_, arm) = measurement.arms_of(model, [setting], [], ROW)
    assert arm.bytes == weight_bytes(written)


def test_widths_that_cannot_be_quantised_are_named(opened, data, capsys):
    given = ["--model", opened[0].path, "--data", data, "--keep", "0.6", "-q"]
    status, _, err = run_command(main, capsys, *given)
    assert status == 2 and "keeps 38 channels, no multiple" in err and "32 or 64" in err


def test_bits_are_the_nearest_and_the_most_that_fit(opened):
    dense = opened[0].dense()
    can = {bits: quantised_bytes(dense, bits) for bits in (8, 6, 5, 4, 3, 2)}
    assert choose_bits(dense, [can[4] + 1]) == [4]
    assert choose_bits(dense, [can[3] - 1]) == [3, 2]  # the nearest is a bit too large
    assert choose_bits(dense, [can[8] * 2, can[8] * 3]) == [8]
    assert choose_bits(dense, [can[8]], below=4) == [3]
    assert choose_bits(dense, [can[2] // 2]) == [2]  # the nearest, and none fits


def test_the_page_says_how_many_selections_a_whole_model_beats():
    def arm(name, kl, size, setting=None):
        line = {"kl": kl, "nll": 1.0, "nll_per_byte": 0.5, "agreement": 0.5}
        return measurement.Arm(name, setting, size, None, {"a": [line]})

    arms = [arm("dense", 0, 100)]
    arms += [arm(f"s{n}", kl, 50, HALF) for n, kl in enumerate((0.5, 2.0))]
    arms += [arm("tiny", 3.0, 10, HALF), arm("4 bits", 1.0, 49)]
    about = {"model": "m", "rows": {"a": 1}, "tokens": 0}
    assert "measured beside 2 selections" in report(arms, about)
    assert "nearer to the dense model than 1 of" in report(arms, about)
    assert "No whole model that is no larger" in report(arms[:-1], about)
