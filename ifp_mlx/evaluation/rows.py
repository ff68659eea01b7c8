"""Examples with reference answers, as token ids."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files.texts import read_text
from ..selection.conversations import FORMATS, conversation_of
from ..selection.prompts import (
    Message,
    encode,
    instruction_of,
    known_tokens,
    tokenize,
)

Example = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One example: token ids of the prompt, template included, and of the answer.

    Attributes:
        prompt: what is read.
        answer: what is compared, token by token.
        example: what it was made from, for models with other tokens.
    """

    prompt: list[int]
    answer: list[int]
    example: Example = field(default_factory=dict, compare=False, repr=False)

    @property
    def key(self) -> str:
        """A hash of the tokens: the same row has the same key in every run."""
        tokens = json.dumps([self.prompt, self.answer])
        return hashlib.sha256(tokens.encode()).hexdigest()[:16]


def read_rows(
    path: Path,
    tokenizer: Any,
    *,
    limit: int | None = None,
    answer_tokens: int | None = None,
    vocabulary: int | None = None,
) -> list[Row]:
    """Read a JSONL file of conversations, whose last message is the answer (see
    :func:`ifp_mlx.selection.conversations.conversation_of`), or of plain ``text``, whose
    second half is the answer to its first and which no chat template touches.

    Args:
        path: the file.
        tokenizer: mlx-lm's.
        limit: rows to take from the start; ``None`` takes all.
        answer_tokens: compare this many tokens of an answer at most.
        vocabulary: rows of the model's embedding; ``None`` does not check.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a line has neither format, or a token beyond the vocabulary.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no data file {path}.")
    rows = []
    lines = read_text(path).splitlines()
    for number, line in enumerate(lines[:limit], start=1):
        where = f"Line {number} of {path}"
        try:
            example = _parsed(line)
        except (
            *(ValueError, KeyError, TypeError, IndexError),
            RecursionError,  # of brackets without an end
        ) as error:
            raise ValueError(
                f"{where} is no example: give {FORMATS}; messages end with an "
                "assistant's."
            ) from error
        try:
            row = _tokenized(example, tokenizer)
            if vocabulary is not None:
                known_tokens(row.prompt + row.answer, vocabulary)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        rows.append(Row(row.prompt, row.answer[:answer_tokens], row.example))
    return [row for row in rows if row.prompt and row.answer]


def retokenize(row: Row, tokenizer: Any, other: Any) -> Row:
    """Return the same example in another tokenizer's tokens, and as much of its answer
    as ``row`` has.

    Args:
        row: from :func:`read_rows` with ``tokenizer``.
        tokenizer: mlx-lm's.
        other: mlx-lm's, of another model.
    """
    answer = encode(other, answer_text(row, tokenizer), special=False)
    if "text" in row.example:
        prompt = encode(other, tokenizer.decode(row.prompt))
    else:
        prompt = tokenize(other, _split(row.example)[0])
    return Row(prompt, answer, row.example)


def selecting_tokens(row: Row, tokenizer: Any) -> list[int]:
    """Return the token ids of a row that a trained predictor reads: of a conversation,
    everything up to the first user message.

    Args:
        row: from :func:`read_rows` with ``tokenizer``.
        tokenizer: mlx-lm's.
    """
    if not row.example or "text" in row.example:
        return row.prompt
    return tokenize(tokenizer, instruction_of(_split(row.example)[0]))


def answer_text(row: Row, tokenizer: Any) -> str:
    """Return the compared part of the answer as text."""
    return tokenizer.decode(row.answer)


def same_tokens(tokenizer: Any, other: Any) -> bool:
    """Whether two tokenizers mean the same by every token id."""
    return tokenizer.get_vocab() == other.get_vocab()


def _parsed(line: str) -> Example:
    example = json.loads(line)
    if not isinstance(example, dict):
        raise TypeError("no object")
    if "text" in example:
        texts = [example["text"]]
    else:
        prompt, answer = _split(example)
        texts = [answer, *(m[key] for m in prompt for key in ("role", "content"))]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("not text")
    return example


def _tokenized(example: Example, tokenizer: Any) -> Row:
    if "text" in example:
        tokens = encode(tokenizer, example["text"])
        half = len(tokens) // 2
        return Row(tokens[:half], tokens[half:], example)
    prompt, answer = _split(example)
    tokens = encode(tokenizer, answer, special=False)
    return Row(tokenize(tokenizer, prompt), tokens, example)


def _split(example: Example) -> tuple[Sequence[Message], str]:
    *prompt_messages, answer = conversation_of(example) or [{}]
    if answer["role"] != "assistant" or not prompt_messages:
        raise ValueError("no answer")
    return prompt_messages, answer["content"]
