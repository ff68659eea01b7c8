"""Joint training on a real model: its data, its arms, PyTorch's step against MLX's."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_model, write_folder
from mlx.utils import tree_flatten

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from transformers import LlamaForCausalLM, LlamaModel

from examples.benchmarks.joint import data, run, torch_step
from examples.benchmarks.joint.measure import PromptMasks, measure
from ifp_mlx.selection import top_k
from ifp_mlx.selection.predictor import SparsityPredictor
from ifp_mlx.slicing import reading
from ifp_mlx.slicing.plan import plan_of
from ifp_mlx.training.batches import Batch
from ifp_mlx.training.maskers import FixedMask, Masker, PredictorMasker
from ifp_mlx.training.recipe import TrainConfig
from ifp_mlx.training.step import Pair, Step

pytestmark = pytest.mark.torch
torch.set_num_threads(1)
STEPS, K = 3, 24


def drawn(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    prompt = rng.integers(4, 9, 6)
    return {
        "tokens": rng.integers(0, 256, (6, 16)),
        "prompt": prompt,
        "length": prompt + rng.integers(1, 8, 6),
        "task": rng.integers(0, 2, 6),
    }


def mlx_batch(rows: dict[str, np.ndarray]) -> Batch:
    place = np.arange(rows["tokens"].shape[1])[None]
    answer = place >= rows["prompt"][:, None]
    answer &= place < rows["length"][:, None]
    return Batch(
        mx.array(rows["tokens"].astype(np.int32)),
        mx.array(rows["prompt"].astype(np.int32)),
        mx.array(rows["tokens"].astype(np.int32)),
        mx.array(answer.astype(np.float32)),
        mx.array(rows["task"].astype(np.int32)),
    )


def torch_batch(rows: dict[str, np.ndarray]) -> torch_step.Batch:
    return torch_step.Batch(*map(torch.from_numpy, rows.values()))


def run_mlx(masker: Masker) -> tuple[list[float], dict[str, np.ndarray]]:
    config = TrainConfig(
        steps=STEPS, lr=1e-2, masker_lr=1e-3, warmup=1, target_size=K, compile=False
    )
    pair = Pair(tiny_model("llama"), masker)
    step = Step(pair, config, compiled=False)
    reports = [
        step([mlx_batch(drawn(2 * n)), mlx_batch(drawn(2 * n + 1))], config.budget(64))
        for n in range(STEPS)
    ]
    found = {n: np.array(v) for n, v in tree_flatten(pair.parameters())}
    return [float(r["loss"]) for r in reports], found


def run_torch(folder, masker) -> tuple[list[float], dict[str, np.ndarray]]:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = torch_step.Settings(STEPS, lr=1e-2, masker_lr=1e-3, warmup=1, k=K)
    step = torch_step.Step(model, masker, settings)
    reports = [
        step([torch_batch(drawn(2 * n)), torch_batch(drawn(2 * n + 1))])
        for n in range(STEPS)
    ]
    found = {
        f"{part}.{n}": p.detach().numpy()
        for part, module in (("llm", model), ("masker", masker))
        for n, p in module.named_parameters()
    }
    return [float(r["loss"]) for r in reports], found


def predictors(tmp_path) -> tuple[SparsityPredictor, torch_step.Predictor]:
    """Return one predictor in both frameworks."""
    about = {"num_hidden_layers": 1}
    ours = SparsityPredictor(
        tiny_model("llama", 1, **about), 3, 64, rank=8, pooling="mean"
    )
    ours.expand.weight = 5 * ours.expand.weight
    ours.backbone.model.embed_tokens.freeze()
    ours.backbone.lm_head.freeze()
    folder = write_folder(tmp_path / "backbone", seed=1, **about)
    backbone = LlamaModel.from_pretrained(folder, dtype=torch.float32)
    theirs = torch_step.Predictor(backbone, 3, 64, 8)
    theirs.backbone.embed_tokens.requires_grad_(False)
    for name in ("reduce", "expand"):
        for kind in ("weight", "bias"):
            value = np.array(getattr(ours, name)[kind])
            getattr(getattr(theirs, name), kind).data = torch.from_numpy(value)
    return ours, theirs


def assert_same(ours, theirs) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    renamed = {}
    for name, value in ours[1].items():
        name = name.replace("masker.predictor.", "masker.")
        renamed[name.replace("backbone.model.", "backbone.")] = value
    assert set(theirs[1]) <= set(renamed)
    for name, value in theirs[1].items():
        # Weights move by about 1e-2. Where a gradient is nearly 0, Adam lets rounding
        # errors grow, so single weights may differ by more than the mean.
        assert np.abs(value - renamed[name]).mean() < 2e-6, name


def test_soft_top_k_is_the_same_in_both():
    scores = np.random.default_rng(0).normal(size=(5, 3, 64)).astype(np.float32)
    for k in (1, 24, 63):
        ours = top_k.soft_top_k(mx.array(scores), k, 0.3)
        theirs = torch_step.soft_top_k(torch.from_numpy(scores), k, 0.3)
        assert np.abs(np.array(ours) - theirs.numpy()).max() < 1e-5


def test_steps_with_a_predictor_are_the_same_in_both(tmp_path):
    ours, theirs = predictors(tmp_path)
    before = ours.reduce.weight
    found = run_mlx(PredictorMasker(ours))
    assert float(mx.abs(ours.reduce.weight - before).max()) > 1e-4
    assert_same(found, run_torch(write_folder(tmp_path / "model"), theirs))


def test_steps_with_a_mask_per_task_are_the_same_in_both(tmp_path):
    chosen = np.random.default_rng(0).random((2, 3, 64)) < 0.4
    given = chosen.astype(np.float32)
    found = run_mlx(FixedMask(mx.array(given)))
    theirs = torch_step.FixedMasks(torch.from_numpy(given))
    assert_same(found, run_torch(write_folder(tmp_path / "model"), theirs))


def test_selection_by_the_prompt_is_the_package_s(tmp_path):
    rows = drawn(0)
    folder = write_folder(tmp_path / "model")
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = torch_step.Settings(1, 0.0, 0.0, 0, K)
    found = PromptMasks(model)(torch_batch(rows), settings).numpy()
    for row, mask in enumerate(found):
        prompt = rows["tokens"][row, : rows["prompt"][row]]
        scores = reading.scores(
            tiny_model("llama"), plan_of(tiny_model("llama")), [(prompt.tolist(),)]
        )
        assert np.array_equal(np.array(top_k.select(scores, [K] * 3).mask()), mask)


def test_overlaps_are_the_means_over_pairs_of_rows(tmp_path):
    rows = small_rows(24)
    folder = write_folder(tmp_path / "model")
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = torch_step.Settings(1, 0.0, 0.0, 0, K)
    masker = PromptMasks(model)
    seen = measure(model, masker, settings, to_batch, rows)
    every = masker(to_batch(rows), settings).numpy()
    shared = np.einsum("ilf,jlf->ijl", every, every) / K
    tasks = range(3)
    own = [np.flatnonzero(rows.task == task) for task in tasks]
    within = [
        shared[a, b] for rows_of in own for a in rows_of for b in rows_of if a != b
    ]
    between = [
        shared[a, b]
        for s in tasks
        for t in tasks
        if s != t
        for a in own[s]
        for b in own[t]
    ]
    assert np.allclose(seen["within"], np.mean(within, axis=0), atol=1e-5)
    assert np.allclose(seen["between"], np.mean(between, axis=0), atol=1e-5)


def small_rows(count: int) -> data.Rows:
    rng = np.random.default_rng(1)
    prompt = rng.integers(4, 9, count)
    tokens = rng.integers(0, 250, (count, 16)).astype(np.uint16)
    task = np.arange(count) % 3
    return data.Rows(tokens, prompt, prompt + 3, task)


def to_batch(rows: data.Rows) -> torch_step.Batch:
    return torch_step.Batch(
        *(torch.from_numpy(getattr(rows, c).astype(np.int64)) for c in data.COLUMNS)
    )


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """Return the command line of a run on a tiny model, a few rows and a random start."""
    folder = tmp_path / "joint"
    folder.mkdir()
    names = ["facts", "instructions", "test facts", "test seen", "test unseen"]
    sets = {name: small_rows(24) for name in names}
    data.save(folder / "rows.npz", sets, {"facts": 12, "tasks": ["a", "b", "c"]})
    rng = np.random.default_rng(0)
    sizes = {"prior": (3, 64), "codes": (3, 4)}
    for kind in ("added", "apart"):
        sizes[f"{kind}.reduce.weight"], sizes[f"{kind}.reduce.bias"] = (4, 32), (4,)
        sizes[f"{kind}.expand.weight"], sizes[f"{kind}.expand.bias"] = (192, 4), (192,)
    start = {n: rng.normal(size=s).astype(np.float16) for n, s in sizes.items()}
    np.savez(folder / "start.npz", **start)
    monkeypatch.setattr(run, "FACT_ROWS", 8)
    monkeypatch.setattr(run, "INSTRUCTION_ROWS", 4)
    monkeypatch.setattr(run, "WARM_STEPS", 10)
    model = write_folder(tmp_path / "model", num_hidden_layers=3)
    options = {"--model": model, "--data": folder, "--output": tmp_path / "out"}
    words = [str(word) for pair in options.items() for word in pair]
    return [*words, "--steps", "6", "--no-compile"]


def test_every_kind_of_arm_runs_and_is_not_run_again(prepared, tmp_path, monkeypatch):
    kinds = ("static", "apart", "dense", "oracle", "added")
    monkeypatch.setattr(run, "ARMS", [run.Arm(kind, 0.5, 0) for kind in kinds])
    run.main([*prepared, "--lr", "1e-3"])
    files = {
        path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()
    }
    assert len(files) == len(kinds)
    orders = set()
    for path in (tmp_path / "out").iterdir():
        with np.load(path) as found:
            about = json.loads(str(found["about"]))
            assert len(found["facts.nll"]) == 24
            differ = about["arm"]["kind"] in ("apart", "oracle", "added")
            assert ("facts.within" in found) == differ
        steps = [line for line in about["log"] if "loss" in line]
        assert len(steps) == 6
        orders.add(tuple(line["of"] for line in steps))
    assert len(orders) == 1
    run.main([*prepared, "--lr", "1e-3"])
    assert files == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}


def test_the_pilot_chooses_the_rate_with_the_lowest_last_losses(prepared, monkeypatch):
    lab = run.open_lab(*(Path(prepared[n]) for n in (1, 3)), compiled=False)
    monkeypatch.setattr(run, "RATES", (1e-6, 1e-2))
    settings = torch_step.Settings(12, 0.0, 0.0, 1, 21)
    said = []
    assert run.choose_rate(lab, settings, said.append) == 1e-2
    assert len(said) == 2


def test_seeds_differ_in_their_order_and_arms_of_a_seed_do_not(prepared):
    rows = run.Data(Path(prepared[3]) / "rows.npz", "cpu")
    first, again, other = (
        [batch.tokens for batch in rows.steps(6, seed)] for seed in (0, 0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    found = Tokenizer(models.BPE({token: n for n, token in enumerate(alphabet)}, []))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return found


def test_what_a_row_holds_comes_back_as_text(tokenizer, tmp_path):
    texts = [("What is é?", "an é", 1), ("x" * 90, "too long", 0), ("Hi", "", 0)]
    rows = data.encode(tokenizer, texts, 64)
    assert rows.task.tolist() == [1, 0]
    data.write_jsonl(tmp_path / "train.jsonl", tokenizer, [rows], ["a", "b"])
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    assert list(map(json.loads, lines)) == [
        {"prompt": "What is é?", "completion": "an é", "task": "b"},
        {"prompt": "Hi", "completion": "", "task": "a"},
    ]


def test_facts_conflict_and_no_wording_is_both_trained_and_tested(
    tokenizer, monkeypatch
):
    pytest.importorskip("babel")
    monkeypatch.setattr(data, "LANGUAGES", ("fi", "pl"))
    monkeypatch.setattr(data, "FACT_TOKENS", 140)
    tasks = data.fact_tasks()
    finnish, polish = (task.facts for task in tasks[:2])
    assert finnish["Germany"] != polish["Germany"]
    train, test, count = data.fact_rows(tokenizer, tasks)
    assert len(train) == data.EPOCHS * count
    assert len(test) == 4 * data.HELD_OUT["facts"]
    texts = [
        {
            tokenizer.decode(r[:p].tolist())
            for r, p in zip(x.tokens, x.prompt, strict=True)
        }
        for x in (train, test)
    ]
    assert not texts[0] & texts[1]
    first, second = (train.pick(slice(n * count, (n + 1) * count)) for n in (0, 1))
    assert np.array_equal(first.task, second.task)  # every epoch has every fact
