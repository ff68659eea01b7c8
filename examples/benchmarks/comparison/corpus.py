"""The mix as tokens: one tokenizer and one order of examples for every row."""

import json
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ifp_mlx.training.batches import Batch

from .tasks import Example, Task, all_tasks, by_hash, examples

VOCABULARY = 512
SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>")
LONGEST = 36  # tokens; the few longer examples are left out
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>"
    "{{ m['content'] }}<|end|>{% else %}<|user|>{{ m['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@cache
def tokenizer(mix: str = "plain") -> Any:
    """Return a mix's tokenizer: byte-level BPE of its training paraphrases."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=True),
        ]
    )
    # The space put before every digit and before the text is no part of it.
    before_digit = decoders.Replace(Regex("^Ġ(?=[0-9])"), "")
    before_text = decoders.Strip(" ", 1, 0)
    found.decoder = decoders.Sequence([before_digit, decoders.ByteLevel(), before_text])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The split by hash is that of the tokens of the checkpoints that ship.
    drawn = examples(all_tasks(mix), "train", 20000, seed=0, held_out=by_hash)
    texts = [text for e in drawn for text in (e.prompt, e.answer)]
    found.train_from_iterator(texts, trainer)
    return found


def write_tokenizer(folder: Path, mix: str = "plain") -> None:
    """Write the files of a mix's tokenizer into a model folder."""
    tokenizer(mix).save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[0],
        "pad_token": SPECIAL[0],
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


class Corpus:
    """Examples as padded arrays, and batches of them by number.

    Args:
        drawn: the examples.
        batch_size: rows of a batch; examples of like length lie together.
        mix: that they are of.
        descriptions: share of the rows whose mask is chosen by the description of
            their task alone, so that a per-task mask is something that was trained.
        seed: of the order.
    """

    def __init__(
        self,
        drawn: Sequence[Example],
        batch_size: int,
        mix: str = "plain",
        *,
        descriptions: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.size, self.mix = batch_size, mix
        rng = np.random.default_rng(seed)
        alone = rng.random(len(drawn)) < descriptions
        chats = encode_prompts([e.prompt for e in drawn], mix)
        described = encode_prompts([t.description for t in all_tasks(mix)], mix)
        texts = [e.answer for e in drawn]
        answers = [a.ids + [0] for a in tokenizer(mix).encode_batch(texts)]
        rows = zip(drawn, chats, answers, alone, strict=True)
        self.rows = [
            (described[e.task] if only else chat, chat, answer, e.task)
            for e, chat, answer, only in rows
            if len(chat) + len(answer) <= LONGEST
        ]
        order = rng.permutation(len(self.rows))
        window = 64 * batch_size
        for start in range(0, len(order), window):
            part = order[start : start + window]
            part[:] = sorted(part, key=lambda i: sum(map(len, self.rows[i][1:3])))
        count = len(order) // batch_size
        self.order = rng.permutation(
            order[: count * batch_size].reshape(count, batch_size)
        )

    def __call__(self, number: int) -> Batch:
        """Return batch ``number``; after the last the first comes again."""
        return collate([self.rows[i] for i in self.order[number % len(self.order)]])

    def all(self) -> list[Batch]:
        """Return every example once, those of like length together."""
        rows = sorted(self.rows, key=lambda row: len(row[1]) + len(row[2]))
        starts = range(0, len(rows), self.size)
        return [collate(rows[start : start + self.size]) for start in starts]

    def chunks(self, number: int) -> Batch:
        """Return a batch of plain text: one chunk selects, the next is learned.

        A document is a list of questions with their answers, all of one task, and each
        of them is a chunk; there is no chat template around it.
        """
        rng = np.random.default_rng(number)
        rows = []
        for i in self.order[number % len(self.order)]:
            _, *second, task = self.rows[i]
            like = self.of_task[task]
            first = self.rows[like[rng.integers(len(like))]][1:3]
            before, after = (p[1:-1] + a for p, a in (first, second))
            rows.append((before, before, after, task))
        return collate(rows)

    @cached_property
    def of_task(self) -> dict[int, list[int]]:
        """The numbers of each task's rows."""
        found: dict[int, list[int]] = {}
        for number, row in enumerate(self.rows):
            found.setdefault(row[3], []).append(number)
        return found


def encode_prompts(texts: Sequence[str], mix: str = "plain") -> list[list[int]]:
    """Return a mix's tokens of user messages, through the chat template."""
    whole = [f"<|user|>{text}<|assistant|>" for text in texts]
    return [found.ids for found in tokenizer(mix).encode_batch(whole)]


def collate(rows: Sequence[tuple[list[int], list[int], list[int], int]]) -> Batch:
    """Pad rows of (instruction, prompt, answer, task) on the right."""
    texts = [prompt + answer for _, prompt, answer, _ in rows]
    loss = [[0.0] * len(p) + [1.0] * len(a) for _, p, a, _ in rows]
    return Batch(
        mx.array(_padded([row[0] for row in rows], np.int32)),
        mx.array([len(row[0]) for row in rows], dtype=mx.int32),
        mx.array(_padded(texts, np.int32)),
        mx.array(_padded(loss, np.float32)),
        mx.array([row[3] for row in rows], dtype=mx.int32),
    )


def describe(tasks: Sequence[Task], corpus: Corpus) -> None:
    """Make the description of its task select for every row of ``corpus``."""
    described = encode_prompts([task.description for task in tasks], corpus.mix)
    corpus.rows = [(described[t], p, a, t) for _, p, a, t in corpus.rows]


def _padded(rows: Sequence[Sequence], kind: type) -> np.ndarray:
    table: np.ndarray = np.zeros((len(rows), max(map(len, rows))), dtype=kind)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    return table
