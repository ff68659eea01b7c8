"""What text selects, and how text becomes tokens: one rule for every caller."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

import mlx.core as mx
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
    return isinstance(prompt[0], int)


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


class Batch(NamedTuple):
    """Examples of one training step, padded on the right.

    Attributes:
        instruction: what selects, int32 ``[B, Ti]``.
        lengths: real tokens of each instruction, int32 ``[B]``.
        tokens: what the model reads, int32 ``[B, T]``.
        loss_mask: 1 where a token is a target that counts, float32 ``[B, T]``. The
            first token of a row has nothing before it and never counts.
        tasks: the number of each row's task, int32 ``[B]``, or ``None``.
    """

    instruction: mx.array
    lengths: mx.array
    tokens: mx.array
    loss_mask: mx.array
    tasks: mx.array | None = None

    def share(self, rank: int, size: int) -> "Batch":
        """Return every ``size``-th row from ``rank`` on: one machine's part."""
        if size == 1:
            return self
        rows: Any = (None if a is None else a[rank::size] for a in self)
        return Batch(*rows)
