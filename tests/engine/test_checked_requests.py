"""Answers that the whole model checks, beside others, from models that share arrays."""

import asyncio
import itertools
import os

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import by_turns, write_family, write_folder, write_quantised
from mlx.utils import tree_flatten
from mlx_lm.sample_utils import make_logits_processors

from ifp_mlx import Selection, load
from ifp_mlx.engine import (
    CancelToken,
    CheckFailed,
    Done,
    Engine,
    InvalidRequest,
    OutOfMemory,
    Progress,
    Sampling,
    Token,
)
from ifp_mlx.engine.host import Host, Settings
from ifp_mlx.engine.lanes import Ticket
from ifp_mlx.engine.residents import Shelf
from ifp_mlx.selection.request import Request
from ifp_mlx.storage.writer import write_store

TASKS = ("Add numbers.", "You translate English into French.")
PROMPTS = ("Hello", "A longer question than the other one, is it not?")
CHOICE = {"selector": "random", "keep": 0.5}
EXACT = {"check": "exact", "max_tokens": 20}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("checked") / "m")


@pytest.fixture(scope="module")
def engine(folder):
    with Engine.open(folder, prefill_step=16) as engine:
        for number, text in enumerate(TASKS):
            engine.prepare(text, name=str(number), keep=0.5)
        yield engine


@pytest.fixture(scope="module")
def dense(folder):
    return load(folder)[0].dense()


def templated(folder, prompt):
    tokenizer = load(folder)[1]
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)


def dense_tokens(dense, tokens, count, **penalties):
    """Return the greedy tokens of the dense model, each from a forward pass of all."""
    tokens, asked = list(tokens), len(tokens)
    processors = make_logits_processors(**penalties)
    while len(tokens) < asked + count and tokens[-1] != 258:
        logits = dense(mx.array([tokens]))[:, -1]
        for processor in processors:
            logits = processor(mx.array(tokens), logits)
        tokens.append(int(mx.argmax(logits)))
    return tokens[asked:]


def tokens_of(events):
    return [event.id for event in events if isinstance(event, Token)]


def write_kind(path, kind):
    if kind == "quantised":
        return write_quantised(path / "m", group=32)
    if kind == "quantised store":
        return write_store(write_quantised(path / "m", group=32), path / "s")
    family = "llama" if kind == "store" else kind
    folder = write_folder(path / "m", family)
    return write_store(folder, path / "s") if kind == "store" else folder


KINDS = ("llama", "gemma3_text", "quantised", "store", "quantised store")


async def events_of(engine, prompt, **options):
    return [event async for event in engine.astream(prompt, **options)]


def ticket_of(prompt, emit, **options):
    names = {"task", "check", "reselect", "draft_tokens", "keep", "selector"}
    request = Request(**{name: options.pop(name) for name in names & options.keys()})
    return Ticket(prompt, request, Sampling(**options), CancelToken(), emit)


def serve(folder, *tickets):
    """Serve tickets on this thread, so that what they are told can act at once."""
    host = Host(Settings(str(folder), None, None, 1 << 20, None, 4, 8), lambda _: None)
    for ticket in tickets:
        host.add(ticket, 9)
    while host.busy:
        host.turn()
    return host


@pytest.mark.parametrize("kind", KINDS)
def test_exact_answers_are_the_dense_models_and_others_stay_as_they_are(tmp_path, kind):
    folder = write_kind(tmp_path, kind)
    dense = load(folder)[0].dense()
    expected = {p: dense_tokens(dense, templated(folder, p), 8) for p in PROMPTS}
    with Engine.open(folder, prefill_step=8) as engine:
        for number, text in enumerate(TASKS):
            engine.prepare(text, name=str(number), keep=0.5)
        asked = [(p, {"task": t, "max_tokens": 8}) for p in PROMPTS for t in ("0", "1")]
        alone = [engine.generate(p, **o) for p, o in asked]

        async def together():
            free = (engine.agenerate(p, **o) for p, o in asked)
            checked = (events_of(engine, p, **o, check="exact") for p, o in asked)
            return await asyncio.gather(*free, *checked)

        found = asyncio.run(together())
    assert found[: len(asked)] == alone
    for (prompt, _), events in zip(asked, found[len(asked) :], strict=True):
        assert tokens_of(events) == expected[prompt]
        check = events[-1].check
        assert check["mode"] == "exact" and 0 < check["checks"] <= 8
        assert check["accepted"] <= check["drafted"] and check["bytes_read"] > 0


def test_answers_side_by_side_count_their_own_checks(folder):
    options = EXACT | {"instruction": TASKS[0]}
    with Engine.open(folder, prompt_cache_bytes=0) as engine:
        alone = [list(engine.stream(prompt, **options))[-1] for prompt in PROMPTS]

        async def together():
            jobs = (events_of(engine, prompt, **options) for prompt in PROMPTS)
            return await asyncio.gather(*jobs)

        beside = [events[-1] for events in asyncio.run(together())]
    assert [done.check for done in beside] == [done.check for done in alone]


def test_a_tolerance_lets_drafts_stand(engine):
    checks = []
    for check in (0.01, 0.5, "exact"):
        how = {"selector": "random", "keep": 0.25, "check": check}
        *events, done = engine.stream("Hello", max_tokens=40, **how)
        assert done.check["mode"] == check and len(tokens_of(events)) == 40
        checks.append(done.check["checks"])
    assert checks[0] < checks[1] < checks[2]


def test_where_every_unit_is_kept_nothing_is_checked(engine, folder, dense):
    *events, done = engine.stream("Hello", keep=1.0, **EXACT)
    assert done.check is None
    assert tokens_of(events) == dense_tokens(dense, templated(folder, "Hello"), 20)


def test_draft_tokens_bound_what_is_drafted_for_one_check(engine):
    how = {"check": 0.01, "draft_tokens": 3, "max_tokens": 40}
    *_, done = engine.stream("Hello", task="0", **how)
    assert done.check["checks"] == 10 and done.check["drafted"] <= 30


def selection_of(model, kind):
    if kind == "compensated":
        return model.select(TASKS[0], keep=0.5, compensate=True)
    selection = model.select(TASKS[0], keep=0.5, selector="random", seed=3)
    if kind == "plain":
        return selection
    rng = np.random.default_rng(0)
    gates = [rng.uniform(0.2, 1, k).astype(np.float32) for k in selection.sizes]
    indices, origin = selection.indices, selection.origin
    return Selection(indices, tuple(map(mx.array, gates)), selection.channels, origin)


def bytes_of(tree):
    trees = [
        part.parameters() if isinstance(part, nn.Module) else part for part in tree
    ]
    return sum(weight.nbytes for _, weight in tree_flatten(trees))


def both_forms(model, selection, first):
    """Return a shelf and both forms of a selection, one made before the other."""
    shelf, forms = Shelf(model, 1 << 30, None), {}
    for checked in (first, not first):
        use = shelf.use(selection, checked)
        forms[checked] = shelf.load(use, lambda event: None, CancelToken())
    return shelf, forms[False], forms[True]


PAIRS = itertools.product(KINDS, ("plain", "gated", "compensated"))


@pytest.mark.parametrize(("source", "kind", "first"), by_turns(PAIRS))
def test_both_forms_of_a_selection_share_what_is_equal(tmp_path, source, kind, first):
    model, _ = load(write_kind(tmp_path, source))
    selection, tokens = selection_of(model, kind), mx.array([[5, 6, 7]])
    shelf, plain, checked = both_forms(model, selection, first)
    assert mx.array_equal(plain.model(tokens), model.compact(selection)(tokens))
    assert mx.array_equal(checked.model(tokens), model.apart(selection)(tokens))
    found, alone = shelf.residents.nbytes, shelf.weigh(plain.use)
    weighed = shelf.weigh(plain.use, checked.use) - checked.use.passing
    inlets = model.plan.inlets(checked.model)
    learned = [part.correction for part in checked.whole.parts if part.drops]
    if (
        kind == "compensated"
    ):  # a correction's rank is known once the text has been read
        own = [
            inlet
            for inlet, k in zip(inlets, selection.sizes, strict=True)
            if k < model.channels
        ]
        assert found == alone + bytes_of(own) + bytes_of(learned) < weighed
    elif (
        kind == "gated" and "quantised" in source
    ):  # weights that share only their values
        assert alone < found <= weighed
    else:
        assert found == weighed
        assert (found > alone) == (kind == "gated" or "quantised" in source)


@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("first", [False, True], ids=["plain first", "checked first"])
def test_where_nothing_is_compensated_one_form_is_made_of_the_other(
    tmp_path, source, first, monkeypatch
):
    model, _ = load(write_kind(tmp_path, source))
    selection = selection_of(model, "plain")
    load_first = model.apart if first else model.compact
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return load_first(*args, **kwargs)

    monkeypatch.setattr(model, "apart", counted if first else None)
    monkeypatch.setattr(model, "compact", None if first else counted)
    both_forms(model, selection, first)
    assert len(calls) == 1


def test_a_second_form_takes_no_room_of_the_budget_but_what_is_its_own(folder):
    model, _ = load(folder)
    masks = [model.select(text, keep=0.5) for text in TASKS]
    measure = Shelf(model, 1, None)
    uses = [measure.use(mask, checked) for mask in masks for checked in (False, True)]
    shelf = Shelf(model, measure.weigh(uses[0]), None)
    there = []
    for use in uses[:3]:
        shelf.load(use, lambda event: None, CancelToken())
        there.append([use in shelf.residents for use in uses])
    assert there[1] == [True, True, False, False]
    assert there[2] == [False, False, True, False]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_conversation_goes_on_from_the_dense_models_cache(tmp_path, family):
    folder = write_folder(tmp_path / "m", family)
    model, tokenizer = load(folder)
    dense = model.dense()
    with Engine.open(folder) as engine:
        chat = engine.chat(keep=0.5, **EXACT)
        known = len("<|im_start|>")  # what selects has been read, so its cache is there
        for said in ("Something new.", "And more?", "Why?"):
            events = list(chat.stream(said))
            prompt = tokenizer.apply_chat_template(
                chat.messages[:-1], add_generation_prompt=True
            )
            assert tokens_of(events) == dense_tokens(dense, prompt, 20)
            assert events[-1].prompt_tokens == len(prompt)
            if family == "llama":  # windows of the other do not go back
                assert events[-1].cached_tokens >= known
            known = len(prompt)


def test_checked_answers_of_any_mask_share_caches_and_others_do_not(engine):
    engine.unload()
    text, cached = "Some words that nobody has said before.", []
    asked = [("0", EXACT), ("1", EXACT), ("1", {}), ("1", {}), ("1", {"check": 0.5})]
    for task, options in asked:
        *_, done = engine.stream(text, **{"task": task, "max_tokens": 2} | options)
        cached.append(done.cached_tokens)
    whole = cached[1]
    assert cached == [0, whole, 0, whole, whole] and whole > 30


def test_a_checked_request_is_cancelled_in_prefill_and_at_a_token(folder):
    early, late, events = [], [], []

    def in_prefill(event):
        early.append(event)
        if isinstance(event, Progress) and event.stage == "prefill" and event.done:
            first.stop.cancel()

    def at_a_token(event):
        late.append(event)
        if isinstance(event, Token) and event.number == 3:
            second.stop.cancel()

    how = CHOICE | {"check": 0.01, "max_tokens": 40}
    first = ticket_of("word " * 20, in_prefill, **how)
    second = ticket_of("Hello", at_a_token, **how)
    third = ticket_of("Hello", events.append, **how)
    host = serve(folder, first, second, third)
    prefilled = [event.done for event in early if isinstance(event, Progress)]
    assert early[-1].finish_reason == "cancelled" and prefilled[-1] == 8
    assert (late[-1].finish_reason, late[-1].generation_tokens) == ("cancelled", 3)
    assert events[-1].generation_tokens == 40
    assert not host.schedule.lanes


def test_others_get_a_token_between_two_checks(folder):
    heard = []

    def listener(name):
        return lambda event: heard.append(name) if isinstance(event, Token) else None

    asked = [("free", "off"), ("one", "exact"), ("two", "exact")]
    how = {**CHOICE, "max_tokens": 30}
    serve(folder, *(ticket_of("Hello", listener(n), check=c, **how) for n, c in asked))
    last = len(heard) - heard[::-1].index("free")
    begun = heard.index("two")
    turns = [name for name, _ in itertools.groupby(heard[begun:last])]
    assert turns.count("free") > 5 and turns.count("one") > 1
    pairs = zip(turns, turns[1:], strict=False)
    assert all("free" in pair for pair in pairs)


def test_progress_reaches_the_end_of_the_prompt_before_the_first_token(engine):
    events = list(engine.stream("Hello there.", task="0", **EXACT))
    prefill = [e for e in events if isinstance(e, Progress) and e.stage == "prefill"]
    assert prefill[-1].done == prefill[-1].total == events[-1].prompt_tokens
    done = [event.done for event in prefill]
    assert done == sorted({*done})


def test_a_stop_string_ends_a_checked_answer_and_its_cache_is_right(engine):
    how = {"task": "0", "check": "exact", "max_tokens": 30}
    whole = engine.generate("Hello", **how)
    stop = whole[7:10]
    cut = engine.generate("Hello", **how, stop_strings=(stop, "never there"))
    assert cut == whole[: whole.index(stop)]
    assert engine.generate("Hello", **how) == whole


@pytest.mark.parametrize(
    "penalties",
    [
        {"repetition_penalty": 1.3},
        {"presence_penalty": 1.5, "frequency_penalty": 0.7},
        {"logit_bias": {65: 4.0, 140: -100.0}},
    ],
    ids=str,
)
def test_penalties_are_those_of_the_dense_model(engine, folder, dense, penalties):
    expected = dense_tokens(dense, templated(folder, "Hello"), 20, **penalties)
    assert expected != dense_tokens(dense, templated(folder, "Hello"), 20)
    for task in ("0", "1"):
        events = engine.stream("Hello", task=task, **EXACT, **penalties)
        assert tokens_of(events) == expected


def test_logprobs_are_the_dense_models(engine, folder, dense):
    asked = {"logprobs": True, "top_logprobs": 2}
    events = engine.stream("Hello", task="0", **EXACT, **asked)
    said = [event for event in events if isinstance(event, Token)]
    tokens = templated(folder, "Hello")
    for token in said:
        logits = dense(mx.array([tokens]))[0, -1]
        logprobs = np.array(logits - mx.logsumexp(logits))
        own, best, second = token.logprobs
        assert own == best and own.id == token.id
        found = [own.logprob, second.logprob]
        assert found == pytest.approx(np.sort(logprobs)[::-1][:2].tolist(), abs=1e-4)
        tokens.append(token.id)


def test_sampling_is_repeatable_alone_and_beside_others(engine):
    options = {"task": "0", "check": "exact", "temp": 1.0, "max_tokens": 12}
    alone = engine.generate("Hello", **options, seed=7)
    engine.unload()
    assert alone != engine.generate("Hello", **options, seed=8)

    async def together():
        seeds = (7, 1, -2, None)
        jobs = (engine.agenerate("Hello", **options, seed=seed) for seed in seeds)
        return (await asyncio.gather(*jobs))[0]

    assert asyncio.run(together()) == alone


@pytest.mark.parametrize("source", ["llama", "quantised", "store"])
def test_a_reading_that_fails_ends_that_answer_alone(tmp_path, source):
    folder = write_kind(tmp_path, source)
    dense = load(folder)[0].dense()
    expected = dense_tokens(dense, templated(folder, "Hello"), 20)
    mx.eval(dense.parameters())
    name = "channels.bin" if source == "store" else "model.safetensors"
    checked, free, whole = [], [], []

    def cut_short(event):
        checked.append(event)
        if isinstance(event, Token) and event.number == 1:
            os.truncate(folder / name, (folder / name).stat().st_size // 2)

    how = {"max_tokens": 20}
    serve(folder, ticket_of("Hello", whole.append, **how))
    free_beside = ticket_of("Hello", free.append, **how)
    short = ticket_of("Hello", cut_short, check="exact", **how)
    host = serve(folder, free_beside, short)
    assert isinstance(checked[-1], CheckFailed)
    said = tokens_of(checked)
    assert 0 < len(said) < 20 and said == expected[: len(said)]
    assert tokens_of(free) == tokens_of(whole) and isinstance(free[-1], Done)
    assert not host.schedule.lanes and host.prompts.nbytes > 0
    sizes = [event.check for event in whole + free if isinstance(event, Done)]
    assert sizes == [None, None]


def test_what_passes_through_counts_to_the_memory_limit(folder):
    model, _ = load(folder)
    shelf = Shelf(model, 1 << 30, None)
    use = shelf.use(model.select("Hello", **CHOICE), checked=True)
    assert use.own == 0 < use.passing
    kv = shelf.footprint.kv_bytes(len(templated(folder, "Hello")) + 20)
    how = CHOICE | {"max_tokens": 20}
    needed = shelf.weigh(use) + kv
    for limit in (needed - 1, needed):
        with Engine.open(folder, memory_limit=limit) as engine:
            assert engine.generate("Hello", **how)
            if limit == needed:
                assert engine.generate("Hello", **how, check="exact")
                continue
            with pytest.raises(OutOfMemory, match="memory limit"):
                engine.generate("Hello", **how, check="exact")
            swept = how | {"selector": "activation"}
            with pytest.raises(OutOfMemory, match="memory limit"):
                engine.generate("Hello", **swept, check="exact")


def test_requests_wait_for_memory_that_checks_need(folder, dense):
    """The whole model passes through beside one mask, not beside two."""
    expected = dense_tokens(dense, templated(folder, "Hello"), 20)
    model, _ = load(folder)
    shelf = Shelf(model, 1 << 30, None)
    uses = [shelf.use(model.select(t, keep=0.5, compensate=True), True) for t in TASKS]
    limit = shelf.weigh(*uses) - 1 + shelf.footprint.kv_bytes(40)
    with Engine.open(folder, memory_limit=limit) as engine:
        for number, text in enumerate(TASKS):
            engine.prepare(text, name=str(number), keep=0.5)

        async def together():
            jobs = (events_of(engine, "Hello", task=t, **EXACT) for t in ("0", "1") * 2)
            return await asyncio.gather(*jobs)

        found = asyncio.run(together())
    assert [tokens_of(events) for events in found] == [expected] * 4


@pytest.mark.parametrize("source", ["llama", "quantised", "store"])
def test_channels_that_follow_one_answer_leave_the_others(tmp_path, source):
    folder = write_kind(tmp_path, source)
    model = load(folder)[0]
    expected = dense_tokens(model.dense(), templated(folder, "Hello"), 24)
    with Engine.open(folder) as engine:
        how = CHOICE | {"check": "exact", "max_tokens": 24}
        before = list(engine.stream("Hello", **how))
        engine._call(lambda host: host.prompts.clear()).result()

        async def together():
            jobs = (
                events_of(engine, "Hello", **how, reselect=reselect)
                for reselect in ("drift", "off")
            )
            return await asyncio.gather(*jobs)

        moved, stayed = asyncio.run(together())
        used = engine.memory()["compact_models"]
        [use] = engine._call(
            lambda host: [h.use for h in host.shelf.residents._held.values()]
        ).result()
        assert (
            used == model.footprint.compact_bytes(use.selection)
            or source == "quantised"
        )
    assert tokens_of(moved) == tokens_of(stayed) == tokens_of(before) == expected
    assert moved[-1].check["moves"] and not stayed[-1].check["moves"]
    assert stayed[-1].check == before[-1].check


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"check": 1.0}, "check=1.0"),
        ({"check": "nearly"}, "'nearly'"),
        ({"check": None}, "check=None"),
        ({"check": "exact", "draft_tokens": 0}, "draft_tokens=0"),
        ({"reselect": "drift"}, "it goes with check"),
        ({"check": "exact", "reselect": "often"}, "'often'"),
        ({"check": "exact", "json_schema": {}}, "JSON schema"),
    ],
)
def test_mistakes_are_sentences_with_the_value(engine, options, words):
    with pytest.raises(InvalidRequest, match=words):
        engine.generate("Hello", **options)


def test_a_conversation_selects_again_by_drift_or_turn(engine):
    chat = engine.chat(task="0", reselect="drift", **EXACT)
    assert list(chat.stream("Hello"))[-1].check["checks"]
    with pytest.raises(InvalidRequest, match="it goes with check"):
        engine.chat(reselect="drift")
    with pytest.raises(InvalidRequest, match="'sometimes'"):
        engine.chat(reselect="sometimes")


def test_what_cannot_be_checked_is_refused_in_a_sentence(tmp_path):
    for name, words in [("qwen3_moe", "nearly all experts"), ("lfm2", "ArraysCache")]:
        with Engine.open(write_family(tmp_path / name, name)) as engine:
            with pytest.raises(InvalidRequest, match=words):
                engine.generate("Hello", check="exact")
            assert engine.generate("Hello", max_tokens=2) is not None


def test_sums_of_all_checks_are_there_without_waiting(folder):
    with Engine.open(folder) as engine:
        nothing = {"checks": 0, "drafted": 0, "accepted": 0, "bytes_read": 0}
        assert engine.checking() == nothing | {"acceptance": None}
        dones = [list(engine.stream(prompt, **EXACT))[-1] for prompt in PROMPTS]
        sums = {name: sum(done.check[name] for done in dones) for name in nothing}
        assert sums["checks"] > 1
        share = sums["accepted"] / sums["drafted"]
        assert engine.checking() == sums | {"acceptance": share}
    assert engine.checking()["checks"] == sums["checks"]


def test_a_prepared_task_can_be_loaded_for_checks(folder):
    with Engine.open(folder) as engine:
        task = engine.prepare(TASKS[0], name="0", check="exact")
        assert task.resident
        *_, done = engine.stream("Hello", task="0", **EXACT)
        assert done.seconds["load"] < 0.05 and done.check["checks"]
        engine.unload()
        assert not engine.task("0").resident
        assert engine.generate("Hello", task="0", **EXACT)
