"""The engine on a mixture: what tasks share is there once, and answers stay their own."""

import asyncio

import mlx.core as mx
import numpy as np
import pytest
from conftest import write_family

from ifp_mlx import load
from ifp_mlx.engine import CancelToken, Engine, InvalidRequest, OutOfMemory, Progress
from ifp_mlx.engine.events import Done
from ifp_mlx.engine.residents import Shelf
from ifp_mlx.storage.writer import write_store

TEXTS = ("Add numbers.", "Traduis en français.", "SELECT name FROM people;")
FAMILIES = ("qwen3_moe", "gpt_oss", "gemma4_text, experts", "deepseek_v3, groups")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("mixture") / "m", "qwen3_moe")


@pytest.fixture(scope="module")
def engine(folder):
    with Engine.open(folder) as engine:
        for number, text in enumerate(TEXTS):
            engine.prepare(text, name=str(number), keep=0.25)
        yield engine


def load_all(shelf, masks):
    uses = [shelf.use(mask) for mask in masks]
    return [shelf.load(use, lambda event: None, CancelToken()).model for use in uses]


@pytest.mark.parametrize("name", FAMILIES)
def test_tasks_share_everything_but_their_experts(tmp_path, name):
    model, _ = load(write_family(tmp_path / "m", name))
    options = {"selector": "random", "keep": 0.5}
    masks = [model.select("Hi", seed=seed, **options) for seed in range(3)]
    assert len({mask.identity for mask in masks}) == 3
    shelf = Shelf(model, 1 << 30, None)
    tokens = mx.array([[5, 6, 7]])
    for mask, shared in zip(masks, load_all(shelf, masks), strict=True):
        assert mx.array_equal(shared(tokens), model.compact(mask)(tokens))
    core = shelf.footprint.core_bytes
    experts = sum(4 * layer for layer in shelf.footprint.layer_bytes)
    assert (
        shelf.residents.nbytes
        == shelf.weigh(*map(shelf.use, masks))
        == core + 3 * experts
    )


def test_a_sweep_shares_with_the_tasks_that_are_there(engine, folder):
    tasks = [engine.task(str(number)) for number in range(len(TEXTS))]
    model, _ = load(folder)
    shelf = Shelf(model, 1 << 30, None)
    masks = [model.select(text, keep=0.25) for text in TEXTS]
    different = {mask.identity: mask for mask in masks}
    assert {task.identity for task in tasks} == {*different} and len(different) > 1
    assert engine.memory()["compact_models"] == shelf.weigh(
        *map(shelf.use, different.values())
    )


def test_a_switch_of_tasks_reads_only_the_experts_that_are_new(folder, tmp_path):
    store, _ = load(write_store(folder, tmp_path / "store"))
    options = {"selector": "random", "keep": 0.5}
    one, other = (store.select("Hi", seed=seed, **options) for seed in (1, 2))
    shelf, reader = Shelf(store, 1 << 30, None), store.source.reader
    load_all(shelf, [one])
    before = reader.bytes_wanted
    (switched,) = load_all(shelf, [other])
    new = [
        np.setdiff1d(np.array(theirs), np.array(own)).size
        for own, theirs in zip(one.indices, other.indices, strict=True)
    ]
    each = sum(
        n * size for n, size in zip(new, store.footprint.layer_bytes, strict=True)
    )
    assert 0 < sum(new) < sum(other.sizes)
    assert reader.bytes_wanted - before == pytest.approx(each, rel=0.05)
    tokens = mx.array([[5, 6, 7]])
    assert mx.array_equal(switched(tokens), load(folder)[0].compact(other)(tokens))


def test_requests_with_different_experts_answer_as_each_alone(engine):
    options = {"max_tokens": 12}
    names = [str(number) for number in range(len(TEXTS))] * 2
    alone = [engine.generate("Hello", task=name, **options) for name in names]
    assert len({*alone}) > 1

    async def together():
        jobs = (engine.agenerate("Hello", task=name, **options) for name in names)
        return await asyncio.gather(*jobs)

    assert asyncio.run(together()) == alone


def test_a_task_and_an_answer_say_how_good_their_experts_are(engine, folder):
    selection = load(folder)[0].select(TEXTS[0], keep=0.25)
    origin, task = selection.origin, engine.task("0")
    *_, done = engine.stream("Hello", task="0", max_tokens=1)
    assert isinstance(done, Done) and engine.unit == "expert" and engine.channels == 8
    for said in (task, done):
        assert (said.unit, said.kept_channels, said.total_channels) == ("expert", 6, 24)
        assert said.agreement == pytest.approx(origin.agreement)
        assert said.router_mass == pytest.approx(origin.router_mass)
    assert task.info["router mass on what selected"] == f"{origin.router_mass:.4g}"


def test_experts_that_agree_too_little_are_refused(engine):
    agreement = engine.task("0").agreement
    asked = {"keep": 0.25, "instruction": TEXTS[0]}
    for low in (agreement, None):
        assert engine.generate("Hello", min_agreement=low, max_tokens=1, **asked)
    for options in (asked, {"task": "0"}):
        with pytest.raises(InvalidRequest, match=r"chooses the dense model's next"):
            engine.generate("Hello", min_agreement=1.0, **options)
    with pytest.raises(InvalidRequest, match="does without"):
        engine.generate("Hello", min_agreement=0.5, selector="random")
    with pytest.raises(InvalidRequest, match="min_agreement=2"):
        engine.generate("Hello", min_agreement=2)


def test_experts_that_do_not_fit_are_refused_before_anything_is_read(folder):
    seen = []
    with Engine.open(folder, memory_limit=200_000) as engine:
        with pytest.raises(OutOfMemory, match="keep fewer experts"):
            engine.prepare("Hello", keep=0.5, progress=seen.append)
    assert not any(isinstance(e, Progress) and e.stage == "channels" for e in seen)
