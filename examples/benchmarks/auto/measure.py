"""Measure what `--keep auto` promises, and how far the answers keep to it.

    python -m examples.benchmarks.auto.measure [smollm2|gemma3] [--rows 3] [--keeps ...]
    python -m examples.benchmarks.auto.measure [smollm2|gemma3] --seconds
    python -m examples.benchmarks.auto.report

The first measures for one model: the card that the first request makes, and the one of
`evaluate --card`; prompts of eight families on which no default was chosen, in a card's
way, with the self-check of each selection; and the answers to five everyday questions,
dense, at auto, and at the shares of the first card. It goes on where it was stopped.
The second measures the time of selecting, of its self-check and of the first card, and
needs an idle machine. The third writes the tables of the page.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from examples.benchmarks.selectors.task_families import write as write_families
from examples.fetch import fetch
from ifp_mlx import IFPModel, load
from ifp_mlx.evaluation import card
from ifp_mlx.evaluation.log import Log
from ifp_mlx.model import checkpoint
from ifp_mlx.model.card import Card, fingerprint_of
from ifp_mlx.model.decide import decide, first_card
from ifp_mlx.model.generation import stream_generate
from ifp_mlx.model.responses import report
from ifp_mlx.selection.prompts import as_messages, tokenize
from ifp_mlx.selection.request import Request

RESULTS = Path(__file__).parent / "results"
# Fixed before any was answered.
EVERYDAY = (
    "What is a fjord?",
    "Write a short email to my landlord saying that the heating is broken.",
    "Give me three ideas for a quick dinner with eggs.",
    "Explain how a bicycle stays upright.",
    "Summarise in one sentence: The museum opens at nine on weekdays and at ten on "
    "weekends. Tickets cost eight euros, and children under twelve enter free.",
)
EVERYDAY_TOKENS = 96
LESS = (0.9, 0.75)  # of the first card
LONGEST = 200  # tokens of a family's prompt
KEEPS = (0.9, 0.75, 0.5)  # of the families' prompts
TIMES = 5  # runs of a selection, of which the median counts
# Texts without a question (prose) have no chat to answer.
FAMILIES = ("code", "math", "qgen", "facts", "dialog", "sql", "data2text", "hella")


def family_prompts(model: IFPModel, count: int) -> list[card.CardPrompt]:
    """Return the first prompts of each family that are not too long, as a card's."""
    prompts = []
    for family in FAMILIES:
        text = (write_families() / "test" / f"{family}.jsonl").read_text("utf-8")
        asked = [json.loads(line)["prompt"] for line in text.splitlines()]
        short = [p for p in asked if prompt_tokens(model, p) <= LONGEST]
        prompts += [
            card.CardPrompt(f"{family} {number}", family, prompt)
            for number, prompt in enumerate(short[:count], 1)
        ]
    return prompts


def prompt_tokens(model: IFPModel, prompt: str) -> int:
    """Return how many tokens a prompt has with its chat template."""
    return len(tokenize(model.tokenizer, as_messages(prompt)))


def measure_first(model: IFPModel, folder: Path) -> Card:
    """Measure the card that the first request makes, unless there is one."""
    file = folder / "first.json"
    if not file.exists():
        made = first_card(model, tqdm)
        assert made is not None
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(made.as_json(), encoding="utf-8")
    return Card.from_json(file.read_text(encoding="utf-8"))


def measure_card(model: IFPModel, folder: Path, shares: Sequence[float] | None) -> Card:
    """Measure the model's card, and keep it with the results."""
    prompts = card.card_prompts()
    log = Log(folder / "card", card.settings_of(model, prompts), card.KEY)
    keeps = card.measured_keeps(model, shares)
    made = card.measure(model, prompts, keeps, log, progress=tqdm)
    (folder / "card.json").write_text(made.as_json(), encoding="utf-8")
    return made


def measure_families(model: IFPModel, folder: Path, rows: int) -> None:
    """Measure the families' prompts at some keeps."""
    prompts = family_prompts(model, rows)
    log = Log(folder / "families", {"fingerprint": fingerprint_of(model)}, card.KEY)
    keeps = card.measured_keeps(model, KEEPS)
    card.measure(model, prompts, keeps, log, progress=tqdm)


def answer_everyday(model: IFPModel, first: Card, folder: Path) -> None:
    """Answer the everyday questions: dense, at auto by the first card, and at its keeps."""
    log = Log(folder / "everyday", {}, ("question", "way"))
    for question in tqdm(EVERYDAY):
        ways = {"dense": Request(keep=1.0), "auto": Request(keep="auto")}
        ways |= {f"keep {keep:g}": Request(keep=keep) for keep in LESS}
        for way, request in ways.items():
            if (question, way) in log:
                continue
            model.__dict__["card"] = first  # instead of one in the model's folder
            log.add(
                {"question": question, "way": way} | answered(model, question, request)
            )


def answered(model: IFPModel, question: str, request: Request) -> dict[str, Any]:
    """Return the answer of a request, and its figures."""
    start = time.perf_counter()
    options: dict[str, Any] = {"request": request, "max_tokens": EVERYDAY_TOKENS}
    steps = list(stream_generate(model, model.tokenizer, question, **options))
    said = report(steps[-1])
    selection = {name: said["selection"][name] for name in ("agreement", "kl")}
    selection["keep"] = steps[-1].selection.share
    text = "".join(step.text for step in steps)
    seconds = round(time.perf_counter() - start, 2)
    ids = [step.token for step in steps]
    return (
        {"text": text, "ids": ids, "select": said["seconds"]["select"]}
        | selection
        | {"seconds": seconds}
    )


@contextmanager
def timed(home: Any, name: str) -> Iterator[list[float]]:
    """Note the seconds of each call of a function, inside the ``with`` block."""
    real, seconds = getattr(home, name), []

    def call(*args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        found = real(*args, **options)
        seconds.append(time.perf_counter() - start)
        return found

    setattr(home, name, call)
    try:
        yield seconds
    finally:
        setattr(home, name, real)


def measure_seconds(model: IFPModel, folder: Path) -> None:
    """Measure what selecting by a short and a long instruction takes, and the first card."""
    selections = []
    for text in (EVERYDAY[0], f"{EVERYDAY[3]} " * 18):
        select = []
        with timed(checkpoint, "compared") as check:
            for _ in range(TIMES):
                request = Request(instruction=text, keep=KEEPS[0])
                select.append(model.prepare(decide(request, model)).select)
        about = {"tokens": len(model.instruction_tokens(text)), "keep": KEEPS[0]}
        selections.append(about | {"select": median(select), "check": median(check)})
    start = time.perf_counter()
    first_card(model)
    spent = time.perf_counter() - start
    text = json.dumps({"selections": selections, "first_card": spent}, indent=1)
    (folder / "seconds.json").write_text(f"{text}\n", encoding="utf-8")


def main() -> None:
    """Measure one model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", default="smollm2", help="smollm2 or gemma3")
    parser.add_argument("--rows", type=int, default=3, help="of each family")
    parser.add_argument("--keeps", type=float, nargs="+", help="of the card")
    parser.add_argument("--seconds", action="store_true", help="measure these alone")
    args = parser.parse_args()
    model, _ = load(fetch(args.name))
    folder = RESULTS / args.name
    if args.seconds:
        measure_seconds(model, folder)
        return
    answer_everyday(model, measure_first(model, folder), folder)
    measure_families(model, folder, args.rows)
    measure_card(model, folder, args.keeps)


if __name__ == "__main__":
    main()
