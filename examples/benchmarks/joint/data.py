"""Tasks with conflicting knowledge, and instructions, as arrays for any framework.

Facts: what countries and languages are called in forty other languages, from the
Unicode CLDR (Unicode licence) by way of Babel (BSD). A key such as Germany has another
answer in every language, and only the instruction says which. Instructions: the tasks
of natural-instructions in BIG-bench (Apache-2.0) that are short enough. Families that
are only tested: those of examples/benchmarks/selectors/task_families.py.
"""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from examples.benchmarks.comparison.tasks import TRANSLATE, Task

# Languages in Latin letters with many names that differ from the English ones; of
# those that are nearly the same, such as Bokmål and Nynorsk, one.
# fmt: off
LANGUAGES = (
    "af", "ast", "az", "br", "ca", "cs", "cy", "da", "de", "eo",
    "es", "et", "eu", "fi", "fo", "fr", "fy", "ga", "gd", "hr",
    "hsb", "hu", "is", "it", "kab", "lb", "lt", "lv", "nl", "nn",
    "pl", "pt", "ro", "sk", "sl", "so", "sq", "sv", "tr", "zu",
)
# fmt: on
FACT_TOKENS = 32  # longest example of a fact, and the width of its rows
ROW_TOKENS = 256  # of all others
EPOCHS = 30  # draws of every fact, each in a wording of its own
FEW = 300  # examples that a task of instructions must have
UNSEEN = ("005_", "012_", "016_", "021_", "036_", "040_", "051_")  # tasks never trained
HELD_OUT = {"facts": 40, "seen": 12, "unseen": 40, "families": 24}  # tested, per task
FAMILIES = ("code", "data2text", "dialog", "hella", "math", "sql")
ANSWER_TOKENS = 64  # of a family's answer


@dataclass(frozen=True)
class Rows:
    """Examples, padded on the right.

    Attributes:
        tokens: uint16 ``[N, T]``.
        prompt: tokens of each prompt, int16 ``[N]``; the prompt selects.
        length: tokens of prompt and answer, int16 ``[N]``.
        task: number of each row's task, int16 ``[N]``.
    """

    tokens: np.ndarray
    prompt: np.ndarray
    length: np.ndarray
    task: np.ndarray

    def __len__(self) -> int:
        return len(self.task)

    def pick(self, chosen: Any) -> "Rows":
        """Return the rows that an index or a mask chooses."""
        return Rows(*(getattr(self, name)[chosen] for name in COLUMNS))


COLUMNS = ("tokens", "prompt", "length", "task")
Text = tuple[str, str, int]  # prompt, answer, task


def chat(text: str) -> str:
    """Return a user's message in ChatML, without a system prompt, to save tokens."""
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def encode(tokenizer: Any, texts: Iterable[Text], width: int) -> Rows:
    """Return the examples that fit into ``width`` tokens, as rows of that width."""
    texts = list(texts)
    prompts = tokenizer.encode_batch([chat(p) for p, _, _ in texts])
    answers = tokenizer.encode_batch([a + "<|im_end|>" for _, a, _ in texts])
    pairs = [(p.ids, a.ids) for p, a in zip(prompts, answers, strict=True)]
    fits = [n for n, (p, a) in enumerate(pairs) if len(p) + len(a) <= width]
    tokens = np.zeros((len(fits), width), np.uint16)
    for row, number in zip(tokens, fits, strict=True):
        both: list[int] = sum(pairs[number], [])
        row[: len(both)] = both
    prompt = [len(pairs[n][0]) for n in fits]
    length = [len(pairs[n][0]) + len(pairs[n][1]) for n in fits]
    task = [texts[n][2] for n in fits]
    return Rows(tokens, *(np.array(v, np.int16) for v in (prompt, length, task)))


def fact_tasks() -> list[Task]:
    """Return two domains for every language: names of countries and of languages."""
    from babel import Locale

    english = Locale("en")
    tasks = []
    for what in ("territories", "languages"):
        keys = {c: n for c, n in getattr(english, what).items() if _plain(c, n)}
        for code in LANGUAGES:
            there = getattr(Locale(code), what)
            facts = {n: there[c] for c, n in keys.items() if c in there}
            # A name that is the same in both languages need only be copied.
            facts = {n: a for n, a in facts.items() if a != n and len(a) <= 24}
            name = english.languages[code]
            phrases = tuple(p.replace("{t}", name) for p in TRANSLATE)
            tasks.append(Task(f"{what}→{code}", "facts", "", phrases, facts))
    return tasks


def _plain(code: str, name: str) -> bool:
    return len(code) == 2 and len(name) <= 20 and name.replace(" ", "").isalpha()


def fact_rows(tokenizer: Any, tasks: Sequence[Task]) -> tuple[Rows, Rows, int]:
    """Return rows for training, epoch after epoch, and rows in held-out wordings.

    Facts with a wording that does not fit are left out of both.

    Returns:
        Training rows, ``EPOCHS`` times as many as facts; test rows; number of facts.
    """
    rng = random.Random(0)
    facts = [
        (t, q, a) for t, task in enumerate(tasks) for q, a in (task.facts or {}).items()
    ]
    facts = _fitting(tokenizer, tasks, facts)
    texts = []
    for _ in range(EPOCHS):
        for t, question, answer in facts:
            wording = rng.choice(tasks[t].wordings("train"))
            texts.append((wording.replace("{x}", question), answer, t))
    tested = []
    for number, task in enumerate(tasks):
        own = [fact for fact in facts if fact[0] == number]
        for t, question, answer in rng.sample(own, HELD_OUT["facts"]):
            wording = rng.choice(task.wordings("test"))
            tested.append((wording.replace("{x}", question), answer, t))
    trained = encode(tokenizer, texts, FACT_TOKENS)
    assert len(trained) == EPOCHS * len(facts)
    return trained, encode(tokenizer, tested, FACT_TOKENS), len(facts)


def _fitting(tokenizer: Any, tasks: Sequence[Task], facts: list) -> list:
    """Return the facts whose longest wording still fits."""

    def longest(task: Task) -> str:
        every = task.wordings("train") + task.wordings("test")
        return max(every, key=lambda w: len(tokenizer.encode(w).ids))

    wordings = [longest(task) for task in tasks]
    texts = [(wordings[t].replace("{x}", q), a, n) for n, (t, q, a) in enumerate(facts)]
    # Two tokens to spare, as the longest wording depends a little on the question.
    return [facts[n] for n in encode(tokenizer, texts, FACT_TOKENS - 2).task]


def instruction_rows(
    tokenizer: Any, folder: Path, first: int
) -> tuple[Rows, Rows, Rows, list[str]]:
    """Return rows of natural-instructions, their tasks numbered from ``first`` on.

    Args:
        tokenizer: of the ``tokenizers`` library.
        folder: with the folders of the tasks.
        first: number of the first task.

    Returns:
        Rows to train on; held-out rows of the same tasks; rows of tasks that are never
        trained; names of all tasks.
    """
    names: list[str] = []
    parts: tuple[list[Rows], ...] = ([], [], [])
    for file in sorted(folder.glob("subtask*/task.json")):
        task = json.loads(file.read_text(encoding="utf-8"))
        number = first + len(names)
        texts = []
        for item in task["examples"]:
            target = item["target"]
            answer = target if isinstance(target, str) else target[0]
            texts.append((f"{task['task_prefix']}\n\n{item['input']}", answer, number))
        random.Random(file.parent.name).shuffle(texts)
        rows = encode(tokenizer, texts, ROW_TOKENS)
        if len(rows) < FEW:
            continue
        names.append(file.parent.name.removeprefix("subtask"))
        if names[-1].startswith(UNSEEN):
            parts[2].append(rows.pick(slice(HELD_OUT["unseen"])))
        else:
            parts[0].append(rows.pick(slice(HELD_OUT["seen"], None)))
            parts[1].append(rows.pick(slice(HELD_OUT["seen"])))
    train, seen, unseen = map(join, parts)
    return train, seen, unseen, names


def family_rows(tokenizer: Any, folder: Path, first: int) -> Rows:
    """Return rows of families that no training task belongs to."""
    texts = []
    for number, family in enumerate(FAMILIES):
        lines = (folder / f"{family}.jsonl").read_text(encoding="utf-8").splitlines()
        fits = []
        for line in map(json.loads, lines):
            answer = tokenizer.encode(line["completion"]).ids[:ANSWER_TOKENS]
            fits.append((line["prompt"], tokenizer.decode(answer), first + number))
        texts += fits[: HELD_OUT["families"]]
    return encode(tokenizer, texts, ROW_TOKENS)


def join(parts: Sequence[Rows]) -> Rows:
    """Return the rows of all parts."""
    return Rows(
        *(np.concatenate([getattr(p, name) for p in parts]) for name in COLUMNS)
    )


def write_jsonl(
    path: Path, tokenizer: Any, parts: Sequence[Rows], tasks: Sequence[str]
) -> None:
    """Write rows in the completions format, for ``python -m ifp_mlx.train``."""
    before, after = chat("\0").split("\0")
    with open(path, "w", encoding="utf-8") as file:
        for rows, number in ((part, n) for part in parts for n in range(len(part))):
            row, p = rows.tokens[number], rows.prompt[number]
            prompt, answer = (
                tokenizer.decode(part.tolist(), skip_special_tokens=False)
                for part in (row[:p], row[p : rows.length[number]])
            )
            line = {
                "prompt": prompt.removeprefix(before).removesuffix(after),
                "completion": answer.removesuffix("<|im_end|>"),
                "task": tasks[rows.task[number]],
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def save(path: Path, sets: dict[str, Rows], about: dict[str, Any]) -> None:
    """Write sets of rows and what is to be known about them into one file."""
    arrays = {f"{s}.{c}": getattr(r, c) for s, r in sets.items() for c in COLUMNS}
    about_bytes = np.frombuffer(json.dumps(about).encode(), np.uint8)
    with open(path, "wb") as file:  # numpy would add an ending to a name
        np.savez_compressed(file, about=about_bytes, **arrays)


def load(path: Path) -> tuple[dict[str, Rows], dict[str, Any]]:
    """Read what :func:`save` wrote."""
    with np.load(path) as found:
        names = dict.fromkeys(n.rpartition(".")[0] for n in found if "." in n)
        sets = {s: Rows(*(found[f"{s}.{c}"] for c in COLUMNS)) for s in names}
        return sets, json.loads(bytes(found["about"]))
