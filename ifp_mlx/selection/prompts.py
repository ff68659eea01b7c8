"""What text selects, and how text becomes tokens."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any, TypeGuard

from jinja2 import TemplateError

Message = dict[str, str]
Prompt = str | Sequence[int] | Sequence[Message]


def is_tokens(prompt: Prompt) -> TypeGuard[Sequence[int]]:
    """Whether a prompt is token ids, which are taken as they are.

    Raises:
        ValueError: if it holds nothing.
    """
    if not len(prompt):
        raise ValueError(f"The prompt {prompt!r} is empty; give some text.")
    return isinstance(prompt[0], Integral)


def as_messages(prompt: Prompt, system: str | None = None) -> list[Message]:
    """Return a chat: a string is one user message.

    Args:
        prompt: a user's text, or the messages of a conversation.
        system: put before them as the system message.

    Raises:
        ValueError: if there is no text in it.
    """
    user = [{"role": "user", "content": prompt}]
    messages: list[Any] = user if isinstance(prompt, str) else list(prompt)
    if not any(message["content"].strip() for message in messages):
        raise ValueError(f"The prompt {prompt!r} is empty; give some text.")
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return messages


def instruction_of(messages: Sequence[Message]) -> list[Message]:
    """Return the part of a conversation that selects: up to the first user message.

    Source: Hou et al. 2025 (arXiv:2501.02086) sec. 3: in a multi-turn conversation
    only the first human message selects, and its mask stays.
    """
    for number, message in enumerate(messages):
        if message["role"] == "user":
            return list(messages[: number + 1])
    return list(messages)


def tokenize(
    tokenizer: Any, messages: Sequence[Message], *, chat_template: bool = True
) -> list[int]:
    """Return the token ids of a conversation that the model is to continue.

    As mlx_lm.generate does it: through the chat template where there is one, else
    the plain text with the tokenizer's own special tokens.

    Args:
        tokenizer: mlx-lm's ``TokenizerWrapper``.
        messages: the conversation.
        chat_template: ``False`` leaves the template out.

    Raises:
        ValueError: if the chat template refuses the conversation.
    """
    if chat_template and tokenizer.has_chat_template:
        generating = messages[-1]["role"] != "assistant"
        try:
            text = tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generating
            )
        except TemplateError as error:
            raise ValueError(
                f"The model's chat template refuses this conversation: {error}."
            ) from error
        return list(tokenizer.encode(text, add_special_tokens=False))
    text = "\n\n".join(message["content"] for message in messages)
    return list(tokenizer.encode(text))
