import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import run_command, write_folder

from ifp_mlx import load
from ifp_mlx.evaluate import (
    Evaluator,
    Row,
    Setting,
    evaluate,
    main,
    read_rows,
    summary,
)

ROW = Row([5, 9, 77, 200], [13, 40, 41])
HALF = Setting("activation", 0.5, "uniform")


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    return load(write_folder(tmp_path_factory.mktemp("evaluate") / "tiny"))


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
    compact, dense = Evaluator(model), Evaluator(model, dense_prefill=True)
    first = Row(ROW.prompt, ROW.answer[:1])  # which the prompt's last token gives
    reference = dense.reference(first)
    assert dense.measure(first, mask, reference)["kl"] == pytest.approx(0, abs=1e-6)
    assert compact.measure(first, mask, reference)["kl"] > 1e-3
    assert dense.measure(ROW, mask, dense.reference(ROW))["kl"] > 1e-3


def test_keeping_everything_costs_nothing(opened):
    model, _ = opened
    whole = Setting("activation", 1.0, "uniform")
    results = evaluate(model, {"a": [ROW]}, [whole, HALF])
    mean = summary(results)
    assert mean[whole]["kl"] == pytest.approx(0, abs=1e-6)
    assert mean[whole]["agreement"] == 1 and mean[HALF]["kl"] > 0


def test_scores_are_those_of_an_unmasked_model(opened):
    model, _ = opened
    evaluator = Evaluator(model)
    settings = [HALF, Setting("activation", 0.25, "uniform")]
    for _ in range(2):  # the second time after a masked pass
        masks = dict(evaluator.masks(ROW, settings))
        evaluator.measure(ROW, masks[settings[1]], evaluator.reference(ROW))
        expected = model.select(ROW.prompt, keep=0.5, allocation="uniform")
        assert mx.array_equal(masks[HALF], expected.mask())


def test_every_file_counts_the_same():
    def file(*values):
        return {metric: list(values) for metric in ("nll", "kl", "agreement")}

    results = {HALF: {"many": file(1.0, 1.0, 1.0), "few": file(3.0)}}
    assert summary(results)[HALF]["kl"] == 2.0


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
    assert status == 0 and "rows: greetings 2; prompt read by the compact model" in out
    settings = [result["setting"] for result in report["results"]]
    assert [(s["selector"], s["allocation"]) for s in settings] == [
        ("activation", "uniform"),
        ("activation", "first-layer"),
        ("random", "uniform"),
        ("random", "first-layer"),
    ]
    assert all(len(r["rows"]["greetings"]["kl"]) == 2 for r in report["results"])


def test_mistakes_are_one_line_and_exit_status_2(opened, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "Hi"}\n')
    (tmp_path / "none.jsonl").write_text("")
    for name, sentence in (
        ("gone.jsonl", "There is no data file"),
        ("bad.jsonl", "Line 1 of"),
        ("none.jsonl", "none hold no example"),
    ):
        given = ["--model", opened[0].path, "--data", tmp_path / name]
        status, _, err = run_command(main, capsys, *given)
        assert status == 2 and sentence in err and err.count("\n") == 1
