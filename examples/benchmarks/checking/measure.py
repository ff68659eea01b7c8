"""Answers that the whole model checks, their speed, and their memory; write the page.

    python -m examples.benchmarks.checking.measure

SmolLM2-135M and Gemma-3-270m (`examples/fetch.py`), and for memory a random model made
here; 6 GB go to models/checking. A run that was stopped goes on. `--parts` measures
only some parts, `--limit` only some prompts; their results stay valid. Let nothing else
run meanwhile, since the parts `speed` and `memory` are timed and weighed.
"""

import argparse
import json
import resource
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from examples.benchmarks.store.store_check import child
from examples.fetch import MODELS, fetch
from ifp_mlx import load, stream_generate
from ifp_mlx.checking.answer import answered
from ifp_mlx.checking.loop import CheckedRun, DraftLength
from ifp_mlx.checking.rule import Rule
from ifp_mlx.decoding.options import Decoding
from ifp_mlx.evaluation import checked, checked_speed
from ifp_mlx.evaluation.log import Line, Log
from ifp_mlx.evaluation.rows import Row
from ifp_mlx.evaluation.teacher import log_probabilities
from ifp_mlx.files.atomic import new_file
from ifp_mlx.model.checkpoint import IFPModel
from ifp_mlx.model.decide import decide
from ifp_mlx.model.dense_prefill import read_densely
from ifp_mlx.model.fit import Limits
from ifp_mlx.selection.prompts import as_messages, tokenize
from ifp_mlx.selection.request import Check, Request, Reselect
from ifp_mlx.storage.writer import write_store

from . import memory, report

EVERYTHING = 1 << 40  # bytes, more than any model has
TOKENS = 64  # of an answer at most; a model may end before
# Written down before anything was measured.
PROMPTS = (
    "What is the capital of France?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Explain why the sky is blue.",
    "List five healthy breakfast ideas.",
    "Translate to Spanish: The weather is nice today.",
    "A train travels 60 km in 1.5 hours. What is its speed?",
    "Write a short email asking for a day off.",
    "Summarize: The cat sat on the mat because it was warm and the sun was shining "
    "through the window all afternoon.",
    "What are the primary colors?",
    "Give me a SQL query that counts rows in table users by country.",
    "What is the difference between a virus and a bacterium?",
    "Correct the grammar: She don't likes apples.",
    "Give three reasons to learn a second language.",
    "Is this review positive or negative? The food was cold and the waiter was rude.",
    "Write a haiku about autumn leaves.",
    "How do I boil an egg?",
    "Name the planets of the solar system in order.",
    "Explain to a child what a computer program is.",
    "What is 17 times 23? Show your steps.",
    "Invent a name and a slogan for a shop that repairs bicycles.",
)
KEEPS = (0.75, 0.5, 1 / 3)


class Arm(NamedTuple):
    """One way of answering all prompts.

    Attributes:
        source: one of :data:`SOURCES`.
        keep: kept share of the channels.
        check: how.
        drafted: tokens drafted for every check; ``None``: as many as ``generate`` does.
        reselect: whether a check may choose other channels.
    """

    source: str
    keep: float
    check: Check = "exact"
    drafted: int | None = None
    reselect: Reselect = "off"

    @property
    def held(self) -> bool:
        """Whether dropped channels stay in memory. That changes no token and no check
        and takes a third of the time; bytes are counted as if read for each check.
        """
        return self.check != "off" and self.source in (STORE, "Gemma 3")

    @property
    def name(self) -> str:
        """What results call it."""
        parts = [self.source, f"keep {self.keep:.3g}", f"check {self.check}"]
        parts += [] if self.drafted is None else [f"{self.drafted} drafted"]
        parts += [] if self.reselect == "off" else [f"reselect {self.reselect}"]
        return ", ".join(parts)


# The sources, and the model whose answers each has to give.
SOURCES = {
    "SmolLM2": "smollm2",
    "SmolLM2 from a store": "smollm2",
    "SmolLM2 at 4 bits": "smollm2-4bit",
    "Gemma 3": "gemma3",
}
STORE = "SmolLM2 from a store"
EXACT = [
    *(Arm(STORE, keep, drafted=8) for keep in KEEPS),
    *(Arm("Gemma 3", keep) for keep in KEEPS),
    Arm("SmolLM2 at 4 bits", 0.5),
    Arm("SmolLM2", 0.5),
]
ADAPTING = [Arm(STORE, keep) for keep in KEEPS[:2]]
RESELECTING = [Arm(STORE, keep, reselect="drift") for keep in KEEPS[:2]]
TOLERANCES: tuple[Check, ...] = ("off", 0.1, 0.3, 0.6)  # and exact, which is above
NEARLY = [Arm(STORE, 0.5, check) for check in TOLERANCES]
ARMS = [*EXACT, *ADAPTING, *RESELECTING, *NEARLY]

# Speed: these prompts, and this many tokens of each.
SPEED_PROMPTS, SPEED_TOKENS, SPEED_KEEPS = 3, 24, (0.75, 0.5)
SPEED_CHECKS: tuple[Check, ...] = ("exact", 0.3)
BANDWIDTHS = (1e9, 3e9, 6e9)


def folder_of(source: str, scratch: Path) -> Path:
    """Return the folder that an arm reads, made if it is missing."""
    plain = fetch(SOURCES[source].removesuffix("-4bit"))
    if source == STORE:
        store = scratch / "smollm2-store"
        return store if store.exists() else write_store(plain, store)
    if source == "SmolLM2 at 4 bits":
        return quantised(plain, scratch / "smollm2-4bit")
    return plain


def quantised(plain: Path, folder: Path) -> Path:
    """Return a 4-bit folder in groups of 64, as `mlx_lm.convert -q` makes it."""
    if not folder.exists():
        command = ["mlx_lm.convert", "--hf-path", plain, "--mlx-path", folder]
        status, lines = child(*command, "-q", "--q-bits", 4, "--q-group-size", 64)
        if status:
            raise SystemExit(f"mlx_lm.convert ended with status {status}: {lines}")
    return folder


# Answers


def measure_answers(scratch: Path, results: Path, limit: int) -> None:
    """Answer every prompt in every way that is not in the results yet."""
    log = Log(results / "answers", settings(), ("arm", "prompt"))
    for source in SOURCES:
        arms = [arm for arm in ARMS if arm.source == source]
        jobs = [arm for arm in arms if not _done(log, arm.name, limit)]
        if not jobs:
            continue
        folder = folder_of(source, scratch)
        model, _ = load(folder)
        dense = load(folder_of(DENSE.get(source, source), scratch))[0].dense()
        mx.eval(dense.parameters())
        own = SOURCES[source]
        _answer_all(log, own, limit, partial(stock, model, dense))
        for arm in jobs:
            print(f"{arm.name} ...", file=sys.stderr, flush=True)

            def answer(
                prompt: int, arm: Arm = arm, m: Any = model, d: Any = dense
            ) -> Line:
                dense_ids = log.lines[SOURCES[arm.source], prompt]["ids"]
                return answer_of(m, d, arm, tokens_of(m, prompt), dense_ids)

            _answer_all(log, arm.name, limit, answer)


DENSE = {STORE: "SmolLM2"}  # where the same weights lie


def _done(log: Log, arm: str, limit: int) -> bool:
    return all((arm, prompt) in log for prompt in range(limit))


def _answer_all(log: Log, arm: str, limit: int, answer: Callable[[int], Line]) -> None:
    for prompt in range(limit):
        if (arm, prompt) not in log:
            log.add({"arm": arm, "prompt": prompt} | answer(prompt))


def settings() -> dict[str, Any]:
    """Return what decides the results."""
    versions = {name: version(name) for name in ("mlx", "mlx-lm")}
    return versions | {"tokens": TOKENS, "prompts": list(PROMPTS)}


def tokens_of(model: IFPModel, prompt: int) -> list[int]:
    """Return the ids of a prompt by its number."""
    return tokenize(model.tokenizer, as_messages(PROMPTS[prompt]))


def stock(model: IFPModel, dense: Any, prompt: int) -> Line:
    """Return mlx_lm's greedy answer with the dense model."""
    from mlx_lm import stream_generate as generate

    tokens = tokens_of(model, prompt)
    steps = list(generate(dense, model.tokenizer, tokens, max_tokens=TOKENS))
    ids = [step.token for step in steps]
    text = "".join(step.text for step in steps)
    return {"ids": ids, "text": text} | against(dense, tokens, ids, ids)


def answer_of(
    model: IFPModel, dense: Any, arm: Arm, tokens: list[int], own: list[int]
) -> Line:
    """Return an answer, its cost, and how it compares with the dense model's own."""
    how: dict[str, Any] = {"check": arm.check, "reselect": arm.reselect}
    how["memory_bytes"] = EVERYTHING if arm.held else None
    request = Request(instruction=tokens, keep=arm.keep, **how)
    if request.checks:
        steps = list(_checked(model, request, arm, tokens))
    else:
        about: dict[str, Any] = {"request": request, "max_tokens": TOKENS}
        steps = list(stream_generate(model, model.tokenizer, tokens, **about))
    ids, check = [step.token for step in steps], steps[-1].check
    line: Line = {"ids": ids, "text": "".join(step.text for step in steps)}
    line |= checked.figures(check) | {"drafted": getattr(check, "drafted", 0)}
    footprint = model.footprint
    line["streaming"] = footprint.channel_bytes([model.channels] * model.layers)
    if arm.held:
        each = line["streaming"] - footprint.channel_bytes(steps[-1].selection)
        line["bytes_read"] = line["checks"] * each
    line["moves"] = len(getattr(check, "moves", ()))
    return line | against(dense, tokens, ids, own)


class Said(NamedTuple):
    """A step of an answer, as far as it is needed here."""

    token: int
    text: str
    check: Any
    selection: Any


def _checked(
    model: IFPModel, request: Request, arm: Arm, tokens: list[int]
) -> Iterator[Any]:
    if arm.drafted is None:
        about: dict[str, Any] = {"request": request, "max_tokens": TOKENS}
        yield from stream_generate(model, model.tokenizer, tokens, **about)
        return
    decision = decide(request, model, limits=Limits(0, request.memory_bytes))
    made = model.prepare(decision)
    assert made.whole is not None and request.check != "off"
    reading = read_densely(made.kv, decision.tokens, tokens, None)
    length = DraftLength(arm.drafted, arm.drafted)
    how: Any = Rule(request.check, Decoding()), length, reading.kv, reading.tokens
    run = CheckedRun(made.whole, tokens, *how)
    for step in answered(run, model.tokenizer, TOKENS):
        yield Said(step.token, step.text, step.check, made.selection)


def against(dense: Any, prompt: list[int], ids: list[int], own: list[int]) -> Line:
    """Return how an answer compares with the dense model's own, and how probable the
    dense model finds it.

    Returns:
        The fields of :mod:`ifp_mlx.evaluation.checked`; and ``gap``: how far a token is
        below the dense model's best, at the worst place, as a share of the spread of
        the logits there.
    """
    rows = np.array(log_probabilities(dense, Row(prompt, ids)))
    best, said = rows.max(axis=-1), rows[np.arange(len(ids)), ids]
    gaps = (best - said) / (best - rows.min(axis=-1))
    line = {"tokens": len(ids), "nats": float(-said.mean()), "gap": float(gaps.max())}
    return line | checked.compare(ids, own)


# Speed


def measure_speed(scratch: Path, results: Path, limit: int) -> None:
    """Time checking beside models that are not checked, prompt by prompt."""
    log = Log(results / "speed", settings() | speed_settings(), ("keep", "prompt"))
    model, _ = load(folder_of(STORE, scratch))
    for prompt in range(min(limit, SPEED_PROMPTS)):
        for keep in SPEED_KEEPS:
            if (keep, prompt) in log:
                continue
            about = {"keep": keep}, tokens_of(model, prompt), SPEED_TOKENS
            contest = checked_speed.CheckedContest(model, *about)
            case = checked_speed.measure(contest, SPEED_CHECKS, BANDWIDTHS)
            log.add(case.report() | {"keep": keep, "prompt": prompt})


def speed_settings() -> dict[str, Any]:
    """Return what decides the results of speed."""
    about = {"tokens": SPEED_TOKENS, "checks": list(SPEED_CHECKS)}
    return about | {"bandwidths": list(BANDWIDTHS)}


# Memory


def measure_memory(scratch: Path, results: Path, limit: int) -> None:
    """Answer under a limit of memory, if that was not done yet."""
    file = results / "memory.json"
    if file.exists():
        return
    found = memory.measure(scratch)
    with new_file(file) as partial:
        partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


PARTS = {"answers": measure_answers, "speed": measure_speed, "memory": measure_memory}


def main(argv: list[str] | None = None) -> None:
    """Measure what is not measured yet, and write the page."""
    parser = argparse.ArgumentParser(description="Measure checked answers.")
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    add("--limit", type=int, default=len(PROMPTS), help="prompts; default: all")
    add("--scratch", type=Path, default=MODELS / "checking", help="for models; stays")
    add("--results", type=Path, default=report.RESULTS)
    args = parser.parse_args(argv)
    args.scratch.mkdir(parents=True, exist_ok=True)
    args.results.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        PARTS[part](args.scratch, args.results, args.limit)
    if args.results == report.RESULTS:
        report.write()
    else:
        print(*report.tables(args.results).values(), sep="\n\n")


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
