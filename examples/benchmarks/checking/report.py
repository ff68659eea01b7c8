"""Write the tables of the page from the results that are there.

python -m examples.benchmarks.checking.report
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.benchmarks.pages import fill
from ifp_mlx.evaluation import checked
from ifp_mlx.evaluation.tables import markdown

HERE = Path(__file__).parent
PAGE, RESULTS = HERE / "README.md", HERE / "results"
TIE = 1e-5  # of the spread of the logits: a smaller gap is rounding
STORE = "SmolLM2 from a store"
EXACT = [
    *(
        f"{STORE}, keep {keep}, check exact, 8 drafted"
        for keep in ("0.75", "0.5", "0.333")
    ),
    *(f"Gemma 3, keep {keep}, check exact" for keep in ("0.75", "0.5", "0.333")),
    "SmolLM2 at 4 bits, keep 0.5, check exact",
    "SmolLM2, keep 0.5, check exact",
]
FOLLOWING = [
    f"{STORE}, keep {keep}, check exact{more}"
    for keep in ("0.75", "0.5")
    for more in (", 8 drafted", "", ", reselect drift")
]
NEARLY = [
    f"{STORE}, keep 0.5, check {check}" for check in ("off", 0.1, 0.3, 0.6, "exact")
]

Line = dict[str, Any]


def load_answers(folder: Path = RESULTS) -> dict[str, list[Line]]:
    """Return the answers of each arm, in the order of the prompts."""
    text = (folder / "answers" / "rows.jsonl").read_text(encoding="utf-8")
    found: dict[str, list[Line]] = {}
    for line in map(json.loads, text.splitlines()):
        found.setdefault(line["arm"], []).append(line)
    return {arm: sorted(lines, key=_prompt) for arm, lines in found.items()}


def _prompt(line: Line) -> int:
    return int(line["prompt"])


def other(lines: Sequence[Line]) -> list[Line]:
    """Return the answers that are not the dense model's own."""
    return [line for line in lines if not line["same"]]


def tokens_per_check(lines: Sequence[Line]) -> float:
    """Return how many tokens a check brought, over all answers."""
    return sum(line["tokens"] for line in lines) / sum(line["checks"] for line in lines)


def read_share(lines: Sequence[Line]) -> float:
    """Return the bytes read for a token as a share of all channels' bytes."""
    read = sum(line["bytes_read"] for line in lines)
    return read / sum(line["tokens"] for line in lines) / lines[0]["streaming"]


def exact(answers: dict[str, list[Line]]) -> str:
    """Return whether exact answers are the dense model's own."""
    rows = []
    for arm in EXACT:
        lines = answers[arm]
        ties = sum(line["gap"] <= TIE for line in other(lines))
        cells = [arm.replace(", check exact", ""), f"{len(lines) - len(other(lines))}"]
        cells += [f"{ties}", f"{len(other(lines)) - ties}"]
        rows.append([*cells, f"{max(line['gap'] for line in lines):.1e}"])
    head = ["", f"the dense model's, of {len(answers[EXACT[0]])}"]
    return markdown([*head, "a tie decided", "wrong", "largest gap"], rows)


def following(answers: dict[str, list[Line]]) -> str:
    """Return how far drafts come."""
    rows = []
    for arm in FOLLOWING:
        lines = answers[arm]
        drafted = sum(line["drafted"] for line in lines)
        stood = sum(line["tokens"] - line["checks"] for line in lines)
        cells = [arm.replace(", check exact", ""), f"{tokens_per_check(lines):.2f}"]
        cells += [f"{read_share(lines):.1%}", f"{stood / drafted:.0%}"]
        rows.append(
            [*cells, f"{sum(line['moves'] for line in lines) / len(lines):.1f}"]
        )
    head = ["", "tokens a check", "read, of streaming", "drafted tokens that stood"]
    return markdown([*head, "exchanges an answer"], rows)


def nearly(answers: dict[str, list[Line]]) -> str:
    """Return quality against the tolerance."""
    rows = []
    for arm in NEARLY:
        lines = answers[arm]
        found = checked.summary(lines)
        each = found["tokens_per_check"]
        cells = [
            arm.rpartition(" ")[2],
            f"{found['same']:.0%}",
            f"{found['before']:.0%}",
        ]
        cells += [f"{found['alike']:.0%}", f"{found['nats']:.3f}"]
        cells += ["" if each is None else f"{each:.2f}", f"{read_share(lines):.1%}"]
        rows.append(cells)
    head = ["check", "the dense answer", "as far as", "tokens alike", "nats a token"]
    return markdown([*head, "tokens a check", "read, of streaming"], rows)


def speed(folder: Path = RESULTS) -> str:
    """Return tokens per second, the median of the prompts."""
    file = folder / "speed" / "rows.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows = []
    bandwidths = [run["bandwidth"] for run in lines[0]["rows"][-1]["runs"]]
    for keep in sorted({line["keep"] for line in lines}, reverse=True):
        cases = [line for line in lines if line["keep"] == keep]
        for number, row in enumerate(cases[0]["rows"]):
            cells = [f"{keep:g}", row["row"]]
            for bandwidth in bandwidths:
                runs = [
                    run["tokens"] / run["seconds"]
                    for case in cases
                    for run in case["rows"][number]["runs"]
                    if run["bandwidth"] == bandwidth
                ]
                cells.append(f"{sorted(runs)[len(runs) // 2]:.2f}" if runs else "")
            rows.append(cells)
    head = [
        "keep",
        "",
        *("cached" if b is None else f"{b / 1e9:g} GB/s" for b in bandwidths),
    ]
    return markdown(head, rows)


def memory(folder: Path = RESULTS) -> str:
    """Return the peaks beside what has to be in memory."""
    found = json.loads((folder / "memory.json").read_text(encoding="utf-8"))
    rows = []
    for keep, case in found.items():
        if keep == "dense":
            continue
        needed = case["compact"] + case["rest"] + case["kv"]
        for name in ("plain", "store"):
            peak = case[name]["peak"] - case["idle"]
            cells = [keep, name, _mb(found["dense"]), _mb(case["limit"]), _mb(needed)]
            rows.append([*cells, _mb(peak), f"{peak / needed:.2f}"])
    head = ["keep", "folder", "dense weights MB", "limit MB", "needed MB"]
    return markdown([*head, "peak MB", "peak / needed"], rows)


def _mb(count: float) -> str:
    return f"{count / 1e6:,.0f}"


def tables(folder: Path = RESULTS) -> dict[str, str]:
    """Return every table by its name."""
    answers = load_answers(folder)
    found = {"exact": exact(answers), "following": following(answers)}
    found |= {"nearly": nearly(answers)}
    return found | {"speed": speed(folder), "memory": memory(folder)}


def write() -> None:
    """Write the page."""
    fill(PAGE, tables())


if __name__ == "__main__":
    write()
