"""Recovery: a compact model that learns from the dense one's answers on disk."""

import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import relative_error, run_command, tiny_model, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from ifp_mlx import Selection, load
from ifp_mlx import train as train_module
from ifp_mlx.evaluation.rows import read_rows
from ifp_mlx.evaluation.teacher import log_probabilities, metrics
from ifp_mlx.model.export import MASK_FILE
from ifp_mlx.training import run as training_run
from ifp_mlx.training.batches import Record, collate
from ifp_mlx.training.parent_cache import PART, Form, compress, fill_cache, weights_of
from ifp_mlx.training.step import divergence

ROWS = [
    {"prompt": f"Say {word} in {tongue}.", "completion": f"{word}! {tongue[:2]}"}
    for word in ("water", "bread", "house", "night")
    for tongue in ("French", "Polish", "Latin")
]


def records(count=5, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        tokens = rng.integers(0, 250, 6 + number % 3).astype(np.int32)
        loss = np.ones(len(tokens), dtype=np.float32)
        made.append(Record(tokens, tokens, loss, number))
    return made


def exact(student, teacher, batch):
    tokens = batch.tokens[:, :-1]
    return divergence(student(tokens), teacher(tokens), batch).sum()


def test_keeping_all_tokens_gives_the_exact_divergence(tmp_path):
    teacher, student = tiny_model("llama"), tiny_model("llama", 1)
    made = records()
    cache = fill_cache(tmp_path, lambda: teacher, made, Form(258, 1), {})
    batch = collate(made)
    found = divergence(student(batch.tokens[:, :-1]), cache(batch), batch).sum()
    assert float(found) == pytest.approx(
        float(exact(student, teacher, batch)), rel=2e-3
    )


@settings(max_examples=8)
@given(st.integers(1, 20), st.integers(1, 12), st.integers(0, 99))
def test_the_estimate_is_right_on_average(top, samples, seed):
    rng = np.random.default_rng(seed)
    p, q = (rng.normal(0, 2, (1, 40)) for _ in range(2))
    p, q = (x - np.log(np.exp(x).sum()) for x in (p, q))
    form = Form(top, samples)
    kept = compress(np.repeat(p, 1500, axis=0).astype(np.float32), form, rng)
    assert all(len(set(row)) == top for row in kept["ids"][:5, :top])
    logp = kept["logp"].astype(np.float64)
    weights = weights_of(logp, form)
    estimates = (weights * (logp - q[0][kept["ids"]])).sum(axis=1)
    truth = (np.exp(p) * (p - q)).sum()
    error = 6 * estimates.std() / np.sqrt(1500) + 3e-3 * abs(p).max()
    assert estimates.mean() == pytest.approx(truth, abs=error)


def test_top_tokens_alone_would_be_too_little():
    p = np.log(np.array([[0.5, 0.1, 0.1, 0.1, 0.1, 0.1]], dtype=np.float32))
    kept = compress(p, Form(1, 5), np.random.default_rng(0))
    assert kept["ids"][0].tolist()[0] == 0
    assert sorted(kept["ids"][0].tolist()[1:]) == [1, 2, 3, 4, 5]


def test_a_killed_cache_goes_on_and_ends_with_the_same_bytes(tmp_path):
    teacher, made = tiny_model("llama"), records(2 * PART + 3)
    read = []

    def count(parts):
        for part in parts:
            read.append(part)
            yield part

    def killed(parts):
        for part in parts:
            if part == 1:
                raise KeyboardInterrupt
            yield part

    form = Form(8, 4)
    with pytest.raises(KeyboardInterrupt):
        fill_cache(tmp_path / "cut", lambda: teacher, made, form, {}, progress=killed)
    fill_cache(tmp_path / "cut", lambda: teacher, made, form, {}, progress=count)
    fill_cache(tmp_path / "whole", lambda: teacher, made, form, {})
    assert read == [1, 2]
    for path in sorted((tmp_path / "whole").iterdir()):
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()


def test_a_damaged_part_is_computed_again_and_a_whole_cache_needs_no_parent(tmp_path):
    teacher, made = tiny_model("llama"), records(PART + 1)
    form, batch = Form(8, 4), collate(made[:3])
    before = fill_cache(tmp_path, lambda: teacher, made, form, {})(batch)
    fill_cache(tmp_path, lambda: pytest.fail("opened"), made, form, {})
    path = tmp_path / "part-00000.npy"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 255
    path.write_bytes(damaged)
    after = fill_cache(tmp_path, lambda: teacher, made, form, {})(batch)
    assert all(mx.array_equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("change", ["records", "form", "model"])
def test_a_cache_of_something_else_is_refused(change, tmp_path):
    teacher, made = tiny_model("llama"), records()
    fill_cache(tmp_path, lambda: teacher, made, Form(8, 4), {"model": "a"})
    other = records(seed=1) if change == "records" else made
    form = Form(9, 3) if change == "form" else Form(8, 4)
    about = {"model": "b" if change == "model" else "a"}
    with pytest.raises(ValueError, match="holds what the dense model said about"):
        fill_cache(tmp_path, lambda: teacher, other, form, about)


def test_a_token_takes_few_bytes_and_padding_weighs_nothing(tmp_path):
    made = records()
    form = Form(8, 4)
    cache = fill_cache(tmp_path, lambda: tiny_model("llama"), made, form, {})
    assert cache.bytes_per_token == 12 * (2 + 2)
    assert form.dtype(256_000).itemsize == 12 * (4 + 2)
    tokens = sum(len(record.tokens) - 1 for record in made)
    on_disk = (tmp_path / "part-00000.npy").stat().st_size
    assert on_disk - 48 * tokens < 200  # the header
    _, weights, _ = cache(collate(made))
    lengths = [len(record.tokens) - 1 for record in made]
    sums = np.array(weights.sum(axis=-1))
    for row, length in zip(sums, lengths, strict=True):
        np.testing.assert_allclose(row[:length], 1, atol=1e-3)
        assert not row[length:].any()


@pytest.fixture
def work(tmp_path):
    """A model, data in its two splits, and a mask file."""
    folder = write_folder(tmp_path / "tiny")
    model, _ = load(folder)
    selection = model.select("Say water", keep=0.5, allocation="uniform")
    selection.save(tmp_path / "mask.safetensors")
    (tmp_path / "data").mkdir()
    for split, part in {"train": ROWS[:9], "valid": ROWS[9:]}.items():
        text = "".join(json.dumps(row) + "\n" for row in part)
        (tmp_path / "data" / f"{split}.jsonl").write_text(text)
    return tmp_path


def recover(work, capsys, *more, output="run", steps=30):
    return run_command(
        train_module.main, capsys, "--stage", "recover", "--model", work / "tiny",
        "--data", work / "data", "--mask-file", work / "mask.safetensors",
        "--output", work / output, "--steps", steps, "--batch-size", 3, "--lr", 3e-3,
        "--parent-top", 64, "--no-compile", "--json", *more,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["ffn", "full", "lora"])
def test_the_recovered_folder_is_closer_and_its_card_tells_the_truth(
    kind, work, capsys
):
    from mlx_lm import load as stock_load

    # LoRA layers start at zero, and their scale of 20 makes every step a long one.
    rate = 3e-4 if kind == "lora" else 3e-3
    status, out, err = recover(work, capsys, "--train", kind, "--lr", rate)
    assert status == 0, err
    report = json.loads(out.splitlines()[-1])
    assert report["kl_after"] < report["kl_before"]
    folder = work / "run" / "model"
    compact, tokenizer = stock_load(str(folder))
    dense = load(work / "tiny")[0].dense()
    rows = read_rows(work / "data" / "valid.jsonl", tokenizer)
    # The trainer also learns the token that ends an answer.
    found = []
    for row in rows:
        whole = row.answer + tokenizer.encode("<|im_end|>\n", add_special_tokens=False)
        row = type(row)(row.prompt, whole)
        a, b = (log_probabilities(m, row) for m in (compact, dense))
        found.append(metrics(row, a, b)["kl"])
    assert np.mean(found) == pytest.approx(report["kl_after"], rel=1e-4)
    card = (folder / "README.md").read_text()
    assert f"before and is {report['kl_after']:.3f} now" in card
    assert "| Quantisation | none |" in card
    saved = Selection.load(folder / MASK_FILE)
    assert saved.mask_id == report["mask_id"] and saved.trained
    assert json.loads((folder / "config.json").read_text())["intermediate_size"] == 32


def test_a_recovered_folder_can_be_quantised_and_selected_from(work, capsys):
    from mlx_lm import convert
    from mlx_lm import load as stock_load

    assert recover(work, capsys, steps=2)[0] == 0
    folder, small = work / "run" / "model", work / "small"
    convert(str(folder), mlx_path=str(small), quantize=True, q_group_size=32, q_bits=8)
    tokens = mx.array([[5, 9, 77, 200]])
    whole, quantised = (stock_load(str(path))[0](tokens) for path in (folder, small))
    assert relative_error(quantised, whole) < 0.05
    model, _ = load(folder)
    assert model.channels == 32
    assert model.compact(model.select("Say", keep=0.5))(tokens).shape == whole.shape


def test_only_ffns_and_norms_change_by_default(work, capsys):
    assert recover(work, capsys, "--no-compensate", steps=2)[0] == 0
    selection = Selection.load(work / "mask.safetensors")
    before = dict(tree_flatten(load(work / "tiny")[0].compact(selection).parameters()))
    after = dict(tree_flatten(load(work / "run" / "model")[0].dense().parameters()))
    changed = {name for name in before if not mx.array_equal(before[name], after[name])}
    assert changed and all("mlp." in name or "norm" in name for name in changed)


def test_a_recovery_that_is_stopped_goes_on_to_the_same_end(work, capsys, monkeypatch):
    assert recover(work, capsys, "--save-every", 2, output="whole", steps=4)[0] == 0
    real, calls = training_run.Step.__call__, []

    def stop(self, *arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(training_run.Step, "__call__", stop)
    assert recover(work, capsys, "--save-every", 2, output="cut", steps=4)[0] == 130
    model, _ = load(work / "tiny")
    other = model.select("Anything else", keep=0.5, allocation="uniform")
    mask = work / "mask.safetensors"
    kept = mask.read_bytes()
    other.save(mask)
    status, _, err = recover(work, capsys, "--save-every", 2, output="cut", steps=4)
    assert status == 2 and f"not {other.mask_id}" in err
    mask.write_bytes(kept)
    assert recover(work, capsys, "--save-every", 2, output="cut", steps=4)[0] == 0
    ends = [
        mx.load(str(work / n / "model/model.safetensors")) for n in ("whole", "cut")
    ]
    assert all(mx.array_equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert len(calls) == 6  # steps 1 to 3, the stop, then 3 and 4 again


def test_plain_text_is_learned_whole(work, capsys):
    for split in ("train", "valid"):
        text = "".join(
            json.dumps({"text": f"A story of number {n} and more."}) + "\n"
            for n in range(4)
        )
        (work / "data" / f"{split}.jsonl").write_text(text)
    status, out, err = recover(work, capsys, steps=2)
    assert status == 0, err
    assert json.loads(out.splitlines()[-1])["kl_before"] > 0


def test_mistakes_are_one_line(work, capsys):
    other, _ = load(write_folder(work / "other", seed=4))
    other.select("Hi", keep=0.5).save(work / "other.safetensors")
    mistakes = {
        "was made for another model": ["--mask-file", work / "other.safetensors"],
        "no mask file": ["--mask-file", work / "gone.safetensors"],
        "leave out masker": ["--masker", "static"],
        "parent_top=0": ["--parent-top", 0],
        "no task 'sql'": ["--task", "sql"],
    }
    for message, options in mistakes.items():
        status, _, err = recover(work, capsys, *options, steps=1)
        assert status == 2 and message in err and err.count("\n") == 1, err
    status, _, err = run_command(
        train_module.main, capsys, "--stage", "recover", "--model", work / "tiny",
        "--data", work / "data", "--output", work / "none",
    )  # fmt: skip
    assert status == 2 and "give --mask-file or --task" in err
