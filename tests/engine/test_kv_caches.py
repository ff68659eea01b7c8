"""An engine keeps KV caches as it is told."""

import mlx_lm
import pytest
from conftest import write_folder

from ifp_mlx import load
from ifp_mlx.engine import CancelToken, Done, Engine, InvalidRequest, Token

LONG = "Hello, this is a text of some length."
PACKED = {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("kv") / "tiny"
    return write_folder(path, "qwen3", head_dim=32, hidden_size=64)


def expected(folder, prompt, **how):
    model, tokenizer = load(folder)
    tokens = model.instruction_tokens(prompt)
    steps = mlx_lm.stream_generate(
        model.dense(), tokenizer, tokens, max_tokens=16, prefill_step_size=16, **how
    )
    return [step.token for step in steps]


def said(events):
    return [event.id for event in events if isinstance(event, Token)]


@pytest.mark.parametrize("how", [PACKED, {"max_kv_size": 20}], ids=str)
def test_keeping_everything_says_mlx_lms_own_tokens(how, folder):
    ask = {"keep": 1.0, "max_tokens": 16}
    with Engine.open(folder, prefill_step=16, **how) as engine:
        assert said(engine.stream(LONG, **ask)) == expected(folder, LONG, **how)
        *_, done = engine.stream(LONG, **ask)
        assert isinstance(done, Done)
        if "kv_bits" in how:  # what went round cannot go back
            assert done.cached_tokens == done.prompt_tokens - 1
        with pytest.raises(InvalidRequest, match="does not go with check=exact"):
            engine.generate(LONG, check="exact", keep=0.5)


def test_requests_with_a_quantised_cache_take_turns(folder):
    ask = {"keep": 0.5, "max_tokens": 8, "temp": 1.0, "seed": -3, "instruction": "Hm"}
    with Engine.open(folder, prefill_step=4, **PACKED) as engine:
        alone = [said(engine.stream(text, **ask)) for text in (LONG, "Hi")]
        engine.unload()
        streams = [engine.stream(text, **ask) for text in (LONG, "Hi")]
        found = [[next(s) for s in streams] for _ in range(2)]
        assert found
        assert [said(stream) for stream in streams] == alone
        stop = CancelToken()
        events = []
        for event in engine.stream(LONG, stop=stop, **ask | {"max_tokens": 60}):
            events.append(event)
            if len(said(events)) == 3:
                stop.cancel()
        assert events[-1].finish_reason == "cancelled"
        text = engine.generate("Hi", **ask)
        stopped = engine.generate("Hi", stop_strings=(text[2:4],), **ask)
        assert stopped == text[: text.index(text[2:4])]
        assert engine.memory()["kv_in_use"] == 0


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"kv_bits": 5}, "kv_bits=5 is none of"),
        ({"kv_bits": 4}, "does not divide this model's head size, 32"),
        ({"max_kv_size": 3}, "max_kv_size=3 must be more"),
    ],
)
def test_what_mlx_lm_cannot_is_refused_as_the_engine_opens(how, words, folder):
    with pytest.raises(InvalidRequest, match=words):
        Engine.open(folder, **how)
