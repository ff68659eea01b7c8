"""A mixture is trained as its card says, and the one in the repository answers."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

pytest.importorskip("babel")
pytest.importorskip("reasoning_gym")

from examples.benchmarks.comparison.corpus import Corpus
from examples.benchmarks.comparison.lab import Scale
from examples.benchmarks.comparison.tasks import all_tasks, examples
from examples.benchmarks.experts import train
from examples.benchmarks.experts.routing import imbalance, read, routers_in_training
from ifp_mlx.slicing.stock import build

TASKS = all_tasks()
SCALE = Scale(width=16, layers=2, batch_size=16, steps=4)
TINY = train.Recipe(SCALE, experts=8, width=8, smallest_pool=2, drawn=100)


@pytest.fixture
def batch():
    return Corpus(examples(TASKS, "train", 40, seed=0), 16)(0)


@pytest.fixture
def mixture():
    mx.random.seed(0)
    return build(TINY.config())


def chosen(routers, model, batch, sizes):
    """Return the experts that each row may choose, as every router sees its tokens."""
    x = model.model.embed_tokens(batch.tokens[:, :-1])
    found = []
    for router in routers:
        router._reading = read(batch, sizes)
        found.append(np.isfinite(np.array(router(x))).any(axis=1))
    return np.stack(found)  # [L, B, E]


def test_balance_is_1_for_the_same_use_of_all_experts_and_grows_with_what_is_not():
    logits = mx.random.normal((4, 500, 8), key=mx.random.key(0))
    real = mx.ones((4, 500))
    same = imbalance(mx.softmax(1e-3 * logits, axis=-1), logits, real, 2)
    assert same.item() == pytest.approx(1, abs=0.01)
    one = logits + 1e3 * (mx.arange(8) < 2)
    two_only = mx.broadcast_to((mx.arange(8) < 2) / 2, one.shape)
    assert imbalance(two_only, one, real, 2).item() == pytest.approx(4)


def test_padding_counts_for_nothing_in_the_balance():
    logits = mx.random.normal((2, 6, 8), key=mx.random.key(0))
    real = (mx.arange(6) < 4).astype(mx.float32)[None] * mx.ones((2, 1))
    chances = mx.softmax(logits, axis=-1)
    cut = imbalance(chances[:, :4], logits[:, :4], real[:, :4], 2)
    assert imbalance(chances, logits, real, 2).item() == pytest.approx(cut.item())


def test_rows_of_one_domain_choose_among_one_pool_of_the_size_drawn(mixture, batch):
    routers = routers_in_training(mixture, 2)
    sizes = TINY.pools(0, len(TASKS))
    allowed = chosen(routers, mixture, batch, sizes)
    tasks = np.array(batch.tasks)
    for task in set(tasks.tolist()):
        rows = allowed[:, tasks == task]
        assert (rows == rows[:, :1]).all()
        assert (rows.sum(axis=-1) == sizes[task]).all()


def test_no_answer_shows_through_the_pools(mixture, batch):
    routers = routers_in_training(mixture, 2)
    sizes = [3] * len(TASKS)
    answers = batch.loss_mask > 0
    other = batch._replace(tokens=mx.where(answers, 7, batch.tokens))
    before, after = (chosen(routers, mixture, b, sizes) for b in (batch, other))
    assert (before == after).all()


def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    batches = Corpus(examples(TASKS, "train", 100, seed=0), 16)

    def stops(number):
        if number == 3:
            raise KeyboardInterrupt
        return batches(number)

    ends = []
    for name, sources in {"a": [batches], "b": [stops, batches]}.items():
        for source in sources:
            mx.random.seed(0)
            model = build(TINY.config())
            try:
                train.fit(model, source, TINY, tmp_path / f"{name}.safetensors")
            except KeyboardInterrupt:
                continue
            ends.append(dict(tree_flatten(model.parameters())))
    first, second = ends
    assert all(mx.array_equal(first[name], second[name]) for name in first)
    with pytest.raises(ValueError, match="another recipe"):
        train.fit(model, batches, replace(TINY, seed=1), tmp_path / "a.safetensors")


def test_the_folder_is_an_ordinary_one_and_its_card_says_how_it_was_made(
    tmp_path, monkeypatch
):
    from mlx_lm import load

    monkeypatch.setattr(train, "RECIPE", TINY)
    folder, state = tmp_path / "mixture", tmp_path / "state.safetensors"
    paths = ["--output", str(folder), "--state", str(state)]
    train.main([*paths, "--steps", "1", "--per-task", "1", "--no-pools"])
    model, tokenizer = load(str(folder))
    assert type(model).__module__ == "mlx_lm.models.qwen3_moe"
    assert tokenizer.decode(tokenizer.encode("Say Spain")) == "Say Spain"
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "8 experts" in card and "ordinary mixture" in card


def test_the_mixture_in_the_repository_answers_what_its_card_says():
    found = train.test(train.CHECKPOINT, train.RECIPE, per_task=5)
    assert found["facts"] > 0.95
    files = train.CHECKPOINT.iterdir()
    assert sum(file.stat().st_size for file in files) < 5e6
