"""What text selects, and how text becomes tokens."""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

# Arguments of apply_chat_template that we set ourselves, or that say what is done with
# the text: none of them may be given as an option of the template.
NOT_ASKED = {"tokenize", "add_generation_prompt", "continue_final_message"}
NOT_ASKED |= {"return_dict", "return_tensors", "padding", "truncation", "max_length"}
NOT_ASKED |= {"conversation", "chat_template", "return_assistant_tokens_mask", "tools"}
NOT_ASKED |= {"messages", "self"}
# A role and a content, both text; a tool's calls and results have more.
Message = dict[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]


def ids_of(prompt: Any) -> list[int] | None:
    """Return the ids, unchanged, of a prompt that is a sequence or array of token ids;
    ``None`` if the prompt is a text or messages.

    Raises:
        ValueError: if it holds nothing, or more than one row of ids, or is none of these.
    """
    items: Any = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if not isinstance(items, Sequence):
        raise ValueError(
            f"The prompt {prompt!r} is neither a text, nor messages, nor token ids."
        )
    if not len(items):
        raise ValueError(f"The prompt {prompt!r} is empty; give some text.")
    if not isinstance(items, str | bytes) and all(
        isinstance(n, Integral) for n in items
    ):
        return [int(token) for token in items]
    if items is not prompt:
        raise ValueError(
            f"The prompt is an array of shape {tuple(prompt.shape)} and type "
            f"{prompt.dtype}; give one row of token ids, whole numbers."
        )
    return None


def known_tokens(
    tokens: Sequence[int], vocabulary: int, context: int | None = None
) -> list[int]:
    """Return token ids, checked to have a row each in a model's embedding.

    Args:
        tokens: of a prompt, or of an example.
        vocabulary: rows of the model's embedding.
        context: the most tokens that the model was made for; ``None``: no limit.

    Raises:
        ValueError: naming a token that has no row (MLX would read past the embedding),
            or the number of tokens if there are too many.
    """
    if context is not None and len(tokens) > context:
        raise ValueError(
            f"The prompt has {len(tokens)} tokens, and the model was made for at most "
            f"{context}; shorten it."
        )
    beyond = [token for token in tokens if not 0 <= token < vocabulary]
    if beyond:
        raise ValueError(
            f"The token id {beyond[0]} is beyond the model's, which go from 0 to "
            f"{vocabulary - 1}; leave that token out of the text, or use the tokenizer "
            "that belongs to the model."
        )
    return list(tokens)


def as_messages(prompt: Prompt, system: str | None = None) -> list[Message]:
    """Return a chat: a string is one user message.

    Args:
        prompt: a user's text, or the messages of a conversation.
        system: put before them as the system message.

    Raises:
        ValueError: if there is no text in it, broken text, or something else.
    """
    user = [{"role": "user", "content": prompt}]
    messages: list[Any] = user if isinstance(prompt, str) else list(prompt)
    for message in messages:
        _check_message(message)
    if not any(message["content"].strip() for message in messages):
        raise ValueError(f"The prompt {prompt!r} is empty; give some text.")
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    for message in messages:
        check_text(message["content"])
    return messages


def _check_message(message: Any) -> None:
    parts = message if isinstance(message, dict) else {}
    if not all(isinstance(parts.get(key), str) for key in ("role", "content")):
        raise ValueError(
            f"{message!r} is no message; give a text, or messages that have a role and a "
            "content, both text."
        )


def check_text(text: str) -> None:
    """Raise ``ValueError`` if a text has bytes in it that were not UTF-8 (Python keeps
    them as half surrogates), which no tokenizer reads.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"The text is not UTF-8 at character {error.start + 1} "
            f"({text[error.start]!a}); give it as UTF-8."
        ) from None


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
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    chat_template: bool = True,
    open_end: bool = False,
    config: Mapping[str, Any] | None = None,
    tools: Sequence[dict[str, Any]] = (),
) -> list[int]:
    """Return the token ids of a conversation; unless the assistant speaks last, they end
    with what begins an answer.

    As mlx_lm.generate does it: through the chat template where there is one, else
    the plain text with the tokenizer's own special tokens.

    Args:
        tokenizer: mlx-lm's ``TokenizerWrapper``.
        messages: the conversation.
        chat_template: ``False`` leaves the template out.
        open_end: an assistant's message at the end is the beginning of the answer:
            what would close it is left out.
        config: options of the chat template, such as ``{"enable_thinking": False}``.
        tools: that the chat template shows the model, as the OpenAI API words them.

    Raises:
        ValueError: if the chat template refuses the conversation, or leaves nothing of it.
    """
    if not (chat_template and tokenizer.has_chat_template):
        return encode(tokenizer, "\n\n".join(m["content"] for m in messages))
    text = render(tokenizer, messages, open_end=open_end, config=config, tools=tools)
    tokens = encode(tokenizer, text, special=False)
    if not tokens:
        raise ValueError(
            "The model's chat template makes no text of this conversation; leave it out "
            "with --ignore-chat-template, or correct it."
        )
    return tokens


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    open_end: bool = False,
    continued: bool = False,
    config: Mapping[str, Any] | None = None,
    tools: Sequence[dict[str, Any]] = (),
) -> str:
    """Return what the chat template makes of a conversation; see :func:`tokenize`.

    Args:
        tokenizer, messages, open_end, config, tools: see there.
        continued: leave the last message open, whoever says it, and begin no answer.

    Raises:
        ValueError: if the template refuses the conversation.
    """
    answered = messages[-1]["role"] == "assistant"
    how: dict[str, Any] = {"add_generation_prompt": not answered and not continued}
    if continued or (answered and open_end):
        how["continue_final_message"] = True
    own = dict(config or {})
    if known := own.keys() & NOT_ASKED:
        raise ValueError(
            f"chat_template_config has {min(known)!r}, which is not the template's own "
            "option; leave it out."
        )
    if tools:
        how["tools"] = list(tools)
    try:
        return tokenizer.apply_chat_template(
            list(messages), **own, **how, tokenize=False
        )
    except Exception as error:  # a template is a program: whatever it raises
        raise ValueError(
            f"The model's chat template refuses this conversation: {error}."
        ) from error


def encode(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """Return the token ids of a text.

    Args:
        tokenizer: mlx-lm's.
        text: plain, or what a chat template made.
        special: put the tokenizer's own special tokens around it, unless the text
            already begins with the first of them, as in mlx-lm.

    Raises:
        ValueError: if the text is broken.
    """
    check_text(text)
    if special and tokenizer.bos_token is not None:
        special = not text.startswith(tokenizer.bos_token)
    return list(tokenizer.encode(text, add_special_tokens=special))
