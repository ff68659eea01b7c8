"""Checked answers are the dense model's own, whatever was drafted, kept, or stored."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import (
    by_turns,
    families,
    family_units,
    relative_error,
    thinned,
    write_family,
    write_folder,
    write_quantised,
)
from mlx_lm import sample_utils
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from ifp_mlx import load
from ifp_mlx.checking.answer import answered
from ifp_mlx.checking.loop import CheckedRun, DraftLength
from ifp_mlx.checking.rule import Rule
from ifp_mlx.checking.whole import Whole
from ifp_mlx.decoding.options import Decoding
from ifp_mlx.model.checkpoint import IFPModel
from ifp_mlx.model.decide import decide
from ifp_mlx.selection.masks import Selection
from ifp_mlx.selection.request import Request
from ifp_mlx.slicing import stock
from ifp_mlx.slicing.stock import build
from ifp_mlx.storage.folder import source_of
from ifp_mlx.storage.writer import write_store

PROMPT = [5, 9, 77, 200, 13, 40, 41, 8, 120, 121, 7, 6]


def greedy(model, prompt, count, **options):
    """Return what mlx-lm says."""
    steps = generate_step(mx.array(prompt), model, max_tokens=count, **options)
    return [token for token, _ in steps]


def prepared(model, *, instruction=PROMPT, room=0, **options):
    """Return a compact model beside the whole one, as a request makes it."""
    options = {"check": "exact", "keep": 0.5} | options
    made = model.prepare(decide(Request(instruction=instruction, **options), model))
    if room:
        made = made._replace(whole=Whole(model.source, made.model, room))
    return made


def checked(whole, prompt, *, check="exact", draft=6, step=0, decoding=None, **about):
    rule = Rule(check, decoding or Decoding())
    run = CheckedRun(whole, prompt, rule, DraftLength(draft, draft), **about)
    for _ in run.prefill(step):
        pass
    return run


def answer(run, count, ends=()):
    tokens = []
    while len(tokens) < count and not {*tokens} & {*ends}:
        tokens += [one.token for one in run.check(count - len(tokens), ends)]
    return tokens


# Every type


CHANNELS = [name for name, unit in family_units().items() if unit == "channel"]
GOES_BACK = {
    name: all(
        hasattr(part, "update_and_fetch")
        for layer in make_prompt_cache(build(families()[name]))
        for part in getattr(layer, "caches", [layer])
    )
    for name in CHANNELS
}


def all_but(plan, count, seed=0):
    """Return a selection that drops some channels of each layer."""
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(plan.units)[count:] for _ in plan.layers]
    indices = tuple(mx.array(np.sort(row).astype(np.int32)) for row in rows)
    return Selection(indices, None, plan.units)


@pytest.mark.parametrize("name", thinned(CHANNELS, 6))
def test_every_type_says_what_it_says_alone_or_is_refused(name, tmp_path):
    untied = {"tie_word_embeddings": False} if name == "minicpm" else {}
    source = source_of(write_family(tmp_path / "model", name, **untied))
    model = IFPModel(source, "").apart(all_but(source.plan, 9))
    whole = Whole(source, model)
    if not GOES_BACK[name]:
        with pytest.raises(
            ValueError, match="the cache ArraysCache of this model cannot"
        ):
            checked(whole, PROMPT)
        return
    run = checked(whole, PROMPT, draft=3, step=7)
    assert answer(run, 12) == greedy(source.dense(), PROMPT, 12)


# Every kind of folder


def plain(path):
    return write_folder(path, hidden_size=64, head_dim=16, intermediate_size=256)


def stored(write):
    return lambda path: write_store(write(path.with_name("plain")), path)


def packed(**how):
    return lambda path: write_quantised(path, **how)


KINDS = {
    "plain": plain,
    "store": stored(plain),
    "gemma": lambda path: write_folder(path, "gemma3_text", intermediate_size=128),
    "4 bits": packed(group=32),
    "4 bits, store": stored(packed(group=32)),
    "mxfp4": packed(mode="mxfp4", group=32),
    "mixed": packed(mixed=True),
    "gates": lambda path: None,  # the checkpoint inside the package, with its predictor
    "gates, store": lambda path: write_store(load()[0].path, path),
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Open each kind when it is first asked for, with what its dense model says."""
    known = {}

    def one(kind):
        if kind not in known:
            path = KINDS[kind](tmp_path_factory.mktemp("kind") / "model")
            model, _ = load(path) if path else load()
            known[kind] = model, greedy(model.dense(), PROMPT, 12)
        return known[kind]

    return one


EVERY = ("plain", "store", "4 bits", "gates")  # for which every share is tried
SHARES = [
    (k, share) for k in KINDS for share in (0.75, 0.5, 0.25)[:: 1 if k in EVERY else 2]
]
GATED = [(*way, False) for way in SHARES if "gates" in way[0]]  # never compensated
PLAIN = [way for way in SHARES if "gates" not in way[0]]
WAYS = [*by_turns(PLAIN, 3), *thinned(GATED, 2)]


@pytest.mark.parametrize(("kind", "keep", "compensate"), WAYS)
def test_every_kind_of_folder_says_what_its_dense_model_says(
    kind, keep, compensate, opened
):
    model, expected = opened(kind)
    made = prepared(model, keep=keep, compensate=compensate)
    assert (made.selection.gates is not None) == (model.predictor is not None)
    corrected = [part.correction is not None for part in made.whole.parts if part.drops]
    assert all(corrected) if compensate else not any(corrected)
    draft = 8 if compensate else 3
    assert answer(checked(made.whole, PROMPT, draft=draft), 12) == expected


@pytest.mark.parametrize("granularity", [32, 64])
def test_whole_groups_need_no_whole_inlet_and_say_the_same(granularity, opened):
    for kind in ("4 bits", "4 bits, store"):
        model, expected = opened(kind)
        made = prepared(model, granularity=granularity, compensate=True)
        assert not any(part.whole for part in made.whole.parts)
        assert answer(checked(made.whole, PROMPT), 12) == expected


# How it is asked


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return a model, the compact one that checks it, and the dense one."""
    path = write_folder(
        tmp_path_factory.mktemp("tiny") / "model", intermediate_size=128
    )
    model, _ = load(path)
    return model, prepared(model, keep=0.9).whole, model.dense()


@pytest.mark.parametrize("draft", [1, 2, 8, 100])
def test_the_number_of_drafts_changes_nothing_but_the_number_of_checks(draft, tiny):
    _, whole, dense = tiny
    run = checked(whole, PROMPT, draft=draft)
    said = answer(run, 24)
    assert said == greedy(dense, PROMPT, 24)
    figures = run.figures
    assert figures.checks >= 24 / (draft + 1)
    assert figures.drafted <= figures.checks * draft
    assert figures.accepted == 24 - figures.checks  # each check says one of its own
    assert run.tokens[len(PROMPT) :] == said


def test_no_more_is_drafted_than_is_wanted(tiny):
    _, whole, dense = tiny
    run = checked(whole, PROMPT, draft=100)
    (one,) = run.check(1)
    assert [one.token] == greedy(dense, PROMPT, 1)
    assert run.figures.drafted == 0 and not one.from_draft
    assert len(run.check(3)) <= 3 and run.figures.drafted == 2


@pytest.mark.parametrize("prompt", [[7], [7, 9], PROMPT * 4])
@pytest.mark.parametrize("step", [0, 1, 5, 11])
def test_a_prompt_may_be_one_token_or_longer_than_a_step(prompt, step, tiny):
    _, whole, dense = tiny
    run = checked(whole, prompt, step=step)
    assert run.known == len(prompt) - 1
    assert answer(run, 12) == greedy(dense, prompt, 12)


def test_a_step_is_mlx_lms_unless_another_is_asked_for(tiny, monkeypatch):
    _, whole, dense = tiny
    monkeypatch.setattr(stock, "PREFILL_STEP", 10)
    rule = Rule("exact", Decoding())
    for step, expected in ((0, [7, 17, 27]), (13, [13, 26, 27])):
        run = CheckedRun(whole, list(range(40, 68)), rule)
        assert list(run.prefill(step)) == expected
        assert answer(run, 9) == greedy(dense, list(range(40, 68)), 9)


def test_gemma_goes_on_far_beyond_its_window(opened):
    model, _ = opened("gemma")
    prompt = PROMPT * 3
    made = prepared(model, keep=0.9, instruction=prompt)
    run = checked(made.whole, prompt, draft=4, step=20)
    rotating = [one for one in run.cache if isinstance(one, RotatingKVCache)]
    assert {one.max_size for one in rotating} == {16}
    assert answer(run, 50) == greedy(model.dense(), prompt, 50)
    assert 5 < run.figures.accepted < run.figures.drafted


def test_it_goes_on_from_what_the_dense_model_has_read_to_select(tiny):
    model, _, dense = tiny
    made = prepared(model, keep=0.9)
    assert made.kv[0].offset == len(PROMPT)
    prompt = [*PROMPT, 3, 4, 5]
    run = checked(made.whole, prompt, cache=made.kv, known=len(PROMPT))
    assert run.known == len(prompt) - 1
    assert answer(run, 20) == greedy(dense, prompt, 20)


def test_what_stays_in_the_cache_is_the_dense_models(tiny):
    _, whole, dense = tiny
    run = checked(whole, PROMPT)
    said = answer(run, 20)
    fresh = make_prompt_cache(dense)
    dense(mx.array([[*PROMPT, *said[:-1]]]), cache=fresh)
    for found, expected in zip(run.cache, fresh, strict=True):
        assert isinstance(found, KVCache) and found.offset == expected.offset
        pairs = zip(found.keys_and_values(), expected.keys_and_values(), strict=True)
        assert all(relative_error(a, b) <= 1e-5 for a, b in pairs)


def test_every_token_comes_with_the_dense_models_log_probabilities(tiny):
    _, whole, dense = tiny
    run = checked(whole, PROMPT)
    found = [one for _ in range(4) for one in run.check(100)]
    assert {one.from_draft for one in found} == {False, True}
    logits = dense(mx.array([[*PROMPT, *(one.token for one in found)]]))[0]
    expected = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    for place, one in enumerate(found, len(PROMPT) - 1):
        assert relative_error(one.logprobs, expected[place]) <= 1e-5


def test_processors_are_obeyed_in_drafts_and_in_checks(tiny):
    _, whole, dense = tiny
    penalty = [sample_utils.make_repetition_penalty(1.5, 12)]
    expected = greedy(dense, PROMPT, 30, logits_processors=penalty)
    assert expected != greedy(dense, PROMPT, 30)
    run = checked(whole, PROMPT, decoding=Decoding(processors=penalty))
    assert answer(run, 30) == expected
    assert run.figures.accepted > 0


def test_the_smallest_tolerance_lets_every_draft_stand(tiny):
    _, whole, dense = tiny
    run = checked(whole, PROMPT, check=1e-30, draft=4)
    loose = answer(run, 30)
    assert run.figures.accepted == run.figures.drafted == 24
    assert loose != greedy(dense, PROMPT, 30)
    run = checked(whole, PROMPT, check=0.999999, draft=4)
    assert answer(run, 30) == greedy(dense, PROMPT, 30)


# Where it ends


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    path = write_folder(tmp_path_factory.mktemp("talking") / "model")
    return load(path)


@pytest.mark.parametrize("draft", [1, 3, 100])
@pytest.mark.parametrize("place", [0, 1, 4, 11])
def test_an_answer_ends_where_mlx_lm_ends_it(place, draft, talking):
    from mlx_lm import stream_generate

    model, tokenizer = talking
    whole = prepared(model, keep=0.95).whole
    end = greedy(model.dense(), PROMPT, place + 1)[-1]
    ends = tokenizer._eos_token_ids
    tokenizer._eos_token_ids = {end}
    try:
        expected = list(
            stream_generate(model.dense(), tokenizer, PROMPT, max_tokens=12)
        )
        run = CheckedRun(
            whole, PROMPT, Rule("exact", Decoding()), DraftLength(draft, draft)
        )
        found = list(answered(run, tokenizer, 12))
    finally:
        tokenizer._eos_token_ids = ends
    assert expected[-1].finish_reason == "stop"
    assert [one.token for one in found] == [one.token for one in expected]
    assert [one.text for one in found] == [one.text for one in expected]
    assert [one.finish_reason for one in found] == [
        one.finish_reason for one in expected
    ]
    assert [one.generation_tokens for one in found] == list(range(1, len(found) + 1))
    assert {one.prompt_tokens for one in found} == {len(PROMPT)}
