"""The server, with the official client in process, and with real sockets outside."""

import asyncio
import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import add_card, run_command, write_family, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from ifp_mlx import load
from ifp_mlx.engine import Engine
from ifp_mlx.openai.api import Policy, make_app
from ifp_mlx.openai.asked import Defaults
from ifp_mlx.server import main

openai = pytest.importorskip("openai")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from served import HELLO, ask, chat, get, post, write_able  # noqa: E402

SCRIPTS = Path(__file__).parents[2] / "examples/benchmarks/server"
FRENCH = "You translate English into French."
ADD = {"type": "function", "function": {"name": "add"}}
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "maximum": 99}, "s": {"enum": ["a", "b"]}},
    "required": ["n", "s"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("server") / "tiny")


@pytest.fixture(scope="module")
def engine(folder):
    with Engine.open(folder, max_queue=8, batch=4) as engine:
        engine.prepare(FRENCH, name="french", keep=0.5)
        yield engine


@pytest.fixture(scope="module")
def library(folder, tmp_path_factory):
    library = tmp_path_factory.mktemp("library")
    poems = load(folder)[0].select("Poems.", keep=0.25, compensate=True)
    poems.save(library / "poems.safetensors")
    return library


@pytest.fixture
def app(engine, library):
    return make_app(engine, Policy("tiny", libraries=(library,)))


def test_a_chat_answers_as_the_engine_and_reports_its_mask(app, engine):
    answer = chat(app, model="tiny@french")
    [choice] = answer.choices
    expected = engine.generate("Hello", task="french", max_tokens=6)
    assert choice.message.content == expected
    assert choice.finish_reason == "length"
    task = engine.task("french")
    assert answer.ifp["mask_id"] == task.mask_id
    assert answer.ifp["kept_channels"] == task.kept_channels
    assert answer.ifp["total_channels"] == task.total_channels
    assert answer.ifp["seconds"].keys() >= {"select", "load", "prefill", "decode"}
    usage = answer.usage
    assert usage.completion_tokens == 6
    assert usage.total_tokens == usage.prompt_tokens + 6


def test_a_stream_is_the_same_answer_in_pieces(app):
    whole = chat(app, model="tiny@french")

    async def stream(client):
        chunks = await client.chat.completions.create(
            model="tiny@french",
            messages=HELLO,
            max_tokens=6,
            stream=True,
            stream_options={"include_usage": True},
        )
        return [chunk async for chunk in chunks]

    *chunks, last, usage = ask(app, stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert last.choices[0].finish_reason == "length"
    assert last.ifp["mask_id"] == whole.ifp["mask_id"]
    assert usage.choices == [] and usage.usage.completion_tokens == 6


def test_a_raw_stream_ends_with_done_and_shows_prefill(app):
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 2, "stream": True}
    text = post(app, "/v1/chat/completions", json=body).text
    assert text.endswith("data: [DONE]\n\n")
    assert ": prefill 0/" in text
    assert "usage" not in text


def test_completions_continue_a_text_or_token_ids(app, engine, folder):
    def complete(prompt, **options):
        options |= {"model": "tiny", "prompt": prompt, "max_tokens": 5}
        return ask(app, lambda client: client.completions.create(**options))

    answer = complete("Once upon")
    expected = engine.generate("Once upon", chat_template=False, max_tokens=5)
    assert answer.choices[0].text == expected
    tokens = load(folder)[1].encode("Once upon")
    assert complete(tokens).choices[0].text == expected
    assert complete(["Once upon"]).choices[0].text == expected
    logprobs = complete("Once upon", logprobs=5).choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == 5
    assert [len(best) for best in logprobs.top_logprobs] == [5] * 5
    assert max(logprobs.top_logprobs[0].values()) == logprobs.token_logprobs[0]
    found = zip(logprobs.text_offset, logprobs.tokens, strict=True)
    assert all(expected[at:].startswith(t) for at, t in found if "bytes:" not in t)


def test_server_and_engine_select_by_system_and_first_user_message(app, engine):
    def weights_of(*said):
        messages = [{"role": role, "content": content} for role, content in said]
        answer = chat(app, messages=messages, extra_body={"ifp": {"keep": 0.5}}).ifp
        for message in messages:
            message["role"] = message["role"].replace("developer", "system")
        *_, done = engine.stream(messages, max_tokens=1, keep=0.5)
        assert (answer["mask_id"], answer["identity"]) == (done.mask_id, done.identity)
        return done.identity

    french = engine.task("french").identity
    both = weights_of(("system", FRENCH), ("user", "Hello"))
    assert weights_of(("developer", FRENCH), ("user", "Hello")) == both != french
    assert weights_of(("system", FRENCH), ("user", "Bye")) != both
    first = ("user", FRENCH), ("assistant", "Oui")
    assert weights_of(*first, ("user", "Bye")) == french
    assert weights_of(("user", "Hello")) != french


def test_the_ifp_field_picks_task_instruction_mask_and_keep(app, engine, library):
    def mask_of(**ifp):
        return chat(app, extra_body={"ifp": ifp}).ifp["mask_id"]

    french = engine.task("french").mask_id
    assert mask_of(task="french") == french
    assert mask_of(instruction=FRENCH, keep=0.5) == french
    assert mask_of(instruction=FRENCH, keep=0.25, allocation="uniform") != french
    assert mask_of(instruction=FRENCH, keep="auto") == mask_of(instruction=FRENCH)
    poems = engine.prepare("Poems.", keep=0.25, name="poems").mask_id
    engine.forget("poems")
    assert mask_of(mask_file="poems.safetensors") == poems
    assert mask_of(selector="random") != mask_of(selector="activation")


def test_an_answer_quotes_the_models_card(tmp_path):
    folder = write_folder(tmp_path / "tiny")
    add_card(load(folder)[0], {0.5: 0.75})
    with Engine.open(folder) as engine:
        app = make_app(engine, Policy("tiny"))
        quoted = {
            keep: chat(app, extra_body={"ifp": {"keep": keep}}).ifp["promise"]
            for keep in (0.25, 0.5, 1.0)
        }
    assert quoted == {0.25: None, 0.5: 0.75, 1.0: 1.0}


def test_a_checked_answer_is_the_dense_models_streamed_or_not(app):
    dense = chat(app, extra_body={"ifp": {"keep": 1.0}}).choices[0].message.content
    ifp = {"task": "french", "check": "exact", "draft_tokens": 4}
    answer = chat(app, extra_body={"ifp": ifp})
    assert answer.choices[0].message.content == dense
    check = answer.ifp["check"]
    assert (check["mode"], check["drafted"] <= 4 * check["checks"]) == ("exact", True)

    async def stream(client):
        options = {"model": "tiny", "messages": HELLO, "max_tokens": 6}
        chunks = await client.chat.completions.create(
            **options, stream=True, extra_body={"ifp": ifp}
        )
        return [chunk async for chunk in chunks]

    *chunks, last = ask(app, stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == dense and last.ifp["check"]["checks"] == check["checks"]
    assert chat(app, model="tiny@french").ifp["check"] is None


def test_health_says_what_checking_took(app):
    def sums():
        return get(app, "/health").json()["check"]

    before = sums()
    took = chat(app, extra_body={"ifp": {"check": 0.5}}).ifp["check"]
    after = sums()
    for name in ("checks", "drafted", "accepted", "bytes_read"):
        assert after[name] - before[name] == took[name] and took[name] >= 0
    assert after["acceptance"] == after["accepted"] / after["drafted"]


ODD = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False)
ODD |= st.floats(0, 1) | st.text(max_size=5) | st.sampled_from(["off", "exact"])
ODD |= st.lists(st.floats(0, 1), max_size=2)


@settings(max_examples=40)
@given(ifp=st.fixed_dictionaries({"check": ODD}, optional={"draft_tokens": ODD}))
def test_any_way_of_checking_is_answered_or_refused(engine, ifp):
    app = make_app(engine, Policy("tiny"))
    body = {"model": "tiny@french", "messages": HELLO, "max_tokens": 2, "ifp": ifp}
    answer = post(app, "/v1/chat/completions", json=body)
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        assert answer.json()["error"]["param"] in ("ifp.check", "ifp.draft_tokens")


def test_a_mixture_refuses_to_be_checked(tmp_path):
    with Engine.open(write_family(tmp_path / "m", "qwen3_moe")) as engine:
        app = make_app(engine, Policy("tiny"))
        with pytest.raises(openai.BadRequestError, match="nearly all experts"):
            chat(app, extra_body={"ifp": {"check": "exact"}})


def test_a_check_that_cannot_be_read_is_the_servers_error(tmp_path):
    folder = write_folder(tmp_path / "m")
    with Engine.open(folder) as engine:
        app = make_app(engine, Policy("tiny"))
        exact = {"extra_body": {"ifp": {"check": "exact"}}}
        free = chat(app).choices[0].message.content
        text = chat(app, **exact).choices[0].message.content
        file = folder / "model.safetensors"
        os.truncate(file, file.stat().st_size // 2)
        with pytest.raises(openai.InternalServerError) as caught:
            chat(app, **exact)
        assert caught.value.body["code"] == "check_failed"
        body = {"model": "tiny", "messages": HELLO, "ifp": {"check": "exact"}}
        raw = post(app, "/v1/chat/completions", json=body | {"stream": True}).text
        assert raw.endswith("}}\n\n") and '"check_failed"' in raw and text not in raw
        assert chat(app).choices[0].message.content == free


def test_models_lists_the_tasks(app):
    async def models(client):
        listed = await client.models.list()
        return [model.id for model in listed.data], await client.models.retrieve("tiny")

    names, one = ask(app, models)
    assert names == ["tiny", "tiny@french"]
    assert one.id == "tiny"


def test_requests_together_answer_as_each_alone(app):
    prompts = ["Hello", "A rather longer question, is it not?", "Why?", "Hm"]

    async def one(client, prompt):
        answer = await client.chat.completions.create(
            model="tiny@french",
            messages=[{"role": "user", "content": prompt}],
            max_tokens=12,
        )
        return answer.choices[0].message.content

    async def alone(client):
        return [await one(client, prompt) for prompt in prompts]

    async def together(client):
        return await asyncio.gather(*(one(client, prompt) for prompt in prompts))

    assert ask(app, together) == ask(app, alone)


def test_a_json_schema_is_followed(app):
    pytest.importorskip("llguidance")
    for seed in range(3):
        answer = chat(
            app,
            temperature=1.5,
            seed=seed,
            max_tokens=80,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "pair", "schema": SCHEMA},
            },
        )
        assert answer.choices[0].finish_reason == "stop"
        content = json.loads(answer.choices[0].message.content)
        assert content.keys() == {"n", "s"}
        assert content["n"] <= 99 and content["s"] in ("a", "b")


def test_stop_and_logprobs_and_bias_are_honoured(app):
    whole = chat(app, max_tokens=20).choices[0].message.content
    stop = whole[4:6]
    cut = chat(app, max_tokens=20, stop=[stop]).choices[0]
    assert cut.message.content == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"
    [first, *_] = chat(app, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert len(first.top_logprobs) == 2
    assert first.top_logprobs[0].logprob == first.logprob
    said = chat(app, logprobs=True, max_tokens=20).choices[0]
    spelled = b"".join(bytes(one.bytes) for one in said.logprobs.content)
    assert spelled.decode(errors="replace") == said.message.content
    biased = chat(app, logit_bias={"65": 100}, max_tokens=3)
    assert len(set(biased.choices[0].message.content)) == 1


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"tools": [ADD]}, "tools"),
        ({"n": 17}, "n"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"extra_body": {"colour": 1}}, "colour"),
        ({"extra_body": {"ifp": {"colour": 1}}}, "ifp.colour"),
        ({"extra_body": {"ifp": {"keep": 0}}}, "ifp.keep"),
        ({"extra_body": {"ifp": {"min_agreement": 0}}}, "ifp.min_agreement"),
        ({"extra_body": {"ifp": {"check": 1}}}, "ifp.check"),
        ({"extra_body": {"ifp": {"check": "nearly"}}}, "ifp.check"),
        ({"extra_body": {"ifp": {"draft_tokens": 0}}}, "ifp.draft_tokens"),
        ({"extra_body": {"ifp": {"reselect": "drift"}}}, "ifp.reselect"),
        ({"extra_body": {"ifp": {"mask_file": "../x"}}}, "ifp.mask_file"),
        ({"extra_body": {"ifp": {"mask_file": "nobody"}}}, "ifp.mask_file"),
        ({"extra_body": {"ifp": {"mask_file": "x" * 300}}}, "ifp.mask_file"),
        ({"extra_body": {"ifp": {"task": "a", "instruction": "b"}}}, "ifp.instruction"),
        ({"model": "tiny@french", "extra_body": {"ifp": {"keep": 0.5}}}, "ifp.keep"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "critic", "content": "x"}]}, "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
        ),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stop": [""]}, "stop[0]"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
    ],
)
def test_what_is_not_supported_is_named(app, options, field):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(app, **options)
    assert caught.value.body["param"] == field
    assert field in caught.value.body["message"]


def test_a_schema_that_cannot_be_followed_is_refused(app):
    pytest.importorskip("llguidance")
    with pytest.raises(openai.BadRequestError, match="schema"):
        chat(
            app,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "nothing"}},
            },
        )


@pytest.mark.parametrize(
    ("options", "error", "code"),
    [
        ({"model": "other"}, openai.NotFoundError, "model_not_found"),
        ({"model": "tiny@nobody"}, openai.NotFoundError, "task_not_found"),
        ({"max_tokens": 600}, openai.APIStatusError, "context_length_exceeded"),
    ],
)
def test_refusals_have_codes(app, options, error, code):
    with pytest.raises(error) as caught:
        chat(app, **options)
    assert caught.value.body["code"] == code


def test_a_token_id_beyond_the_vocabulary_is_refused(app):
    for options in ({"prompt": [9999]}, {"prompt": "x", "logit_bias": {"9999": 1}}):
        options |= {"model": "tiny"}
        with pytest.raises(openai.BadRequestError, match="9999"):
            ask(app, lambda client, o=options: client.completions.create(**o))


def test_a_full_queue_is_429_and_the_others_are_answered(folder):
    with Engine.open(folder, max_queue=1, batch=1) as engine:
        app = make_app(engine, Policy("tiny"))

        async def crowd(client):
            jobs = [
                client.chat.completions.create(
                    model="tiny", messages=HELLO, max_tokens=30
                )
                for _ in range(8)
            ]
            return await asyncio.gather(*jobs, return_exceptions=True)

        results = ask(app, crowd)
    refused = [r for r in results if isinstance(r, openai.RateLimitError)]
    assert 0 < len(refused) < 8
    assert all(r.response.headers["retry-after"] == "1" for r in refused)
    assert len(refused) + sum(hasattr(r, "choices") for r in results) == 8


def test_the_door_checks_key_host_type_and_size(engine):
    policy = Policy("tiny", api_key="secret", max_body=200)
    app = make_app(engine, policy)
    with pytest.raises(openai.AuthenticationError):
        chat(app)
    listed = ask(app, lambda client: client.models.list(), api_key="secret")
    assert listed.data[0].id == "tiny"

    def status(content=b"{}", path="/v1/chat/completions", **headers):
        given = {"Authorization": "Bearer secret", "Content-Type": "application/json"}
        return post(app, path, content=content, headers=given | headers).status_code

    assert status() == 400
    assert status(Host="evil.example:8080") == 403
    assert status(**{"Content-Type": "text/plain"}) == 415
    assert status(b" " * 201) == 413
    assert status(path="/v1/embeddings") == 404
    assert status(path="/v1/models") == 405


def test_a_key_that_is_not_utf_8_opens_the_door_too(engine):
    app = make_app(engine, Policy("tiny", api_key=os.fsdecode(b"\xff")))

    def status(key):
        headers = {"Content-Type": "application/json", "Authorization": key}
        return post(app, "/v1/completions", content=b"{}", headers=headers).status_code

    assert (status(b"Bearer \xff"), status(b"Bearer x")) == (400, 401)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'{"a": NaN}', b'{"a": "\\ud800"}', b"[" * 99999, b"\xff"]
)
def test_a_body_that_is_no_json_object_is_refused(app, body):
    headers = {"Content-Type": "application/json"}
    answer = post(app, "/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_no_browser_page_is_let_in(app):
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 1}
    headers = {"Origin": "https://evil.example"}
    answer = post(app, "/v1/chat/completions", json=body, headers=headers)
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_health_tells_when_the_worker_has_died(folder):
    engine = Engine.open(folder)
    app = make_app(engine, Policy("tiny"))

    health = get(app, "/health")
    assert (health.status_code, health.json()["status"]) == (200, "ok")
    engine.close()
    assert get(app, "/health").status_code == 503
    with pytest.raises(openai.InternalServerError) as caught:
        chat(app)
    assert caught.value.status_code == 503


def test_the_default_keep_and_temperature_are_the_servers(engine):
    app = make_app(engine, Policy("tiny", defaults=Defaults(keep=0.25)))
    answer = chat(app, messages=[{"role": "user", "content": FRENCH}])
    expected = engine.prepare(FRENCH, keep=0.25, name="quarter")
    engine.forget("quarter")
    assert answer.ifp["mask_id"] == expected.mask_id


@contextmanager
def served(folder, *options):
    """Run the command; yield its URL and the process."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ifp_mlx.server", "--model", folder, "--port", "0"]
        + list(options),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stderr.readline()
        yield re.search(r"http://\S+(?=/v1)", line).group(), process
    finally:
        process.terminate()
        rest = process.communicate(timeout=60)[1]
        assert (process.returncode, rest) == (0, "")


def test_malformed_requests_get_4xx_and_the_server_stops_gracefully(tmp_path):
    with served(write_able(tmp_path / "able")) as (url, _):
        script = [sys.executable, SCRIPTS / "server_fuzz.py", "--url", url]
        done = subprocess.run(
            [*script, "--requests", "150"], capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["failures"] == 0 and report["malformed"] == 150


@pytest.mark.long  # a server and a crowd, each a process
def test_a_crowd_gets_right_answers_and_a_killed_client_frees_its_slot(tmp_path):
    folder = write_able(tmp_path / "able")
    options = "--clients 8 --seconds 1 --tokens 6 --batch 4 --turns 1".split()
    done = subprocess.run(
        [sys.executable, SCRIPTS / "server_load.py", "--model", folder, *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["wrong_answers"] == 0
    assert report["choices_of_tools"] == ["none", "auto", "required"]
    assert report["killed_client_was_served"] and report["killed_client_freed"]
    assert report["server_exit_status"] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prepare", "french"], "'french' is not of the form"),
        (["--batch", "0"], "--batch 0"),
        (["--keep", "2", "--prepare", "a=b"], "keep=2"),
        (["--memory-limit", "100000", "--prepare", "a=b"], "memory limit"),
    ],
)
def test_mistakes_in_the_command_are_one_line(capsys, folder, options, words):
    status, out, err = run_command(main, capsys, "--model", folder, *options)
    assert (status, out) == (2, "")
    assert words in err and err.count("\n") == 1


def test_without_the_extra_the_command_names_it(capsys, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    status, _, err = run_command(main, capsys, "--model", folder)
    assert status == 2
    assert "pip install 'ifp-mlx[server]'" in err


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    folder = write_family(tmp_path_factory.mktemp("mixture") / "m", "qwen3_moe")
    with Engine.open(folder) as engine:
        engine.prepare(FRENCH, name="french", keep=0.25)
        yield make_app(engine, Policy("tiny")), engine


def test_an_answer_of_a_mixture_says_how_good_its_experts_are(mixture):
    app, engine = mixture
    task = engine.task("french")
    for fields in (
        {"model": "tiny@french"},
        {"extra_body": {"ifp": {"instruction": FRENCH, "keep": 0.25}}},
    ):
        said = chat(app, **fields).ifp
        assert (said["unit"], said["kept_channels"]) == ("expert", 6)
        assert said["agreement"] == pytest.approx(task.agreement)
        assert said["router_mass"] == pytest.approx(task.router_mass)


def test_an_answer_can_be_refused_for_too_little_agreement(mixture):
    app, engine = mixture
    asked = {"instruction": FRENCH, "keep": 0.25}
    assert 0 < engine.task("french").agreement < 1
    low = asked | {"min_agreement": engine.task("french").agreement}
    assert chat(app, extra_body={"ifp": low}).choices
    for fields in (
        {"extra_body": {"ifp": asked | {"min_agreement": 1}}},
        {"model": "tiny@french", "extra_body": {"ifp": {"min_agreement": 1}}},
    ):
        with pytest.raises(openai.BadRequestError, match="next token at"):
            chat(app, **fields)


def test_requests_with_different_experts_answer_as_each_alone(mixture):
    texts = ["Add numbers.", "Traduis en français.", "SELECT name FROM people;"] * 2

    async def one(client, text):
        answer = await client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            max_tokens=8,
            extra_body={"ifp": {"instruction": text, "keep": 0.25}},
        )
        return answer.choices[0].message.content, answer.ifp["mask_id"]

    async def alone(client):
        return [await one(client, text) for text in texts]

    async def together(client):
        return await asyncio.gather(*(one(client, text) for text in texts))

    app, _ = mixture
    found = ask(app, together)
    assert found == ask(app, alone) and len({mask for _, mask in found}) > 1
