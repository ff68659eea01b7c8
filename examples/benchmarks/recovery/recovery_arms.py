"""Recover one mask on examples of its task and on others, and compare: recover.md.

    python -m examples.benchmarks.recovery.recovery_arms WHAT

WHAT is one of

    data    # the mask and two folders of examples
    task    # train on the task's examples
    other   # the same command, but for its data
    ffn-25  # a short run, of FFNs and norms
    lora-25 # the same with LoRA
    compare # print the tables, of what was trained

SmolLM2-135M and data-to-text of task_families.py. The mask is made from the 16
examples for calibration; no prompt that is compared is among those trained on. A long
arm takes above an hour on one core and 6 GB, and goes on where it was stopped; two may
run at the same time. Everything is kept in models/recovery.
"""

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from examples.benchmarks.selectors.task_families import (
    Example,
    families,
    fetch_packages,
)
from examples.benchmarks.selectors.task_families import write as write_families
from examples.fetch import MODELS, fetch
from ifp_mlx import Selection, load
from ifp_mlx.evaluation.rows import Row, read_rows
from ifp_mlx.evaluation.statistics import bootstrap, macro_mean
from ifp_mlx.evaluation.teacher import log_probabilities, metrics
from ifp_mlx.files.atomic import new_file
from ifp_mlx.training.records import Reader

ROOT = Path(__file__).resolve().parents[3]
FOLDER = MODELS / "recovery"
TASK = "data2text"
# Of each arm: whose examples, which weights, how many steps, of how many rows.
ARMS = {"task": ("task", "ffn", 250, 8), "other": ("other", "ffn", 250, 8)}
ARMS |= {"ffn-25": ("task", "ffn", 25, 2), "lora-25": ("task", "lora", 25, 2)}
BITS = (8, 4)  # that the arm of the task is quantised to afterwards
OTHERS = ("code", "math", "facts", "dialog", "sql", "hella", "prose")
UNSEEN = ("qgen", "boolq")  # families that neither arm is trained on
TRAIN, VALID = 240, 24
# Other families have longer examples. So that both arms read about the same number of
# tokens, theirs have at most this many where enough do, and a few of the task's
# shortest are left out.
LONG, DROPPED = 80, 30
LONGEST = 1100  # characters of a prompt
HELD_OUT = {TASK: 12}  # prompts that are compared; of the others:
ROWS = 3

Results = dict[str, dict[str, list[dict[str, float]]]]  # model, family, row


def write_data() -> None:
    """Write the mask, and train.jsonl and valid.jsonl of both arms."""
    known = families(fetch_packages())
    reader = Reader(load(fetch("smollm2"))[1], "recover")
    free = list(_free(known[TASK], TASK, ("test", "calibration")))
    chosen = random.Random(TASK).sample(free, TRAIN + VALID + DROPPED)
    dropped = sorted(chosen, key=partial(_length, reader))[:DROPPED]
    chosen = [example for example in chosen if example not in dropped]
    each, more = divmod(TRAIN, len(OTHERS))
    mixed: list[Example] = []
    for number, family in enumerate(OTHERS):
        # The calibration examples of these families made no mask here.
        free = list(_free(known[family], family, ("test",)))
        mixed += _short(free, each + (number < more), reader, random.Random(family))
    parts = {"task": chosen[:TRAIN], "other": mixed}
    for arm, examples in parts.items():
        folder = FOLDER / "data" / arm
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "train.jsonl", examples)
        _write(folder / "valid.jsonl", chosen[TRAIN:])  # of the task, for both
        mean = np.mean([_length(reader, example) for example in examples])
        print(f"{folder}: {len(examples)} examples, {mean:.1f} tokens on average")
    calibration = MODELS / "families" / "calibration" / f"{TASK}.jsonl"
    _run(
        *("tasks", "make", "--model", fetch("smollm2"), "--name", TASK),
        *("--examples", calibration, "--keep", 0.5, "--allocation", "uniform"),
        *("--tasks-folder", FOLDER / "tasks"),
    )


def _free(
    examples: list[Example], family: str, parts: tuple[str, ...]
) -> Iterator[Example]:
    """Yield examples whose prompts are not in those parts of the family's files, no
    prompt twice.
    """
    files = [write_families() / part / f"{family}.jsonl" for part in parts]
    rows = [json.loads(line) for file in files for line in file.open(encoding="utf-8")]
    seen = {_asked(row) for row in rows} | {""}  # XSum has an empty document
    for example in examples:
        if _asked(example) not in seen and len(_asked(example)) <= LONGEST:
            seen.add(_asked(example))
            yield example


def _asked(example: Example) -> str:
    return example.get("prompt", example.get("text", ""))


def _short(
    examples: list[Example], count: int, reader: Reader, rng: random.Random
) -> list[Example]:
    """Return some of the short examples, or the shortest where few are short."""
    tried = rng.sample(examples, min(len(examples), 2000))
    lengths = {id(example): _length(reader, example) for example in tried}
    short = [example for example in tried if lengths[id(example)] <= LONG]
    if len(short) >= count:
        return short[:count]
    return sorted(tried, key=lambda example: lengths[id(example)])[:count]


def _length(reader: Reader, example: Example) -> int:
    return len(reader.records(example)[0].tokens)


def _write(path: Path, examples: list[Example]) -> None:
    lines = [json.dumps(example) for example in examples]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _run(module: str, *options: Any) -> None:
    command = [sys.executable, "-m", f"ifp_mlx.{module}", *map(str, options)]
    subprocess.run(command, check=True, cwd=ROOT)


def train(arm: str) -> None:
    """Recover the mask as an arm says; a run that was stopped goes on."""
    data, weights, steps, rows = ARMS[arm]
    _run(
        *("train", "--stage", "recover", "--model", fetch("smollm2")),
        *("--task", TASK, "--tasks-folder", FOLDER / "tasks"),
        *("--data", FOLDER / "data" / data, "--output", FOLDER / arm),
        *("--steps", steps, "--batch-size", rows, "--warmup", min(20, steps // 5)),
        *("--lr", 3e-4, "--train", weights, "--save-every", 10, "--eval-every", 125),
    )


def compare() -> None:
    """Print KL and agreement of the sliced model, of every arm that is there, and of
    the task's arm quantised.
    """
    model, tokenizer = load(fetch("smollm2"))
    rows = {
        family: read_rows(
            write_families() / "test" / f"{family}.jsonl",
            tokenizer,
            limit=HELD_OUT.get(family, ROWS),
        )
        for family in (TASK, *OTHERS, *UNSEEN)
    }
    selection = Selection.load(FOLDER / "tasks" / f"{TASK}.safetensors")
    folders = {arm: FOLDER / arm / "model" for arm in ARMS}
    models = {"sliced": partial(model.compact, selection)}
    models |= {n: partial(stock, f) for n, f in folders.items() if f.exists()}
    dense = model.dense()
    results = measure(rows, dense, models)
    print(table(results))
    for one, other in (("task", "other"), ("ffn-25", "lora-25")):
        if {one, other} <= results.keys():
            print(difference(results, one, other))
    if "task" not in results:
        return
    # Quantised matrices are slow on a CPU, so of the task alone.
    small = {f"task, {b} bits": partial(stock, quantised(b)) for b in BITS}
    found = measure({TASK: rows[TASK]}, dense, small) | {"task": results["task"]}
    print("\nQuantised afterwards, on the prompts of the task:\n")
    for name, values in found.items():
        kl, same = (_mean(values, (TASK,), metric) for metric in ("kl", "agreement"))
        print(f"- {name}: KL {kl:.3f}, agreement {same:.0%}")


def quantised(bits: int) -> Path:
    """Return the task's arm as mlx-lm's own tool quantises it, made if need be."""
    from mlx_lm import convert

    folder = FOLDER / f"task-{bits}-bits"
    if not folder.exists():
        source = str(FOLDER / "task" / "model")
        convert(source, mlx_path=str(folder), quantize=True, q_bits=bits)
    return folder


def stock(folder: Path) -> Any:
    """Open a folder as mlx-lm alone does."""
    import mlx_lm

    return mlx_lm.load(str(folder))[0]


def measure(
    rows: dict[str, list[Row]], dense: Any, models: Mapping[str, Callable[[], Any]]
) -> Results:
    """Return the metrics of every row of every family for each model; those that were
    measured before are taken from models/recovery/results.
    """
    reference = cache(lambda family, n: log_probabilities(dense, rows[family][n]))
    results: Results = {}
    for name, opened in models.items():
        file = FOLDER / "results" / f"{name}.json"
        if not file.exists():
            compact = opened()
            found = {
                family: [
                    metrics(row, log_probabilities(compact, row), reference(family, n))
                    for n, row in enumerate(some)
                ]
                for family, some in tqdm(rows.items(), name, disable=None, leave=False)
            }
            with new_file(file) as scratch:
                scratch.write_text(json.dumps(found) + "\n", encoding="utf-8")
        results[name] = json.loads(file.read_text(encoding="utf-8"))
    return results


def groups() -> dict[str, tuple[str, ...]]:
    """Return which families stand in a line of the table, by its title."""
    each: dict[str, tuple[str, ...]] = {f: (f,) for f in (TASK, *OTHERS, *UNSEEN)}
    return each | {f"mean of the {len(OTHERS)}": OTHERS, "mean of the unseen": UNSEEN}


def table(results: Results) -> str:
    """Return the results as Markdown: a line for each family, and means."""
    lines = ["| KL, agreement | " + " | ".join(results) + " |"]
    lines += ["|---" * (len(results) + 1) + "|"]
    for title, members in groups().items():
        cells = [
            f"{_mean(found, members, 'kl'):.2f}, {_mean(found, members, 'agreement'):.0%}"
            for found in results.values()
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def difference(results: Results, one: str, other: str) -> str:
    """Return how much more KL ``one`` has than ``other``, with paired intervals."""
    lines = [f"\nKL of {one} less that of {other}, paired 95 % bootstrap interval:\n"]
    for title, members in groups().items():
        more = {
            family: [
                a["kl"] - b["kl"]
                for a, b in zip(
                    results[one][family], results[other][family], strict=True
                )
            ]
            for family in members
        }
        low, high = bootstrap(more)
        lines.append(f"- {title}: {macro_mean(more):+.2f} ({low:+.2f} to {high:+.2f})")
    return "\n".join(lines)


def _mean(
    found: dict[str, list[dict[str, float]]], members: tuple[str, ...], name: str
) -> float:
    return macro_mean({f: [row[name] for row in found[f]] for f in members})


if __name__ == "__main__":
    verbs = {"data": write_data, "compare": compare}
    verbs |= {arm: partial(train, arm) for arm in ARMS}
    if len(sys.argv) != 2 or sys.argv[1] not in verbs:
        module = "examples.benchmarks.recovery.recovery_arms"
        sys.exit(f"usage: python -m {module} {'|'.join(verbs)}")
    verbs[sys.argv[1]]()
