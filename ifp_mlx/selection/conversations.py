"""What a row of data holds: a conversation, or plain text."""

from typing import Any

from .prompts import Message

FORMATS = (
    "messages, or prompt and completion, or instruction (input) and output, or text"
)


def conversation_of(row: dict[str, Any]) -> list[Message] | None:
    """Return a row's conversation, or ``None`` if it is plain text.

    Args:
        row: with ``messages``, or ``text``, or ``prompt`` and ``completion``, or, as in
            Alpaca's data, ``instruction``, ``output`` and perhaps ``input``.

    Raises:
        ValueError: if it has none of these, or what they hold is no text.
    """
    if row.get("messages") is not None:
        messages = row["messages"]
        good = isinstance(messages, list) and all(
            isinstance(m, dict)
            and isinstance(m.get("role"), str)
            and isinstance(m.get("content"), str)
            for m in messages
        )
        if not good:
            raise ValueError("has messages that lack a role or a content of text")
        return messages
    if isinstance(row.get("text"), str):
        return None
    prompt, answer = row.get("prompt"), row.get("completion")
    if prompt is None and answer is None:
        prompt, answer = row.get("instruction"), row.get("output")
        if prompt is not None and row.get("input"):
            prompt = f"{prompt}\n\n{row['input']}"
    if not isinstance(prompt, str) or not isinstance(answer, str):
        raise ValueError(
            f"has the keys {', '.join(map(str, row)) or 'none'}; it needs {FORMATS}"
        )
    return [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": answer},
    ]
