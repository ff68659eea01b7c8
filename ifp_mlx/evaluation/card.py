"""Measure a model's card: what leaving parts out of it costs on the package's own prompts.

The dense model answers each prompt greedily. Each prompt then selects for itself at
every keep, as `generate` selects by default. The compact model reads the dense model's
answer where its own would begin: after the dense model's keys and values of the prompt.
For a prompt whose answer can be checked, it also generates an answer of its own.
"""

import copy
import hashlib
import json
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..files.progress import ProgressBar
from ..model.card import Card, Point, fingerprint_of
from ..model.checkpoint import Compact, IFPModel
from ..model.decide import decide
from ..model.dense_prefill import Reading, read_densely
from ..selection.prompts import as_messages
from ..selection.request import Request
from ..slicing.stock import log_softmax
from .log import Line, Log
from .rows import Row
from .tables import markdown
from .teacher import log_probabilities, metrics

PROMPTS = "card.jsonl"
KEEPS = (0.9, 0.75, 0.6, 0.5, 0.4, 1 / 3)
KEY = ("prompt", "keep")
MAX_TOKENS, LONG_TOKENS = 48, 128
LONG = "long"
DENSE = 1.0  # as a keep


@dataclass(frozen=True)
class CardPrompt:
    """A prompt of the card.

    Attributes:
        name: its kind and number.
        kind: ``reading``, ``instruction``, ``maths``, ``code`` or ``long``.
        prompt: a user's message.
        expect: an answer that has one of these is right; none if it cannot be checked.
    """

    name: str
    kind: str
    prompt: str
    expect: tuple[str, ...] = ()

    @property
    def max_tokens(self) -> int:
        """Most tokens of its answer."""
        return LONG_TOKENS if self.kind == LONG else MAX_TOKENS

    def right(self, answer: str) -> bool | None:
        """Whether an answer has what is expected, as a word or number of its own."""
        if not self.expect:
            return None
        text = re.sub(r"(?<=\d),(?=\d{3})", "", answer)
        found = (rf"(?<![\w.]){re.escape(word)}(?!\w|\.\d)" for word in self.expect)
        return any(re.search(pattern, text, re.IGNORECASE) for pattern in found)


def card_prompts() -> list[CardPrompt]:
    """Return the prompts that ship with the package, written for it."""
    text = files("ifp_mlx").joinpath(PROMPTS).read_text(encoding="utf-8")
    prompts: list[CardPrompt] = []
    for fields in map(json.loads, text.splitlines()):
        kind = fields["kind"]
        number = sum(prompt.kind == kind for prompt in prompts) + 1
        expect = tuple(fields.get("expect", ()))
        prompts.append(CardPrompt(f"{kind} {number}", kind, fields["prompt"], expect))
    return prompts


def settings_of(model: IFPModel, prompts: Sequence[CardPrompt]) -> Line:
    """Return the settings that the lines of a card's log depend on."""
    shown = repr([(p.prompt, p.expect, p.max_tokens) for p in prompts])
    return {
        "card of": model.name,
        "fingerprint": fingerprint_of(model),
        "prompts": hashlib.sha256(shown.encode()).hexdigest()[:16],
        "ifp_mlx": version("ifp_mlx"),
    }


def measured_keeps(model: IFPModel, keeps: Sequence[float] | None) -> list[float]:
    """Return the keeps below 1 that a layer of a model can have, largest first.

    Args:
        model: from :func:`ifp_mlx.load`.
        keeps: shares of the units; default: those of :data:`KEEPS` that the model can
            run with.

    Raises:
        ValueError: if the model cannot keep such a share, or none is below 1.
    """
    smallest = model.footprint.smallest
    wanted = keeps or [k for k in KEEPS if k * model.channels >= smallest]
    sizes = {decide(_request([0], keep), model).size for keep in wanted}
    if not (below := sorted(sizes - {model.channels}, reverse=True)):
        raise ValueError(
            f"keep {', '.join(f'{keep:.3g}' for keep in wanted)} leaves nothing out of "
            f"{model.path}, so there is nothing to measure; give smaller shares."
        )
    return [size / model.channels for size in below]


def measure(
    model: IFPModel,
    prompts: Sequence[CardPrompt],
    keeps: Sequence[float],
    log: Log,
    *,
    progress: ProgressBar = iter,
) -> Card:
    """Measure what is missing in the log, and return the card of all of it.

    Args:
        model: from :func:`ifp_mlx.load`; its dense weights stay in memory here.
        prompts: from :func:`card_prompts`.
        keeps: from :func:`measured_keeps`.
        log: results so far, with the key :data:`KEY` and :func:`settings_of`.
        progress: wraps the iteration over prompts.
    """
    dense: nn.Module | None = None
    if model.plan.unit == "channel" and model.predictor is None:
        model.known_prior(progress)  # first: the default selection depends on it
    for prompt in progress(prompts):
        todo = [keep for keep in keeps if (prompt.name, keep) not in log]
        if todo or (prompt.name, DENSE) not in log:
            dense = dense or model.dense()
            _measure_prompt(model, dense, prompt, todo, log)
    chosen = {prompt.name for prompt in prompts}
    at = {DENSE, *keeps}
    lines = [
        line
        for (name, keep), line in log.lines.items()
        if name in chosen and keep in at
    ]
    return card_of(model, lines)


def _measure_prompt(
    model: IFPModel,
    dense: nn.Module,
    prompt: CardPrompt,
    keeps: Iterable[float],
    log: Log,
) -> None:
    """Log the dense model's answer, and how each keep agrees with it."""
    tokens = model.tokens_of(as_messages(prompt.prompt))
    if (prompt.name, DENSE) not in log:
        start = time.perf_counter()
        ids, text = _answer(dense, model.tokenizer, tokens, None, prompt.max_tokens)
        line = _line(prompt, DENSE, ids, text, time.perf_counter() - start)
        log.add(line | {"agreement": 1.0, "kl": 0.0, "ids": ids})
    row = Row(tokens, log.lines[prompt.name, DENSE]["ids"])
    reference = log_probabilities(dense, row)
    for keep in keeps:
        log.add(_compared(model, prompt, keep, row, reference))


def _compared(
    model: IFPModel, prompt: CardPrompt, keep: float, row: Row, reference: mx.array
) -> Line:
    """Return the line of one prompt at one keep."""
    start = time.perf_counter()
    decision = decide(_request(prompt.prompt, keep), model)
    made = model.prepare(decision)
    reading = read_densely(made.kv, decision.tokens, row.prompt, None)
    found = metrics(row, _continued(made, reading, row), reference)
    ids, text = row.answer, None
    if prompt.expect:
        left = row.prompt[reading.tokens :]
        about = made.model, model.tokenizer, left, reading.kv
        ids, text = _answer(*about, prompt.max_tokens)
    line = _line(prompt, keep, ids, text, time.perf_counter() - start)
    origin = made.selection.origin
    return line | {
        "compared": len(row.answer),
        "agreement": found["agreement"],
        "kl": found["kl"],
        "self_agreement": origin.agreement,
        "self_kl": origin.kl,
        "selector": decision.selector,
        "allocation": decision.allocation,
        "prompt_tokens": len(row.prompt),
    }


def _line(
    prompt: CardPrompt, keep: float, ids: list[int], text: str | None, seconds: float
) -> Line:
    return {
        "prompt": prompt.name,
        "kind": prompt.kind,
        "keep": keep,
        "tokens": len(ids),
        "text": text,
        "right": None if text is None else prompt.right(text),
        "seconds": round(seconds, 3),
    }


def _request(instruction: Any, keep: float) -> Request:
    return Request(instruction=instruction, keep=keep)


def _continued(made: Compact, reading: Reading, row: Row) -> mx.array:
    """Return a compact model's log-probabilities at the answer, float32 ``[A, V]``, where
    it goes on from what the dense model has read.
    """
    from mlx_lm.models.cache import make_prompt_cache

    cache = (
        copy.deepcopy(reading.kv) if reading.tokens else make_prompt_cache(made.model)
    )
    tokens = [*row.prompt[reading.tokens :], *row.answer[:-1]]
    logits = made.model(mx.array(tokens)[None], cache=cache)
    return log_softmax(logits[0, -len(row.answer) :])


def _answer(
    model: nn.Module, tokenizer: Any, tokens: list[int], kv: Any, max_tokens: int
) -> tuple[list[int], str]:
    """Return the ids and the text of a model's own greedy answer.

    Args:
        model: dense or compact.
        tokenizer: mlx-lm's.
        tokens: of the prompt, those in ``kv`` left out.
        kv: the cache to go on from, or ``None``; it is changed.
        max_tokens: of the answer, at most.
    """
    from mlx_lm import stream_generate

    options = {} if kv is None else {"prompt_cache": kv}
    steps = list(
        stream_generate(model, tokenizer, tokens, max_tokens=max_tokens, **options)
    )
    return [step.token for step in steps], "".join(step.text for step in steps)


def card_of(model: IFPModel, lines: Sequence[Line]) -> Card:
    """Return the card of some lines of a log, all for the same prompts."""
    groups: dict[tuple[str, float], list[Line]] = {}
    for line in sorted(lines, key=lambda line: -line["keep"]):
        groups.setdefault((line["kind"], line["keep"]), []).append(line)
    points = tuple(
        Point(
            kind,
            keep,
            len(some),
            *(_pooled(some, name) for name in ("agreement", "kl")),
            *(_mean(some, name) for name in ("self_agreement", "self_kl", "right")),
        )
        for (kind, keep), some in groups.items()
        if keep != DENSE
    )
    dense = {
        kind: _mean(some, "right") for (kind, k), some in groups.items() if k == DENSE
    }
    selectors = dict.fromkeys(
        line["selector"] for line in lines if line["keep"] != DENSE
    )
    return Card(
        model=model.name,
        unit=model.plan.unit,
        selector=", ".join(selectors),
        fingerprint=fingerprint_of(model),
        tokens=sum(line["tokens"] for line in lines if line["keep"] == DENSE),
        seconds=round(sum(line["seconds"] for line in lines), 1),
        package=version("ifp_mlx"),
        points=points,
        dense_right={kind: share for kind, share in dense.items() if share is not None},
    )


def _pooled(lines: Sequence[Line], name: str) -> float:
    """Return the mean over all tokens of some answers: a short one counts less."""
    return float(
        np.average(
            [line[name] for line in lines],
            weights=[line["compared"] for line in lines],
        )
    )


def _mean(lines: Sequence[Line], name: str) -> Any:
    """Return the mean of the known values of some lines; ``None`` if there are none."""
    values = [line[name] for line in lines if line[name] is not None]
    return float(np.mean(values)) if values else None


def report(card: Card) -> str:
    """Return a card as Markdown: how far answers agree, and how many are right."""
    keeps = card.keeps()[::-1]
    at = {(point.kind, point.keep): point for point in card.points}
    head = ["", *(f"{keep:.2g}" for keep in keeps)]
    rows = [[k, *(_agreement(at[k, keep]) for keep in keeps)] for k in card.kinds]
    rows.append(["mean", *(f"{card.promise(keep):.0%}" for keep in keeps)])
    parts = [
        f"{card.model}: {card.sample}; "
        f"each prompt selects {card.unit}s for itself ({card.selector}). By the kept "
        "share: how often the compact model would choose the same token, and the KL to "
        "the dense model, nats a token.",
        markdown(head, rows),
    ]
    checkable = list(card.dense_right)
    if checkable:
        right = [
            [k, f"{card.dense_right[k]:.0%}"]
            + [f"{at[k, keep].right:.0%}" for keep in keeps]
            for k in checkable
        ]
        parts += [
            "Answers with what is expected in them, dense and by the kept share:",
            markdown(["", "dense", *head[1:]], right),
        ]
    return "\n\n".join(parts)


def _agreement(point: Point) -> str:
    return f"{point.agreement:.0%}, {point.kl:.2f}"
