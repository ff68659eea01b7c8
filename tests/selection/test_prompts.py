import json
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from conftest import write_folder
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from ifp_mlx import load
from ifp_mlx.selection.prompts import (
    as_messages,
    encode,
    ids_of,
    instruction_of,
    known_tokens,
    tokenize,
)

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hello"}
ANSWER = {"role": "assistant", "content": "Hi"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load(write_folder(tmp_path_factory.mktemp("model") / "m"))[1]


def test_the_instruction_is_the_system_message_and_the_first_human_message():
    assert instruction_of([SYSTEM, USER, ANSWER, USER]) == [SYSTEM, USER]
    assert instruction_of([USER, ANSWER]) == [USER]
    assert instruction_of([SYSTEM]) == [SYSTEM]


def test_a_string_is_one_user_message():
    assert as_messages("Hello") == [USER]
    assert as_messages("Hello", "Be brief.") == [SYSTEM, USER]
    assert as_messages([USER, ANSWER], "Be brief.") == [SYSTEM, USER, ANSWER]


@pytest.mark.parametrize("prompt", ["", "  \n", [], [{"role": "user", "content": ""}]])
def test_an_empty_prompt_is_refused(prompt):
    with pytest.raises(ValueError, match="is empty; give some text"):
        as_messages(prompt)


@pytest.mark.parametrize(
    "message",
    [
        {"content": "Hi"},
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        "Hi",
        b"Hi",
    ],
)
def test_what_is_no_message_is_refused(message):
    prompt = message if isinstance(message, bytes) else [USER, message]
    assert ids_of(prompt) is None
    with pytest.raises(ValueError, match="is no message; give a text, or messages"):
        as_messages(prompt)


def test_token_ids_are_told_from_messages():
    assert ids_of("12") is None and ids_of([USER]) is None
    arrays = np.array([1, 2]), mx.array([1, 2]), list(np.array([1, 2])), (1, 2)
    assert all(ids_of(ids) == [1, 2] for ids in ([1, 2], *arrays))
    assert {type(token) for ids in arrays for token in ids_of(ids)} == {int}


@pytest.mark.parametrize("prompt", [mx.array([[1, 2]]), np.array([1.5])])
def test_an_array_that_is_no_row_of_ids_is_refused(prompt):
    with pytest.raises(ValueError, match=r"an array of shape \(.*one row of token ids"):
        ids_of(prompt)


@pytest.mark.parametrize("token", [-1, 259])
def test_a_token_that_the_model_has_no_embedding_for_is_named(token):
    assert known_tokens([0, 258], 259) == [0, 258]
    with pytest.raises(ValueError, match=f"id {token} is beyond .* from 0 to 258;"):
        known_tokens([5, token], 259)


def test_a_text_that_was_not_utf_8_is_refused(tokenizer):
    broken = b"Hi \xe9".decode(errors="surrogateescape")
    for refuse in (as_messages, partial(encode, tokenizer)):
        with pytest.raises(ValueError, match=r"not UTF-8 at character 4 \('\\udce9'\)"):
            refuse(broken)
    with pytest.raises(ValueError, match="not UTF-8"):
        as_messages("Hello", system=broken)


@pytest.fixture
def with_bos(tmp_path):
    """A tokenizer that puts its first special token before a text, as Llama's does."""
    folder = write_folder(tmp_path / "m")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"bos_token": "<|endoftext|>"}
    path.write_text(json.dumps(settings))
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    single, special = "<|endoftext|>:0 $A:0", [("<|endoftext|>", 256)]
    backend.post_processor = TemplateProcessing(single=single, special_tokens=special)
    backend.save(str(folder / "tokenizer.json"))
    return load(folder)[1]


def test_a_plain_text_has_the_tokenizers_first_token_once(with_bos):
    once = encode(with_bos, "Hello")
    assert once[0] == 256 and once.count(256) == 1
    assert encode(with_bos, "<|endoftext|>Hello") == once
    message = {"role": "user", "content": "<|endoftext|>Hello"}
    assert tokenize(with_bos, [message], chat_template=False) == once
    assert encode(with_bos, "Hello", special=False) == once[1:]


def test_the_chat_template_is_applied_as_mlx_lm_does(tokenizer):
    text = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert tokenize(tokenizer, [USER]) == tokenizer.encode(text)
    assert tokenize(tokenizer, [USER], chat_template=False) == tokenizer.encode("Hello")
    answered = tokenizer.decode(tokenize(tokenizer, [USER, ANSWER]))
    assert answered.endswith("Hi<|im_end|>\n")


@pytest.mark.parametrize("begun", ["Hi", "Hi ", ""])
def test_an_answer_that_was_begun_is_left_open(tokenizer, begun):
    chat = [USER, {"role": "assistant", "content": begun}]
    text = tokenizer.decode(tokenize(tokenizer, chat, open_end=True))
    assert text.endswith(f"<|im_start|>assistant\n{begun}")
    plain = tokenize(tokenizer, chat, chat_template=False, open_end=True)
    assert tokenizer.decode(plain) == f"Hello\n\n{begun}"


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ raise_exception('No system role') }}", "refuses .*: No system role"),
        ("{{ messages[0]['content'] + 1 }}", "refuses .*: can only concatenate str"),
        ("{{ messages", "refuses this conversation: unexpected end"),
        ("{{ '' }}", "makes no text of this conversation"),
    ],
)
def test_a_template_that_refuses_the_conversation_says_so(
    tokenizer, template, sentence
):
    tokenizer._tokenizer.chat_template, old = template, tokenizer.chat_template
    try:
        with pytest.raises(ValueError, match=sentence):
            tokenize(tokenizer, [SYSTEM, USER])
    finally:
        tokenizer._tokenizer.chat_template = old
