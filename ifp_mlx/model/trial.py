"""A model's first card: how much it bears to lose, tried on a few dialogues.

How far a model bears to have parts left out differs from model to model, and no check of one
selection on its own instruction tells: that has chosen the units. So a few dialogues that
select nothing else are tried, once for each model. Each question selects for itself, as
`generate` does by default; the compact model then reads the answer that stands there, from
the dense model's keys and values of the question, and at each token both say what comes next.
An answer of the dense model's own would take all of it in memory.
"""

import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.resources import files
from statistics import fmean
from time import perf_counter
from typing import Any

import mlx.core as mx
import numpy as np

from ..files.progress import CARD, ProgressBar, Stage
from ..selection.prompts import Message, encode, known_tokens
from . import sweep
from .agreement import says
from .card import GIVEN, Card, Point, fingerprint_of
from .decision import Decision

DIALOGUES = "trial.jsonl"
KIND = "short dialogues"
MOST_TOKENS = 64  # of an answer
# Decides how a share is selected by some tokens.
Decide = Callable[[Sequence[int], float], Decision]


def dialogues() -> list[list[Message]]:
    """Return the dialogues that ship with the package, written for it: a question and an
    answer each, none of them in the calibration text.
    """
    text = files("ifp_mlx").joinpath(DIALOGUES).read_text(encoding="utf-8")
    return [json.loads(line)["messages"] for line in text.splitlines()]


def tried(
    model: Any,
    shares: Sequence[float],
    decide: Decide,
    *,
    progress: ProgressBar = iter,
) -> Card:
    """Return a card of some shares, measured now.

    Each dialogue reads the model once, and once more for each share; about one dense layer
    is in memory above a compact model.

    Args:
        model: an :class:`ifp_mlx.model.checkpoint.IFPModel`.
        shares: of the units, below 1.
        decide: decides how a share is selected by some tokens.
        progress: wraps the iteration over dialogues.
    """
    start, chats = perf_counter(), dialogues()
    same: dict[float, list[bool]] = {share: [] for share in shares}
    kl: dict[float, list[float]] = {share: [] for share in shares}
    if decide([0], max(shares)).compensate:
        model.sketch(progress)  # computed once, which would take the first one long
    parts = [parts_of(model, chat) for chat in chats]
    for question, answer in progress(Stage(CARD, parts)):
        text = [*question, *answer[:-1]]
        kv, noted = sweep.read(model.source, text, len(answer))
        for share in shares:
            made = model.prepare(decide(question, share))
            said, found = says(made.model, noted, text, kv)
            same[share] += list(np.array(found.argmax(-1) == said.argmax(-1)))
            kl[share] += list(np.array((mx.exp(said) * (said - found)).sum(-1)))
            del made  # its memory is the next one's
    points = [
        Point(KIND, share, len(chats), fmean(same[share]), fmean(kl[share]))
        for share in shares
    ]
    return Card(
        model=model.name,
        unit=model.plan.unit,
        selector=decide([0], max(shares)).selector,
        fingerprint=fingerprint_of(model),
        tokens=len(same[shares[0]]),
        seconds=round(perf_counter() - start, 1),
        package=version("ifp_mlx"),
        points=tuple(points),
        dense_right={},
        answers=GIVEN,
    )


def parts_of(model: Any, dialogue: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Return the ids of a dialogue's question, ready to be answered, and of its answer.

    Raises:
        ValueError: on a token that the model has no embedding for.
    """
    question, answer = dialogue
    text = answer["content"]
    if not model.tokenizer.has_chat_template:
        text = f"\n\n{text}"
    ids = encode(model.tokenizer, text, special=False)[:MOST_TOKENS]
    return model.tokens_of([question]), known_tokens(ids, model.vocabulary)
