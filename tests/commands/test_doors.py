"""The same inputs at every door: what one refuses in a sentence, all refuse."""

import io
import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import run_command, write_folder

import ifp_mlx
from ifp_mlx import load
from ifp_mlx.bundle import main as bundle
from ifp_mlx.compact import main as compact
from ifp_mlx.engine import Engine, InvalidRequest
from ifp_mlx.engine.sampling import Sampling
from ifp_mlx.evaluate import main as evaluate
from ifp_mlx.generate import main as generate
from ifp_mlx.tasks import main as tasks
from ifp_mlx.train import main as train


def command(main, *arguments):
    """Return a door: a command, with FOLDER, TEXT, DATA and OUT put in."""

    def enter(folder, text, tmp_path, capsys):
        data = tmp_path / "data"
        data.mkdir()
        message = {"role": "user", "content": text}
        answer = {"role": "assistant", "content": "Fine."}
        row = json.dumps({"messages": [message, answer]})
        for split in ("train", "valid"):
            (data / f"{split}.jsonl").write_text(f"{row}\n")
        values = {"FOLDER": folder, "TEXT": text, "DATA": data, "OUT": tmp_path / "out"}
        values["ROWS"] = data / "train.jsonl"
        given = [values.get(argument, argument) for argument in arguments]
        status, _, err = run_command(main, capsys, *given)
        assert status == 2 and err.count("\n") == 1, err
        return err

    return enter


def function(act):
    """Return a door: a function of the package."""

    def enter(folder, text, *_):
        with pytest.raises(ValueError) as refused:
            act(folder, text)
        return str(refused.value)

    return enter


def in_engine(act):
    def run(folder, text):
        with Engine.open(folder) as engine:
            return act(engine, text)

    return function(run)


ONE = ("--model", "FOLDER", "--keep", "0.5")
DOORS = {
    "generate": command(generate, *ONE, "--prompt", "TEXT"),
    "plain text": command(generate, *ONE, "-p", "TEXT", "--ignore-chat-template"),
    "system prompt": command(generate, *ONE, "-p", "Hi", "--system-prompt", "TEXT"),
    "instruction": command(generate, *ONE, "-p", "Hi", "--instruction", "TEXT"),
    "checked": command(generate, *ONE, "--prompt", "TEXT", "--check", "exact"),
    "compact": command(compact, *ONE, "--instruction", "TEXT", "--mlx-path", "OUT"),
    "bundle": command(bundle, *ONE, "--instruction", "TEXT", "--output", "OUT"),
    "task": command(tasks, "make", *ONE, "--name", "a", "--instruction", "TEXT"),
    "examples": command(tasks, "make", *ONE, "--name", "a", "--examples", "ROWS"),
    "evaluate": command(evaluate, "--model", "FOLDER", "--data", "ROWS"),
    "train": command(
        train,
        *("--model", "FOLDER", "--data", "DATA", "--output", "OUT", "--steps", "1"),
        *("--stage", "sft", "--masker", "dense", "--max-length", "256"),
    ),
    "API": function(lambda folder, text: ifp_mlx.generate(*load(folder), text)),
    "API select": function(lambda folder, text: load(folder)[0].select(text, keep=0.5)),
    "engine": in_engine(lambda engine, text: engine.generate(text)),
    "engine's task": in_engine(lambda engine, text: engine.prepare(text, keep=0.5)),
}


@pytest.fixture
def door(request, tmp_path, capsys):
    folder = write_folder(tmp_path / "model", vocab_size=258, eos_token_id=257)
    path = folder / "tokenizer_config.json"
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    settings = json.loads(path.read_text()) | {"chat_template": template}
    path.write_text(json.dumps(settings))
    enter = DOORS[request.param]
    return lambda text: enter(folder, text, tmp_path, capsys)


@pytest.mark.parametrize("door", DOORS, indirect=True)
def test_a_token_beyond_the_embedding_is_refused(door):
    assert "The token id 258 is beyond the model's, which go from 0 to 257" in door(
        "Hello<|im_end|>"
    )


@pytest.mark.parametrize("door", DOORS, indirect=True)
def test_a_text_that_was_not_utf_8_is_refused(door):
    text = b"Hi \xe9".decode(errors="surrogateescape")
    assert "not UTF-8 at character 4 ('\\udce9'); give it as UTF-8" in door(text)


def test_stdin_that_is_not_utf_8_is_refused(tiny_folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Hi \xe9")))
    given = ["--model", tiny_folder, "--prompt", "-"]
    status, _, err = run_command(generate, capsys, *given)
    assert status == 2 and "stdin is not UTF-8 at byte 4 (0xe9)" in err


@pytest.mark.parametrize("ids", [[5, 259], [5, -1]])
def test_ids_that_the_model_does_not_have_are_refused_from_python(tiny_folder, ids):
    model, tokenizer = load(tiny_folder)
    task = model.select("French.", keep=0.5)
    for options in ({"keep": 0.5}, {"selection": task}):
        with pytest.raises(ValueError, match=f"token id {ids[1]} is beyond"):
            ifp_mlx.generate(model, tokenizer, ids, **options)


def test_arrays_of_ids_are_taken_as_lists_are(tiny_folder):
    model, tokenizer = load(tiny_folder)
    ids = tokenizer.encode("Hello")
    forms = [ids, tuple(ids), np.array(ids), list(np.array(ids)), mx.array(ids)]
    options = {"keep": 0.5, "max_tokens": 3}
    texts = {ifp_mlx.generate(model, tokenizer, form, **options) for form in forms}
    assert len(texts) == 1
    masks = {model.select(form, keep=0.5).mask_id for form in forms}
    with Engine.open(tiny_folder) as engine:
        texts = {engine.generate(form, **options) for form in forms}
        assert len(texts) == 1
        tasks = {engine.prepare(form, keep=0.5).mask_id for form in forms}
    assert len(masks) == len(tasks) == 1


def test_an_answer_that_was_begun_is_continued(tiny_folder):
    model, tokenizer = load(tiny_folder)
    chat = [{"role": "user", "content": "Hello"}]
    begun = [*chat, {"role": "assistant", "content": "Well, "}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=1)
    ids = tokenizer.encode(f"{text}Well, ", add_special_tokens=False)
    options = {"keep": 0.5, "max_tokens": 6, "instruction": "French."}
    answer = ifp_mlx.generate(model, tokenizer, ids, **options)
    assert ifp_mlx.generate(model, tokenizer, begun, **options) == answer != ""
    with Engine.open(tiny_folder) as engine:
        assert engine.generate(begun, **options) == engine.generate(ids, **options)


SAMPLING = {"temp": ("-1", "nan", "inf"), "top_p": ("-1", "1.5", "nan")}
SAMPLING |= {"min_p": ("2", "-0.1"), "top_k": ("-1",)}


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, values in SAMPLING.items() for v in values]
)
def test_a_sampling_value_out_of_bounds_is_refused(tiny_folder, capsys, name, value):
    flags = ["--model", tiny_folder, "-p", "Hi", "--temp", "1"]
    for more in ([], ["--check", "exact"]):
        given = [*flags, f"--{name.replace('_', '-')}", value, *more]
        status, _, err = run_command(generate, capsys, *given)
        assert status == 2 and f"error: {name}=" in err and "must be" in err
    with pytest.raises(InvalidRequest, match=f"{name}="):
        Sampling(**{name: float(value)})


def test_top_p_0_takes_the_most_likely_token(tiny_folder, capsys):
    model, tokenizer = load(tiny_folder)
    flags = ["--model", tiny_folder, "-p", "Hello", "-m", "6", "--keep", "0.5"]
    answers = set()
    for more in ([], ["--temp", "1", "--top-p", "0"]):
        for check in ([], ["--check", "0.5"]):
            status, out, err = run_command(generate, capsys, *flags, *more, *check)
            assert status == 0, err
            answers.add((tuple(check), out))
    assert len(answers) == 2  # one for each check
    with Engine.open(tiny_folder) as engine:
        options = {"keep": 0.5, "max_tokens": 6}
        greedy = engine.generate("Hello", **options)
        for seed in range(3):
            drawn = {"temp": 1.0, "top_p": 0, "seed": seed}
            assert engine.generate("Hello", **options, **drawn) == greedy


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_that_cannot_be_had_is_refused(tiny_folder, capsys, tmp_path, seed):
    given = ["--model", tiny_folder, "-p", "Hi", "--temp", "1", "--seed", seed]
    status, _, err = run_command(generate, capsys, *given)
    assert status == 2 and f"seed={seed} must be 0 to" in err
    given = ["--model", tiny_folder, "--data", "d", "--output", tmp_path / "o"]
    status, _, err = run_command(train, capsys, *given, "--seed", seed)
    assert status == 2 and f"seed={seed} must be 0 to" in err
