"""What the trainer reads: shapes of models, and the mix as rows of data."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ifp_mlx.files.atomic import new_folder

from .corpus import write_tokenizer
from .lab import Scale
from .tasks import Example, Task, all_tasks, examples, test_examples

DESCRIBED = 0.2  # share of the rows in which the description of the task selects
EXPERTS = 8
DOCUMENT = 8  # questions of a text, all of one task


def write_shapes(folder: Path, scale: Scale) -> None:
    """Write the shapes that rows begin with: folders without weights."""
    mixture = scale.config(scale.channels // EXPERTS)
    mixture |= {"num_local_experts": EXPERTS, "model_type": "mixtral"}
    mixture["architectures"] = ["MixtralForCausalLM"]
    mixture["num_experts_per_tok"] = EXPERTS * scale.kept // scale.channels
    shapes = {"large": scale.config(scale.channels), "small": scale.config(scale.kept)}
    for name, config in (shapes | {"experts": mixture}).items():
        if not (folder / name).exists():
            with new_folder(folder / name) as scratch:
                text = json.dumps(config, indent=2)
                (scratch / "config.json").write_text(text, encoding="utf-8")
                write_tokenizer(scratch, scale.mix)


def write_data(folder: Path, scale: Scale, rows: int, seed: int) -> None:
    """Write a seed's questions, and texts of questions, for the trainer."""
    if folder.exists():
        return
    tasks = all_tasks(scale.mix)
    drawn = examples(tasks, "train", rows, seed)
    checked = test_examples(tasks, 4, seed + 1000)
    rng = random.Random(seed)
    with new_folder(folder) as scratch:
        _write(scratch / "questions", "train", [_row(e, tasks, rng) for e in drawn])
        _write(scratch / "questions", "valid", [_row(e, tasks) for e in checked])
        texts = _texts(drawn, rng)
        _write(scratch / "text", "train", texts[:-32])
        _write(scratch / "text", "valid", texts[-32:])


def _row(
    example: Example, tasks: Sequence[Task], rng: random.Random | None = None
) -> dict[str, Any]:
    task = tasks[example.task]
    row = {"prompt": example.prompt, "completion": example.answer, "task": task.name}
    if rng is not None and rng.random() < DESCRIBED:
        row["select"] = task.description
    return row


def _texts(drawn: Sequence[Example], rng: random.Random) -> list[dict[str, Any]]:
    """Return texts of questions and answers of one task each."""
    of_task: dict[int, list[Example]] = {}
    for example in drawn:
        of_task.setdefault(example.task, []).append(example)
    texts = []
    for some in of_task.values():
        for start in range(0, len(some) - DOCUMENT + 1, DOCUMENT):
            part = some[start : start + DOCUMENT]
            texts.append({"text": " ".join(f"{e.prompt} {e.answer}" for e in part)})
    rng.shuffle(texts)
    return texts


def _write(folder: Path, split: str, rows: Sequence[dict[str, Any]]) -> None:
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
