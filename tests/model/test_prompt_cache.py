"""A text is read once, and answers go on from it, if the same compact model asks."""

import json

import mlx.core as mx
import mlx_lm
import pytest
from conftest import run_command, write_adapter, write_folder
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache

from ifp_mlx import load, stream_generate
from ifp_mlx.generate import main

TEXT, MORE = "A long text about fjords. ", "What is one?"
ASKED = ("--instruction", "Hello", "--keep", "0.5")


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    return load(write_folder(tmp_path_factory.mktemp("cache") / "tiny"))


def run(capsys, model, *more):
    given = ["--model", model.path, "-m", 6, "--json", *more]
    status, out, err = run_command(main, capsys, *given)
    assert status == 0, err
    return json.loads(out.splitlines()[-1])


def test_a_new_file_is_written_and_the_answer_is_the_same(opened, tmp_path, capsys):
    model, _ = opened
    file = tmp_path / "text.safetensors"
    plain = run(capsys, model, "-p", TEXT, *ASKED, "--prefill", "compact")
    made = run(capsys, model, "-p", TEXT, *ASKED, "--prompt-cache-file", file)
    assert made["text"] == plain["text"] and made["cached_tokens"] == 0
    assert made["prompt_tokens"] == plain["prompt_tokens"]
    cache, about = load_prompt_cache(str(file), return_metadata=True)
    assert cache[0].offset == len(json.loads(about["ifp_tokens"]))
    assert about["ifp_identity"] == made["selection"]["identity"]


@pytest.mark.parametrize("template", [True, False])
def test_the_prompt_goes_on_where_the_file_ends(template, opened, tmp_path, capsys):
    model, _ = opened
    file = tmp_path / "text.safetensors"
    raw = () if template else ("--ignore-chat-template",)
    keep = ("--prompt-cache-file", file, *ASKED, *raw)
    run(capsys, model, "-p", TEXT, *keep)
    before = file.read_bytes()
    again = run(capsys, model, "-p", MORE, *keep)
    together = ["-p", TEXT + MORE, *ASKED, *raw]
    whole = run(capsys, model, *together, "--prefill", "compact")
    assert again["text"] == whole["text"]
    assert again["prompt_tokens"] == whole["prompt_tokens"]
    assert 0 < again["cached_tokens"] < again["prompt_tokens"]
    assert file.read_bytes() == before


def test_keeping_everything_goes_on_as_mlx_lm_does(opened, tmp_path):
    model, tokenizer = opened
    file = tmp_path / "text.safetensors"
    how = {"keep": 1.0, "max_tokens": 6}
    list(
        stream_generate(model, tokenizer, [5, 9, 7, 12], prompt_cache_file=file, **how)
    )
    found = stream_generate(model, tokenizer, [3, 4], prompt_cache_file=file, **how)
    cache = make_prompt_cache(model.dense())
    cache, _ = load_prompt_cache(str(file), return_metadata=True)
    stock = mlx_lm.stream_generate(
        model.dense(), tokenizer, [3, 4], prompt_cache=cache, max_tokens=6
    )
    tokens = [step.token for step in stock]
    assert [step.token for step in found] == tokens
    plain = stream_generate(model, tokenizer, [5, 9, 7, 12, 3, 4], **how)
    assert [step.token for step in plain] == tokens


def test_the_cache_of_another_mask_adapter_or_model_is_refused(
    opened, tmp_path, capsys
):
    model, _ = opened
    file = tmp_path / "text.safetensors"
    run(capsys, model, "-p", TEXT, *ASKED, "--prompt-cache-file", file)
    lora = write_adapter(tmp_path / "lora", model.path)
    other = write_folder(tmp_path / "other", seed=4)
    given = ["-p", MORE, "--prompt-cache-file", file, "--keep", "0.5"]
    for more, words in (
        (
            ["--model", model.path, "--instruction", "Another"],
            "select as when it was made",
        ),
        (["--model", model.path], "select as when it was made"),
        (
            ["--model", model.path, "--instruction", "Hello", "--adapter-path", lora],
            "with another adapter",
        ),
        (["--model", other, "--instruction", "Hello"], "another model"),
    ):
        status, out, err = run_command(main, capsys, *given, *more)
        assert (status, out) == (2, "") and words in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("text.bin", (), "ends in .safetensors"),
        ("broken.safetensors", (), "is no prompt cache that ifp_mlx wrote"),
        ("foreign.safetensors", (), "is no prompt cache that ifp_mlx wrote"),
        ("other.safetensors", (), "is no prompt cache that ifp_mlx wrote"),
        ("none/text.safetensors", (), "cannot be written"),
        ("new.safetensors", ("--check", "exact"), "leave one of them out"),
        ("new.safetensors", ("--prefill", "dense"), "leave one of them out"),
        ("text.safetensors", ("--system-prompt", "Hm"), "no system prompt"),
        ("text.safetensors", ("--max-kv-size", "50"), "is not how"),
    ],
)
def test_a_file_that_cannot_be_is_one_sentence(
    name, flags, words, opened, tmp_path, capsys
):
    model, _ = opened
    run(
        capsys,
        model,
        "-p",
        TEXT,
        *ASKED,
        "--prompt-cache-file",
        tmp_path / "text.safetensors",
    )
    (tmp_path / "broken.safetensors").write_bytes(b"12")
    mx.save_safetensors(str(tmp_path / "foreign.safetensors"), {"x": mx.zeros(3)})
    kept, about = mx.load(str(tmp_path / "text.safetensors"), return_metadata=True)
    about = {n: '["a"]' if n.endswith("ifp_tokens") else v for n, v in about.items()}
    mx.save_safetensors(str(tmp_path / "other.safetensors"), kept, about)
    (tmp_path / "none").write_text("a file")
    given = ["--model", model.path, "-p", MORE, *ASKED, *flags]
    status, _, err = run_command(
        main, capsys, *given, "--prompt-cache-file", tmp_path / name
    )
    assert status == 2 and words in err and len(err.splitlines()) == 1, err
    assert not (tmp_path / "new.safetensors").exists()


def test_a_quantised_cache_is_kept_quantised(tmp_path, capsys):
    folder = write_folder(tmp_path / "tiny", head_dim=32, hidden_size=64)
    model, _ = load(folder)
    file = tmp_path / "text.safetensors"
    kept = ("--prompt-cache-file", file, *ASKED, "--kv-group-size", 32)
    run(capsys, model, "-p", TEXT, *kept, "--kv-bits", 8, "--quantized-kv-start", 0)
    assert load_prompt_cache(str(file))[0].bits == 8
    again = run(capsys, model, "-p", MORE, *kept)
    assert again["cached_tokens"] > 0
    given = ["--model", folder, "-p", MORE, *kept, "--kv-bits", 4]
    status, _, err = run_command(main, capsys, *given)
    assert status == 2 and "kv_bits=4 is not how" in err
