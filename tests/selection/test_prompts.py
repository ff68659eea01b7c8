import pytest
from conftest import write_folder

from ifp_mlx import load
from ifp_mlx.selection.prompts import as_messages, instruction_of, is_tokens, tokenize

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


def test_token_ids_are_told_from_messages():
    assert is_tokens([1, 2]) and not is_tokens("12") and not is_tokens([USER])


def test_the_chat_template_is_applied_as_mlx_lm_does(tokenizer):
    text = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert tokenize(tokenizer, [USER]) == tokenizer.encode(text)
    assert tokenize(tokenizer, [USER], chat_template=False) == tokenizer.encode("Hello")
    answered = tokenizer.decode(tokenize(tokenizer, [USER, ANSWER]))
    assert answered.endswith("Hi<|im_end|>\n")


def test_a_template_that_refuses_the_conversation_says_so(tokenizer):
    template = "{{ raise_exception('System role not supported') }}"
    tokenizer._tokenizer.chat_template, old = template, tokenizer.chat_template
    try:
        with pytest.raises(ValueError, match="refuses .*: System role not supported"):
            tokenize(tokenizer, [SYSTEM, USER])
    finally:
        tokenizer._tokenizer.chat_template = old
