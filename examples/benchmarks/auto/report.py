"""Write the tables of the page from the results that are there.

python -m examples.benchmarks.auto.report
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.benchmarks.pages import fill
from ifp_mlx.evaluation.tables import markdown
from ifp_mlx.model.card import NEAR, Card
from ifp_mlx.selection.request import MIN_AGREEMENT

HERE = Path(__file__).parent
PAGE, RESULTS = HERE / "README.md", HERE / "results"
TITLES = {"smollm2": "SmolLM2-135M-Instruct", "gemma3": "Gemma-3-270m (base)"}
FIRST, FULL = "the first card", "`evaluate --card`"
CARDS = {FIRST: "first", FULL: "card"}  # their files
SIGNS = {"self_agreement": 1, "self_kl": -1}
LOOP = 4  # how often the same four words in a row have to occur
SHOWN = (0.9, 0.75, 0.5)  # keeps of the families' prompts
LEVELS = (MIN_AGREEMENT, 0.8)  # values of --min-agreement
WAYS = ("dense", "auto", "keep 0.9", "keep 0.75")  # of answering everyday questions

Line = dict[str, Any]


def models() -> dict[str, str]:
    """Return the titles of the models that have been measured."""
    measured = {name for name in TITLES if (RESULTS / name / "families").is_dir()}
    return {name: title for name, title in TITLES.items() if name in measured}


def cards_of(name: str) -> dict[str, Card]:
    """Return a model's cards by what makes them: its first request, and, where that was
    measured, `evaluate --card`.
    """
    files = {way: RESULTS / name / f"{file}.json" for way, file in CARDS.items()}
    return {
        way: Card.from_json(file.read_text(encoding="utf-8"))
        for way, file in files.items()
        if file.is_file()
    }


def lines_of(name: str, what: str) -> list[Line]:
    """Return the lines of one of a model's logs."""
    text = (RESULTS / name / what / "rows.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def compared(name: str) -> list[Line]:
    """Return what was measured of the families' prompts below keep 1."""
    return [line for line in lines_of(name, "families") if line["keep"] < 1]


def correlation(lines: Sequence[Line], sign: str) -> float:
    """Return Pearson's correlation of a sign and the answer's agreement."""
    found = np.corrcoef(
        [SIGNS[sign] * line[sign] for line in lines],
        [line["agreement"] for line in lines],
    )
    return float(found[0, 1])


def within(lines: Sequence[Line], sign: str) -> list[float]:
    """Return :func:`correlation` within each keep, largest keep first."""
    keeps = sorted({line["keep"] for line in lines}, reverse=True)
    found = []
    for keep in keeps:
        some = [line for line in lines if line["keep"] == keep]
        flat = len({line[sign] for line in some}) == 1
        found.append(float("nan") if flat else correlation(some, sign))
    return found


def agreements(name: str, keep: float) -> list[float]:
    """Return the agreement that the answer to each of the families' prompts has at a keep,
    linear between those that were measured.
    """
    at: dict[str, dict[float, float]] = {}
    for line in compared(name):
        at.setdefault(line["prompt"], {1.0: 1.0})[line["keep"]] = line["agreement"]
    return [
        float(np.interp(keep, sorted(own), [own[k] for k in sorted(own)]))
        for own in at.values()
    ]


def loops(text: str) -> bool:
    """Whether an answer goes round in circles: four words in a row come several times."""
    words = re.findall(r"\w+", text.lower())
    runs = [tuple(words[n : n + 4]) for n in range(len(words) - 3)]
    return any(runs.count(run) >= LOOP for run in set(runs))


def curve(name: str) -> str:
    """Return the cards' agreement, and what the families' prompts have."""
    cards, lines = cards_of(name), compared(name)
    keeps = sorted({k for card in cards.values() for k in card.keeps()}, reverse=True)
    keeps = keeps if FULL in cards else sorted({line["keep"] for line in lines})[::-1]
    rows, right = [], []
    for kind in cards[FULL].kinds if FULL in cards else ():
        at = {p.keep: p for p in cards[FULL].points if p.kind == kind}
        rows.append([kind, *(f"{at[k].agreement:.0%}, {at[k].kl:.2f}" for k in keeps)])
        if (dense := cards[FULL].dense_right.get(kind)) is not None:
            shares = [f"{at[k].right:.0%}" for k in keeps]
            right.append([f"{kind}, right (dense {dense:.0%})", *shares])
    for way, card in cards.items():
        found = [_of(card)(k) for k in keeps]
        cells = ["" if share is None else f"**{share:.0%}**" for share in found]
        rows.append([f"**promised by {way}**", *cells])
    rows.append(["families", *(_families(lines, k) for k in keeps)])
    return markdown(["", *(f"{keep:.2g}" for keep in keeps)], rows + right)


def _of(card: Card) -> Callable[[float], float | None]:
    """Return what a card promises of the keeps that it has, and no others."""
    return lambda keep: card.promise(keep) if min(_gaps(card, keep)) < NEAR else None


def _gaps(card: Card, keep: float) -> list[float]:
    return [abs(keep - known) for known in card.keeps()]


def _families(lines: Sequence[Line], keep: float) -> str:
    some = [line for line in lines if line["keep"] == keep]
    if not some:
        return ""
    agreement, kl = (np.mean([line[n] for line in some]) for n in ("agreement", "kl"))
    return f"{agreement:.0%}, {kl:.2f}"


def foretold() -> str:
    """Return how the self-check foretells the answer, of both models."""
    rows = []
    for name, title in models().items():
        lines = compared(name)
        for sign in SIGNS:
            mean = np.mean([line[sign] for line in lines])
            inside = ", ".join(f"{value:.2f}" for value in within(lines, sign))
            rows.append(
                [
                    title,
                    sign.replace("_", "-"),
                    f"{mean:.2f}",
                    f"{correlation(lines, sign):.2f}",
                    inside,
                ]
            )
    return markdown(
        ["model", "sign", "mean", "over all rows", "within a keep, 0.9 first"], rows
    )


def promises() -> str:
    """Return what the cards promise and what the answers have, and what auto keeps."""
    rows = []
    for name, title in models().items():
        measured = {round(line["keep"], 2) for line in compared(name)}
        for way, card in cards_of(name).items():
            keeps = [k for k in card.keeps()[::-1] if round(k, 2) in measured]
            had = [np.mean(agreements(name, keep)) for keep in keeps]
            cells = [
                f"{card.promise(keep):.0%}, {found:.0%}"
                for keep, found in zip(keeps, had, strict=True)
            ]
            cells += [""] * (len(SHOWN) - len(cells))
            auto = [f"{card.smallest(least):.2g}" for least in LEVELS]
            prompts = str(len(agreements(name, 1.0)))
            rows.append([title, way, prompts, *cells, *auto])
    head = ["model", "by", "prompts", *(f"keep {keep:g}" for keep in SHOWN)]
    return markdown([*head, *(f"auto at {least:g}" for least in LEVELS)], rows)


def seconds() -> str:
    """Return the seconds of selecting, of its self-check and of the first card."""
    rows = []
    for name, title in models().items():
        if not (file := RESULTS / name / "seconds.json").is_file():
            continue
        known = json.loads(file.read_text(encoding="utf-8"))
        for one in known["selections"]:
            select, check = one["select"], one["check"]
            cells = f"{select:.2f}", f"{check:.2f}, {check / select:.0%}"
            card = f"{known['first_card']:.0f}"
            rows.append([title, str(one["tokens"]), *cells, card])
    head = ["model", "tokens", "select, s", "of this self-check, s"]
    return markdown([*head, "first card, once, s"], rows)


def answers(name: str) -> str:
    """Return the everyday questions and their answers, as quotations."""
    lines = lines_of(name, "everyday")
    parts = []
    for question in dict.fromkeys(line["question"] for line in lines):
        said = {line["way"]: line for line in lines if line["question"] == question}
        parts.append(f"**{question}**")
        texts = {way: said[way]["text"].strip() for way in WAYS}
        if texts["auto"] == texts["dense"]:
            del texts["auto"]
            texts = {"dense, and at auto": texts.pop("dense")} | texts
        for way, text in texts.items():
            quoted = text.replace("\n", "\n> ")
            parts.append(f"{way}:\n\n> {quoted}")
    return "\n\n".join(parts)


def tables() -> dict[str, str]:
    """Return the page's tables, by name."""
    if not models():
        return {}
    found = {"foretold": foretold(), "promises": promises(), "seconds": seconds()}
    for what, write in (("curves", curve), ("answers", answers)):
        parts = [f"### {title}\n\n{write(name)}" for name, title in models().items()]
        found[what] = "\n\n".join(parts)
    return found


def main() -> None:
    """Write the tables into the page."""
    fill(PAGE, tables())
    print(PAGE)


if __name__ == "__main__":
    main()
