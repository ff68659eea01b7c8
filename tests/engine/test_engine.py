"""The engine, with callers on every kind of thread."""

import asyncio
import os
import subprocess
import sys
import threading
import time

import mlx.core as mx
import pytest
from conftest import add_card, thinned, write_folder
from damage import change_weights

from ifp_mlx import Selection, generate, load
from ifp_mlx.engine import (
    Busy,
    Cancelled,
    CancelToken,
    ContextTooLong,
    Done,
    Engine,
    EngineClosed,
    IncompatibleModel,
    InvalidRequest,
    ModelNotFound,
    OutOfMemory,
    Progress,
    Token,
    UnknownTask,
)
from ifp_mlx.selection.request import MIN_AGREEMENT

FRENCH = "You translate English into French."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("engine") / "tiny")


@pytest.fixture(scope="module")
def engine(folder):
    with Engine.open(folder) as engine:
        yield engine


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory):
    """Large enough for the abort at exit that a worker leaves which is not ended."""
    size = {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1024}
    return write_folder(tmp_path_factory.mktemp("large") / "model", **size)


def wait_until(condition):
    """Cancelling takes effect at the worker's next step."""
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came")


def text_of(events):
    return "".join(event.text for event in events if isinstance(event, Token))


def test_it_answers_as_generate_does(engine, folder):
    model, tokenizer = load(folder)
    for keep in (0.5, 1.0):
        options = {"keep": keep, "max_tokens": 12, "prefill": "compact"}
        expected = generate(model, tokenizer, "What is it?", **options)
        found = engine.generate("What is it?", keep=keep, max_tokens=12)
        assert found == expected


def test_every_stage_is_reported_and_everything_is_plain_data(folder):
    seen = []
    with Engine.open(folder, progress=seen.append) as engine:
        events = list(engine.stream("Hello there.", max_tokens=3))
    stages = [e.stage for e in [*seen, *events] if isinstance(e, Progress)]
    order = list(dict.fromkeys(stages))
    assert order == ["load", "card", "select", "prefill", "decode"]
    prefill = [e for e in events if isinstance(e, Progress) and e.stage == "prefill"]
    assert prefill[0].done == 0
    assert prefill[-1].done == prefill[-1].total == events[-1].prompt_tokens
    tokens = [e for e in events if isinstance(e, Token)]
    assert [t.number for t in tokens] == [1, 2, 3]
    done = events[-1]
    assert isinstance(done, Done)
    assert (done.finish_reason, done.generation_tokens) == ("length", 3)
    assert set(done.seconds) == {"select", "load", "wait", "prefill", "decode", "ttft"}
    assert "array" not in repr(events)


def test_what_is_done_once_for_a_model_is_a_stage_of_its_own(tmp_path):
    def stages(engine, **options):
        events = engine.stream("Hello there.", max_tokens=1, **options)
        found = [e.stage for e in events if isinstance(e, Progress)]
        return list(dict.fromkeys(found))

    with Engine.open(write_folder(tmp_path / "new")) as engine:
        asked = {"keep": 0.5, "selector": "prior"}
        assert (
            stages(engine, **asked)
            == "calibrate select channels prefill decode".split()
        )
        assert stages(engine, keep=0.75)[:2] == ["select", "prefill"]


def test_a_download_is_reported_in_bytes(folder, monkeypatch, capsys):
    def download(repo, allow_patterns, tqdm_class):
        files = tqdm_class(["config.json", "model.safetensors"], desc="Fetching")
        bar = tqdm_class(desc="Downloading bytes", total=0, unit="B", unit_scale=True)
        bar.total += 300
        for _ in files:
            bar.update(150)
        bar.close()
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    seen = []
    with Engine.open("someone/tiny", progress=seen.append) as engine:
        assert engine.name == "someone/tiny"
    assert seen[:2] == [Progress("download", 150, 300), Progress("download", 300, 300)]
    assert capsys.readouterr() == ("", "")


def test_load_select_and_stream_on_three_kinds_of_thread(folder):
    made = {}

    def on_a_thread(job):
        thread = threading.Thread(target=job)
        thread.start()
        thread.join()

    on_a_thread(lambda: made.update(engine=Engine.open(folder)))
    engine = made["engine"]
    on_a_thread(lambda: made.update(task=engine.prepare(FRENCH, name="french")))

    async def on_a_loop():
        options = {"task": "french", "max_tokens": 8}
        return [event async for event in engine.astream("Hi", **options)]

    events = asyncio.run(on_a_loop())
    assert events[-1].mask_id == made["task"].mask_id
    assert text_of(events) == engine.generate("Hi", task="french", max_tokens=8)
    on_a_thread(engine.close)
    assert not engine.alive


def test_a_task_is_its_instructions_selection(engine, folder, tmp_path):
    task = engine.prepare(FRENCH, keep=0.5, name="french")
    selection = load(folder)[0].select(FRENCH, keep=0.5, compensate=True)
    assert task.mask_id == selection.mask_id
    assert list(task.widths) == selection.sizes
    assert task.kept_channels == sum(selection.sizes)
    assert task.total_channels == 3 * 64
    assert task.info["instruction"] == FRENCH and task.resident
    assert (engine.mask("french") == selection.mask()).all()
    engine.save("french", tmp_path / "french.safetensors")
    assert Selection.load(tmp_path / "french.safetensors").mask_id == task.mask_id
    again = engine.prepare(mask_file=tmp_path / "french.safetensors", name="again")
    assert again.mask_id == task.mask_id
    assert {"again", "french"} <= {task.name for task in engine.tasks()}
    engine.forget("again")
    with pytest.raises(UnknownTask, match="'again'"):
        engine.generate("Hi", task="again")


def test_auto_keeps_the_smallest_share_that_the_card_promises_enough_for(tmp_path):
    folder = write_folder(tmp_path / "tiny")
    add_card(load(folder)[0], {0.75: 0.95, 0.9: 0.97})
    strict = {"min_agreement": 1.0}
    with Engine.open(folder) as engine:
        task = engine.prepare("Hello", keep="auto")
        assert task.promise >= MIN_AGREEMENT
        assert engine.prepare("Hello").identity == task.identity
        shares = [0.75, task.kept_channels / task.total_channels]
        whole = engine.prepare("Hello", **strict)
        assert whole.promise == 1
        shares.append(whole.kept_channels / whole.total_channels)
        *_, done = engine.stream("Hello", max_tokens=1)
        assert (done.mask_id, done.agreement) == (task.mask_id, task.agreement)
        with pytest.raises(InvalidRequest, match="75% of the channels, chooses"):
            engine.prepare("Hello", keep=0.75, **strict)
    assert shares == sorted(shares) and shares[0] < shares[2]


@pytest.mark.parametrize("load_it", [True, False])
def test_what_auto_keeps_has_to_fit_into_the_limit(tmp_path, load_it):
    folder = write_folder(tmp_path / "tiny")
    add_card(load(folder)[0], {0.5: 0.9, 0.75: 0.95})
    with Engine.open(folder) as engine:
        least = engine.prepare("Hello", keep=0.5).bytes
    with Engine.open(folder, memory_limit=least) as engine:
        assert engine.prepare("Hello", load=load_it).bytes == least
        with pytest.raises(OutOfMemory, match="keep fewer channels"):
            engine.prepare("Hello", load=load_it, min_agreement=0.95)


def test_a_task_and_an_answer_quote_the_models_card(tmp_path):
    folder = write_folder(tmp_path / "tiny")
    add_card(load(folder)[0], {0.5: 0.7, 0.75: 0.9})
    with Engine.open(folder) as engine:
        task = engine.prepare("Hello", name="task", min_agreement=0.9)
        assert task.kept_channels >= 0.75 * task.total_channels  # as it promises enough
        assert engine.prepare("Hello", keep=0.25).promise is None
        said = engine.prepare("Hello", keep=0.5, name="half"), engine.task("half")
        *_, done = engine.stream("Hello", task="half", max_tokens=1)
        checked = list(engine.stream("Hello", task="half", max_tokens=1, check="exact"))
        assert [one.promise for one in (*said, done, checked[-1])] == [0.7] * 4


def test_bytes_of_a_task_are_those_of_its_model(engine, folder):
    from mlx.utils import tree_flatten

    model, _ = load(folder)
    task = engine.prepare(FRENCH, keep=0.25, name="quarter")
    compact = model.compact(model.select(FRENCH, keep=0.25))
    weights = tree_flatten(compact.parameters())
    assert task.bytes == sum(weight.nbytes for _, weight in weights)


def test_a_stop_before_the_start_and_in_prefill_and_in_decode(folder):
    with Engine.open(folder, prefill_step=8, prompt_cache_bytes=0) as engine:
        early = CancelToken()
        early.cancel()
        [done] = engine.stream("Hello", stop=early)
        assert done.finish_reason == "cancelled"

        stop, prefilled = CancelToken(), []
        for event in engine.stream("word " * 40, stop=stop, max_tokens=9):
            if isinstance(event, Progress) and event.stage == "prefill":
                prefilled.append(event.done)
                stop.cancel()
        assert event.finish_reason == "cancelled" and event.generation_tokens == 0
        assert max(prefilled) <= 3 * 8 < event.prompt_tokens

        stop = CancelToken()
        for event in engine.stream("Hello", stop=stop, max_tokens=400):
            if isinstance(event, Token):
                stop.cancel()
        assert event.finish_reason == "cancelled" and event.generation_tokens < 400


def test_cancelling_at_a_token_stops_at_the_next(folder):
    from ifp_mlx.engine.events import CancelToken as Stop
    from ifp_mlx.engine.host import Host, Settings
    from ifp_mlx.engine.lanes import Ticket
    from ifp_mlx.engine.sampling import Sampling
    from ifp_mlx.selection.request import Request

    settings = Settings(str(folder), None, None, 0, None, 4, 8)
    host, stop, events = Host(settings, lambda event: None), Stop(), []

    def emit(event):
        events.append(event)
        if isinstance(event, Token) and event.number == 3:
            stop.cancel()

    host.add(Ticket("Hi", Request(), Sampling(max_tokens=50), stop, emit), 1)
    while host.busy:
        host.turn()
    assert events[-1].finish_reason == "cancelled"
    assert events[-1].generation_tokens == 3


def test_leaving_the_stream_cancels_it(engine):
    events = engine.stream("Hello", max_tokens=400)
    assert isinstance(next(events), Progress)
    events.close()
    wait_until(lambda: engine.memory()["kv_in_use"] == 0)

    async def leave():
        async for event in engine.astream("Hello", max_tokens=400):
            if isinstance(event, Token):
                await asyncio.sleep(10)

    async def cancel():
        task = asyncio.create_task(leave())
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    wait_until(lambda: engine.memory()["kv_in_use"] == 0)


def test_a_callers_token_survives_a_stream_that_ends_by_itself(engine):
    stop = CancelToken()
    assert engine.generate("Hi", stop=stop, max_tokens=2)
    assert not stop.cancelled


@pytest.mark.parametrize("stage", ["select", "channels"])
def test_preparing_can_be_cancelled_between_layers(engine, stage):
    stop, steps = CancelToken(), []

    def progress(event):
        steps.append((event.stage, event.done, event.total))
        if (event.stage, event.done, event.total) == (stage, 1, 3):
            stop.cancel()

    # By activation, selecting and reading are one pass.
    selector = {"select": "activation", "channels": "random"}[stage]
    options = {"keep": 0.7, "selector": selector, "progress": progress}
    with pytest.raises(Cancelled, match=f"after 1 of 3: {stage}"):
        engine.prepare(f"New to {stage}.", name=stage, stop=stop, **options)
    assert steps[-1] == (stage, 1, 3)
    assert stage not in [task.name for task in engine.tasks()]
    engine.prepare(
        f"New to {stage}.", name=stage, **options | {"progress": steps.append}
    )
    assert engine.task(stage).resident


def test_a_batch_of_one_mask_answers_as_each_alone(folder):
    prompts = ["a", "A longer prompt than the others, by some words.", "Hm?", "é…"]
    with Engine.open(folder, prompt_cache_bytes=0, prefill_step=16) as engine:
        engine.prepare(FRENCH, name="french")
        options = {"task": "french", "max_tokens": 24}
        alone = [engine.generate(prompt, **options) for prompt in prompts]

        async def together():
            return await asyncio.gather(
                *(engine.agenerate(prompt, **options) for prompt in prompts * 3)
            )

        assert asyncio.run(together()) == alone * 3


def test_masks_take_turns_within_the_budget(folder):
    """Lanes only fit one at a time, and still each mask gets its own answers."""
    with Engine.open(folder, cache_bytes=1, batch=2) as engine:
        names = [engine.prepare(f"Task {n}", name=str(n)).name for n in range(3)]
        alone = {n: engine.generate("Hi", task=n, max_tokens=8) for n in names}

        async def together():
            jobs = [engine.agenerate("Hi", task=n, max_tokens=8) for n in names * 4]
            return await asyncio.gather(*jobs)

        assert asyncio.run(together()) == [alone[n] for n in names * 4]
        assert sum(task.resident for task in engine.tasks()) == 1


def test_a_memory_limit_makes_requests_wait_not_fail(folder):
    """One request's cache fits beside its model; eight do not."""
    options = {"keep": 0.5, "max_tokens": 12}
    with Engine.open(folder) as engine:
        task = engine.prepare("Hello", keep=0.5)
        alone = engine.generate("Hello", **options)
    with Engine.open(folder, memory_limit=task.bytes + 60_000) as engine:

        async def together():
            jobs = [engine.agenerate("Hello", **options) for _ in range(8)]
            return await asyncio.gather(*jobs)

        assert asyncio.run(together()) == [alone] * 8


def test_models_in_use_are_the_last_to_be_let_go(engine, folder):
    from ifp_mlx.engine.residents import Shelf

    model, _ = load(folder)
    masks = [model.select(f"Task {n}.", keep=0.5) for n in range(3)]
    budget = Shelf(model, 1, None)
    shelf = Shelf(model, budget.weigh(*map(budget.use, masks[:2])), None)
    uses = [shelf.use(mask) for mask in masks]
    shelf.in_use = lambda: uses[:1]
    for use in uses:
        shelf.load(use, lambda event: None, CancelToken())
    there = [use in shelf.residents for use in uses]
    assert there == [True, False, True]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_resident_models_share_everything_but_their_channels(tmp_path, family):
    from ifp_mlx.engine.residents import Shelf

    model, _ = load(write_folder(tmp_path / family, family))
    masks = [model.select(f"Task {n}.", keep=0.5) for n in range(3)]
    shelf = Shelf(model, 1 << 30, None)
    tokens = mx.array([[5, 6, 7]])
    uses = [shelf.use(mask) for mask in masks]
    for use in uses:
        shared = shelf.load(use, lambda event: None, CancelToken()).model
        assert mx.array_equal(shared(tokens), model.compact(use.selection)(tokens))
    assert shelf.residents.nbytes == shelf.weigh(*uses)
    core = shelf.footprint.core_bytes
    alone = sum(map(shelf.footprint.compact_bytes, masks))
    assert shelf.residents.nbytes == alone - 2 * core and core > 0


def test_the_first_instructions_mask_stays_through_a_chat(engine):
    chat = engine.chat(system="You are brief.", max_tokens=4)
    first = list(chat.stream("Tell me about fjords."))[-1]
    second = list(chat.stream("And now write Python code."))[-1]
    assert second.mask_id == first.mask_id
    assert second.cached_tokens > first.prompt_tokens - 1
    assert [m["role"] for m in chat.messages] == [
        "system",
        *["user", "assistant"] * 2,
    ]


def test_reselecting_each_turn_changes_mask_and_starts_a_new_cache(engine):
    chat = engine.chat(reselect="turn", keep=0.25, max_tokens=4)
    first = list(chat.stream("Tell me about fjords."))[-1]
    second = list(chat.stream("def f(x): return 12345 + x"))[-1]
    assert second.mask_id != first.mask_id
    assert second.cached_tokens == 0


def test_each_reselecting_turn_selects_as_the_first_of_a_conversation(engine):
    said = {"role": "system", "content": "You are a poet of few words."}
    options = {"keep": 0.25, "max_tokens": 2}
    chat = engine.chat(system=said["content"], reselect="turn", **options)
    for text in ("Tell me about fjords.", "def f(x): return 12345 + x"):
        turn = list(chat.stream(text))[-1]
        messages = [said, {"role": "user", "content": text}]
        assert turn.identity == list(engine.stream(messages, **options))[-1].identity


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_cached_conversation_continues_as_an_uncached_one(tmp_path, family):
    folder = write_folder(tmp_path / family, family)
    answers = []
    for size in (0, 1 << 24):
        with Engine.open(folder, prompt_cache_bytes=size) as engine:
            chat = engine.chat(max_tokens=12)
            answers.append([chat.generate(t) for t in ("One.", "Two?", "Three!")])
    assert answers[0] == answers[1]


def test_sampling_is_repeatable_alone_and_in_a_batch(engine):
    options = {"temp": 1.0, "seed": 7, "max_tokens": 12, "instruction": FRENCH}
    alone = engine.generate("Hello", **options)
    assert alone == engine.generate("Hello", **options)
    assert alone != engine.generate("Hello", **options | {"seed": 8})

    async def together():
        others = [engine.agenerate("Hello", **options | {"seed": n}) for n in range(3)]
        return (await asyncio.gather(engine.agenerate("Hello", **options), *others))[0]

    assert asyncio.run(together()) == alone


def test_stop_strings_end_the_text_before_them(engine):
    whole = engine.generate("Hello", max_tokens=30)
    stop = whole[7:10]
    cut = engine.generate("Hello", max_tokens=30, stop_strings=(stop, "never there"))
    assert cut == whole[: whole.index(stop)]


def test_logprobs_are_those_of_the_greedy_choice(engine):
    events = engine.stream("Hello", max_tokens=3, logprobs=True, top_logprobs=2)
    for token in (event for event in events if isinstance(event, Token)):
        own, best, second = token.logprobs
        assert own == best and own.id == token.id
        assert second.logprob <= own.logprob <= 0


def test_a_model_in_bfloat16_gives_logprobs(tmp_path):
    folder = write_folder(tmp_path / "m")
    halves = lambda weights: {n: w.astype(mx.bfloat16) for n, w in weights.items()}  # noqa: E731
    change_weights(folder, halves)
    with Engine.open(folder) as engine:
        [token] = [
            event
            for event in engine.stream("Hi", max_tokens=1, logprobs=True)
            if isinstance(event, Token)
        ]
    assert token.logprobs[0].id == token.id and token.logprobs[0].logprob < 0


def test_more_best_tokens_than_there_are_leave_all(engine):
    options = {"temp": 1.0, "seed": 3, "max_tokens": 4}
    assert engine.generate("Hi", top_k=5000, **options) == engine.generate(
        "Hi", **options
    )


def test_unload_gives_memory_back_and_tasks_stay(folder):
    with Engine.open(folder) as engine:
        before = engine.memory()["active"]
        engine.prepare(FRENCH, name="french")
        answer = engine.generate("Hi", task="french", max_tokens=4)
        used = engine.memory()
        assert used["compact_models"] > 0 and used["prompt_cache"] > 0
        engine.unload()
        empty = engine.memory()
        assert (empty["compact_models"], empty["prompt_cache"]) == (0, 0)
        assert empty["active"] <= before + 10_000  # the selections' indices
        assert empty["freed_but_cached"] == 0
        assert [task.resident for task in engine.tasks()] == [False]
        assert engine.generate("Hi", task="french", max_tokens=4) == answer


def test_rounds_of_loading_and_unloading_keep_memory_flat(folder):
    engine = Engine.open(folder)
    after = []
    for _ in range(8):
        engine.prepare(FRENCH, name="french")
        engine.generate("Hi", task="french", max_tokens=2)
        engine.unload()
        after.append(engine.memory()["active"])
    engine.close()
    assert max(after) == min(after)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"task": "nobody"}, UnknownTask, "'nobody'"),
        ({"keep": 1.5}, InvalidRequest, "keep=1.5"),
        ({"selector": "magic"}, InvalidRequest, "'magic'"),
        ({"allocation": "odd"}, InvalidRequest, "'odd'"),
        ({"task": "a", "instruction": "b"}, InvalidRequest, "task and instruction"),
        ({"task": "a", "keep": 0.5}, InvalidRequest, "leave out keep"),
        ({"mask_file": "/no/such"}, ModelNotFound, "/no/such"),
        ({"max_tokens": 0}, InvalidRequest, "max_tokens=0"),
        ({"temp": -1}, InvalidRequest, "temp=-1"),
        ({"stop_strings": ("",)}, InvalidRequest, "empty"),
        ({"temp": "1"}, InvalidRequest, "temp='1' must be a number"),
        ({"max_tokens": "3"}, InvalidRequest, "max_tokens='3' must be a number"),
        ({"stop_strings": 3}, InvalidRequest, "stop_strings=3 must be a list"),
        ({"stop_strings": "end"}, InvalidRequest, "stop_strings='end' must be a list"),
        ({"max_tokens": 600}, ContextTooLong, "600.*512"),
        ({"colour": "red"}, InvalidRequest, "'colour'"),
    ],
)
def test_mistakes_are_sentences_with_the_value(engine, options, error, words):
    with pytest.raises(error, match=words):
        engine.generate("Hello", **options)


def test_an_empty_prompt_is_refused(engine):
    with pytest.raises(InvalidRequest, match="empty"):
        engine.generate("  ")


@pytest.mark.parametrize("prompt", [None, 5, {"role": "user"}])
def test_what_is_no_prompt_is_refused(prompt, engine):
    with pytest.raises(InvalidRequest, match="neither a text, nor messages"):
        engine.generate(prompt)


def test_errors_of_opening_have_their_types(tmp_path):
    with pytest.raises(ModelNotFound, match="nowhere"):
        Engine.open(tmp_path / "nowhere")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises((IncompatibleModel, ModelNotFound)):
        Engine.open(tmp_path / "bad")


def test_a_memory_limit_is_checked_before_loading_and_put_back(folder):
    before = mx.set_memory_limit(1 << 40)
    try:
        with Engine.open(folder, memory_limit=150_000) as engine:
            with pytest.raises(OutOfMemory, match="memory limit of 0 MB"):
                engine.prepare(FRENCH, keep=1.0)
            with pytest.raises(OutOfMemory):
                engine.generate("Hi", keep=0.5, max_tokens=400)
            assert engine.prepare(FRENCH, keep=0.5).bytes <= 150_000
        assert mx.set_memory_limit(before) == 1 << 40
    finally:
        mx.set_memory_limit(before)


def test_too_many_waiting_requests_are_refused(folder):
    with Engine.open(folder, max_queue=1, batch=1) as engine:

        async def crowd():
            jobs = [engine.agenerate("Hi", max_tokens=30) for _ in range(8)]
            return await asyncio.gather(*jobs, return_exceptions=True)

        results = asyncio.run(crowd())
    refused = [r for r in results if isinstance(r, Busy)]
    assert 0 < len(refused) < 8
    assert len({r for r in results if isinstance(r, str)}) == 1


def test_a_closed_engine_says_so_and_ends_what_runs(folder):
    engine = Engine.open(folder)
    events = engine.stream("Hello", max_tokens=480)
    next(events)
    engine.close()
    engine.close()
    with pytest.raises(EngineClosed, match="closed"):
        list(events)
    for call in (engine.tasks, engine.unload, lambda: engine.generate("Hi")):
        with pytest.raises(EngineClosed):
            call()


def test_a_dead_worker_fails_every_waiter(folder):
    engine = Engine.open(folder)
    events = engine.stream("Hello", max_tokens=480)
    next(events)

    def die(host):
        raise SystemError("out of luck")

    def dying(host):
        host.turn = lambda: die(host)

    engine._worker.submit(dying)
    with pytest.raises(EngineClosed, match="SystemError: out of luck"):
        list(events)
    with pytest.raises(EngineClosed, match="out of luck"):
        engine.memory()
    assert not engine.alive
    engine.close()


def test_an_error_in_one_batch_leaves_the_others(folder, monkeypatch):
    from ifp_mlx.engine import lanes

    with Engine.open(folder) as engine:
        good = engine.generate("Hi", max_tokens=3)

        def broken(self, token):
            raise RuntimeError("no such byte")

        with monkeypatch.context() as patch:
            patch.setattr(lanes.Text, "add", broken)
            with pytest.raises(RuntimeError, match="no such byte"):
                engine.generate("Hi", max_tokens=3)
        assert engine.generate("Hi", max_tokens=3) == good


def test_weights_that_cannot_be_read_fail_their_request_alone(tmp_path):
    folder = write_folder(tmp_path / "m")
    with Engine.open(folder) as engine:
        good = engine.generate("Hi", max_tokens=3)
        file = folder / "model.safetensors"
        os.truncate(file, file.stat().st_size // 2)
        for options in ({"selector": "random"}, {"instruction": "Something else."}):
            with pytest.raises((RuntimeError, OSError)):
                engine.generate("Hi", **options)
        assert engine.generate("Hi", max_tokens=3) == good


EXIT = """
import sys
from ifp_mlx.engine import Engine, Token
how, folder = sys.argv[1:]
engine = Engine.open(folder, prefill_step=16)
check = "exact" if how == "checking" else "off"
how = {"keep": 0.5, "max_tokens": 200, "check": check}
events = engine.stream("Hello there, how are you?", **how)
for event in events:
    if isinstance(event, Token):
        break
if how == "closed":
    engine.close()
"""


@pytest.mark.parametrize("how", thinned(["checking", "forgotten", "closed"], 3))
def test_a_process_ends_cleanly_however_it_leaves(large_folder, how):
    load(large_folder)[0].known_prior()  # there, it would read a longer text
    done = subprocess.run(
        [sys.executable, "-c", EXIT, how, str(large_folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.long
@pytest.mark.real
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_a_real_batch_answers_as_each_alone(name):
    from conftest import fetch

    prompts = ["Why?", "Write a function that sorts a list of names.", "Once upon"]
    with Engine.open(fetch(name), prompt_cache_bytes=0) as engine:
        engine.prepare("You answer questions.", keep=0.75, name="task")
        options = {"task": "task", "max_tokens": 16}
        alone = [engine.generate(prompt, **options) for prompt in prompts]

        async def together():
            jobs = (engine.agenerate(prompt, **options) for prompt in prompts)
            return await asyncio.gather(*jobs)

        assert asyncio.run(together()) == alone
