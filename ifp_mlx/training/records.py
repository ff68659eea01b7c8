"""Files of text and conversations, read as examples for the two stages of training."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from ..files.paths import path_of
from ..selection.conversations import conversation_of
from ..selection.prompts import (
    Message,
    as_messages,
    encode,
    instruction_of,
    known_tokens,
    render,
    tokenize,
)
from .batches import Record

Stage = Literal["pretrain", "sft", "recover"]


class Reader:
    """Reads rows of data into records.

    A row holds what :func:`ifp_mlx.selection.conversations.conversation_of` knows. Its
    ``task`` may name its task, and its ``select`` may be a text that selects instead of
    the beginning of the conversation, such as the description of its task. In the stage
    ``pretrain`` every chunk of a text except the first is an example, whose instruction
    is the chunk before. In the stage ``sft`` the conversation up to the first user
    message is the instruction, and the assistant's answers after it are learned. No
    instruction holds a token that is learned with it. The stage ``recover`` reads
    conversations in the same way and takes plain text as it is: its mask is fixed, so
    the text needs no part that selects.

    Args:
        tokenizer: mlx-lm's ``TokenizerWrapper`` of the model.
        stage: ``pretrain``, ``sft`` or ``recover``.
        max_length: most tokens of an example. In ``pretrain``, as much of the text
            before the learned chunk is read as fits.
        chunk: tokens of a chunk.
        chunk_masks: ``each`` puts as many chunks as fit into one example; each chunk is
            learned under the mask of the one before it.
        predictor_tokenizer: of the predictor's language model, if it has its own.
        skip_bad: leave bad rows out instead of refusing the file.
        vocabulary: rows of the model's embedding; a row of data with a token beyond
            them is bad. ``None`` does not check.

    Attributes:
        tasks: the number of every task's name.
        skipped: what was left out, and why.

    Source: Hou et al. 2025 (arXiv:2501.02086) sec. 3.
    """

    def __init__(
        self,
        tokenizer: Any,
        stage: Stage,
        *,
        max_length: int = 2048,
        chunk: int = 512,
        chunk_masks: Literal["last", "each"] = "last",
        predictor_tokenizer: Any = None,
        skip_bad: bool = False,
        vocabulary: int | None = None,
    ) -> None:
        if stage == "pretrain" and not 0 < 2 * chunk <= max_length:
            raise ValueError(
                f"Two chunks of {chunk} tokens must fit into {max_length} tokens; choose "
                f"a chunk of 1 to {max_length // 2}."
            )
        self.tokenizer, self.predictor_tokenizer = tokenizer, predictor_tokenizer
        self.stage, self.max_length, self.chunk = stage, max_length, chunk
        self.skip_bad, self.vocabulary = skip_bad, vocabulary
        self.chunk_masks = chunk_masks
        self.tasks: dict[str, int] = {}
        self.skipped: list[str] = []

    def read(self, data: str, split: str) -> list[Record]:
        """Return the records of a split, ``[]`` if there is no such split.

        Args:
            data: a folder with ``train.jsonl`` and more, or a hub data set's id.
            split: ``train``, ``valid`` or ``test``.

        Raises:
            FileNotFoundError: if ``data`` is neither.
            ValueError: naming file and line, if rows are bad.
        """
        records, problems = [], []
        for place, line in _rows(data, split):
            try:
                records += [
                    replace(record, place=place)
                    for record in self.records(_parse(line))
                ]
            except ValueError as error:
                problems.append(f"{place} {error}")
        if problems and not self.skip_bad:
            rest = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise ValueError(
                "; ".join(problems[:3]) + rest + ". Correct them, or leave bad rows "
                "out with --skip-bad."
            )
        self.skipped += problems
        if problems and not records:
            raise ValueError(f"{data} has no good row in {split}: {problems[0]}.")
        return records

    def records(self, row: dict[str, Any]) -> list[Record]:
        """Return the examples that one row holds.

        Raises:
            ValueError: saying what is wrong with it.
        """
        task = -1
        if row.get("task") is not None:
            task = self.tasks.setdefault(str(row["task"]), len(self.tasks))
        if self.stage == "pretrain":
            return list(self._chunks(row, task))
        selects = row.get("select")
        if selects is not None and not (isinstance(selects, str) and selects.strip()):
            raise ValueError(f"has a select that is no text: {selects!r}")
        messages = conversation_of(row)
        if messages is None and self.stage == "recover":
            tokens = encode(self.tokenizer, row["text"])[: self.max_length]
            if len(tokens) < 2:
                raise ValueError(
                    "has a text of less than two tokens: nothing follows the first"
                )
            return [self._record(tokens, tokens, [True] * len(tokens), task)]
        if messages is None:
            raise ValueError(
                "has only text: stage sft needs messages, or prompt and completion"
            )
        tokens, loss = _conversation(self.tokenizer, messages)
        if len(tokens) > self.max_length:
            raise ValueError(
                f"has {len(tokens)} tokens, more than max_length {self.max_length}"
            )
        asked = instruction_of(messages) if selects is None else as_messages(selects)
        selecting = tokenize(self.tokenizer, asked)
        return [self._record(selecting, tokens, loss, task)]

    def _chunks(self, row: dict[str, Any], task: int) -> Iterator[Record]:
        messages = conversation_of(row)
        if messages is None:
            tokens = encode(self.tokenizer, row["text"])
        else:
            tokens = _conversation(self.tokenizer, messages)[0]
        if len(tokens) <= self.chunk:
            raise ValueError(
                f"has {len(tokens)} tokens, which is no more than one chunk of "
                f"{self.chunk}: nothing follows it"
            )
        if self.chunk_masks == "each":
            yield from self._texts(tokens, task)
            return
        for start in range(self.chunk, len(tokens), self.chunk):
            end = min(start + self.chunk, len(tokens))
            read = tokens[max(0, end - self.max_length) : end]
            loss = np.arange(len(read)) >= len(read) - (end - start)
            yield self._record(tokens[start - self.chunk : start], read, loss, task)

    def _texts(self, tokens: list[int], task: int) -> Iterator[Record]:
        """Yield texts of as many chunks as fit. Each begins with the last chunk of the
        one before: that is read, under its own mask, and the others are learned.
        """
        chunk, most = self.chunk, self.max_length // self.chunk
        for first in range(0, len(tokens) - chunk, (most - 1) * chunk):
            read = tokens[first : first + most * chunk]
            starts = range(0, len(read) - chunk, chunk)
            selecting = [read[start : start + chunk] for start in starts]
            loss = np.arange(len(read)) >= chunk
            places = np.maximum(np.arange(len(read)) // chunk - 1, 0)
            yield replace(
                self._record(read[:0], read, loss, task),
                instruction=[self._selecting(part) for part in selecting],
                selectors=places.astype(np.int32),
            )

    def _record(
        self, selecting: list[int], tokens: list[int], loss: Any, task: int
    ) -> Record:
        if self.vocabulary is not None:
            known_tokens([*selecting, *tokens], self.vocabulary)
        return Record(
            self._selecting(selecting),
            np.array(tokens, dtype=np.int32),
            np.array(loss, dtype=bool),
            task,
        )

    def _selecting(self, tokens: list[int]) -> np.ndarray:
        """Return what the predictor reads of the model's tokens."""
        if self.predictor_tokenizer is not None:
            text = self.tokenizer.decode(tokens)
            tokens = self.predictor_tokenizer.encode(text, add_special_tokens=False)
        return np.array(tokens, dtype=np.int32)


def _rows(data: str, split: str) -> Iterator[tuple[str, Any]]:
    """Yield each row's place and the row: bytes of a line, or a dictionary."""
    folder = path_of(data)
    if folder.is_dir():
        if not (folder / "train.jsonl").is_file():
            raise FileNotFoundError(f"{folder} has no train.jsonl.")
        path = folder / f"{split}.jsonl"
        lines = path.read_bytes().splitlines() if path.is_file() else []
        yield from ((f"{path} line {n}", line) for n, line in enumerate(lines, start=1))
    elif folder.exists() or not 0 < data.count("/") < 2:
        raise FileNotFoundError(
            f"{data} is neither a folder with train.jsonl nor a hub data set's id such "
            "as org/name."
        )
    else:
        for number, row in enumerate(_hub_rows(data, split)):
            yield f"{data} {split} row {number}", row


def _hub_rows(name: str, split: str) -> Iterable[Any]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError(
            f"{name} is no folder, and data sets of the hub need the package datasets: "
            "pip install datasets."
        ) from None
    try:
        parts = load_dataset(name)
    except Exception as error:  # whatever the client and its HTTP library raise
        raise FileNotFoundError(
            f"{name} is no folder, and does not come from the Hugging Face Hub: "
            f"{type(error).__name__}: {error}."
        ) from error
    names = {"valid": ("valid", "validation", "dev")}.get(split, (split,))
    return next((parts[n] for n in names if n in parts), [])


def _parse(line: Any) -> dict[str, Any]:
    if isinstance(line, bytes):
        if not line.strip():
            raise ValueError("is empty")
        try:
            line = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(f"is not UTF-8 (byte {error.start})") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"is not JSON ({error})") from None
    if not isinstance(line, dict):
        raise ValueError("is not an object with keys")
    return line


def _conversation(
    tokenizer: Any, messages: Sequence[Message]
) -> tuple[list[int], list[bool]]:
    """Return a conversation's token ids, and for each whether the assistant answers it.

    Prompts and answers are tokenised apart, as when answers are generated. Anything
    after the last answer is left out. Answers before the first user message are read
    but not learned, since they are part of the instruction.
    """
    tokens: list[int] = []
    loss: list[bool] = []
    before, asked = "", False
    for number, message in enumerate(messages):
        asked = asked or message["role"] == "user"
        if message["role"] != "assistant" or not asked:
            continue
        prompt = _text(tokenizer, messages[:number])
        through = _text(tokenizer, messages[: number + 1])
        if not (prompt.startswith(before) and through.startswith(prompt)):
            raise ValueError(
                "has several answers, and there is no chat template that leaves "
                "earlier ones as they were; split it into conversations with one answer"
            )
        # A chat template writes the special tokens itself.
        plain = not tokenizer.has_chat_template
        asking = encode(tokenizer, prompt[len(before) :], special=plain)
        answer = encode(tokenizer, through[len(prompt) :], special=False)
        if plain:
            answer = [*answer, tokenizer.eos_token_id]
        real = bool(message["content"].strip())
        tokens += [*asking, *answer]
        loss += [False] * len(asking) + [real] * len(answer)
        before = through
    if not any(loss):
        raise ValueError(
            "has no answer: no assistant's message with text after a user's"
        )
    return tokens, loss


def _text(tokenizer: Any, messages: Sequence[Message]) -> str:
    if not tokenizer.has_chat_template:
        answered = messages[-1]["role"] == "assistant"
        prompt = "\n\n".join(m["content"] for m in messages[: len(messages) - answered])
        return prompt + messages[-1]["content"] if answered else prompt
    return render(tokenizer, messages)
