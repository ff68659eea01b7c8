"""Draft some tokens, check them together, go on from those that stand (are accepted).

One KV cache serves both models: entries of drafted tokens are removed before the dense
model reads these tokens, and only its keys and values stay. So every draft goes on from
the dense model's own cache.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..selection.request import MOST_DRAFTED
from ..slicing.stock import steps_of
from .drift import Drift, Move
from .rollback import Rollback
from .rule import Check, Rule
from .whole import Whole

WORTH_DRAFTING = 0.05  # draft a token if the chance that it is reached is at least this
MEMORY = 0.8  # weight of earlier checks, from one to the next
GUESS = (4.0, 6.0)  # assumed at first: tokens that stood, tokens that were judged


@dataclass
class Checks:
    """What checking took so far.

    Attributes:
        mode: ``exact``, or the tolerance.
        checks: passes of the dense model, without those over the prompt.
        drafted: tokens of the compact model.
        accepted: how many of them stood.
        bytes_read: bytes of dropped channels that were read, also for the prompt.
        prompt_bytes_read: how many of them for the prompt.
        moves: when other channels were chosen, and what that gained.
    """

    mode: Check
    checks: int = 0
    drafted: int = 0
    accepted: int = 0
    bytes_read: int = 0
    prompt_bytes_read: int = 0
    moves: list[Move] = field(default_factory=list)


class Checked(NamedTuple):
    """A token that stands.

    Attributes:
        token: its id.
        logprobs: the dense model's log-probabilities there, ``[V]``, not yet computed.
        from_draft: whether the compact model said it first.
    """

    token: int
    logprobs: mx.array
    from_draft: bool


@dataclass
class DraftLength:
    """How many tokens to draft: those that a check reaches with a chance of at least
    ``WORTH_DRAFTING``, going by the share of tokens that stood lately.

    Attributes:
        most: at most so many.
        least: at least so many.
    """

    most: int = MOST_DRAFTED
    least: int = 1
    _stood: float = field(default=GUESS[0], repr=False)
    _judged: float = field(default=GUESS[1], repr=False)

    def __call__(self) -> int:
        """Return how many tokens to draft now."""
        share = self._stood / self._judged
        worth = self.most
        if share < 1:
            worth = int(math.log(WORTH_DRAFTING) / math.log(max(share, 1e-6)))
        return min(self.most, max(self.least, worth))

    def note(self, stood: int, drafted: int) -> None:
        """Note how many tokens stood in a check; those after the first rejected one
        were not judged.
        """
        self._stood = MEMORY * self._stood + stood
        self._judged = MEMORY * self._judged + min(stood + 1, drafted)


class CheckedRun:
    """One answer of the compact model, checked by the whole one.

    Args:
        whole: both of them.
        prompt: token ids, one at least.
        rule: drafts and judges.
        length: says how many tokens to draft.
        cache: mlx-lm's KV cache of the dense model, or ``None``; it is changed.
        known: how many tokens of the prompt the cache has.
        follow: whether the kept channels follow what the answer uses
            (:mod:`ifp_mlx.checking.drift`): then the compact model changes.

    Attributes:
        tokens: prompt and answer so far.
        figures: what checking took so far.

    Raises:
        ValueError: if drafted tokens cannot be taken out of the model's KV cache again,
            or with ``follow`` if the kept channels cannot be exchanged.
    """

    def __init__(
        self,
        whole: Whole,
        prompt: Sequence[int],
        rule: Rule,
        length: DraftLength | None = None,
        cache: list[Any] | None = None,
        known: int = 0,
        follow: bool = False,
    ) -> None:
        from mlx_lm.models.cache import make_prompt_cache

        self.whole, self.rule = whole, rule
        self.length = length or DraftLength()
        self.cache = make_prompt_cache(whole.model) if cache is None else cache
        self._past = Rollback(self.cache)
        self.tokens, self.known = list(prompt), known
        self.figures = Checks(rule.check)
        self._drift = Drift(whole) if follow else None
        self._asked = len(self.tokens)

    def prefill(self, step: int = 0) -> Iterator[int]:
        """Let the dense model read all but the last token of the prompt, and yield how
        many it has read after each step.

        Args:
            step: tokens at a time; default: mlx-lm's. Each step reads all dropped
                channels once.
        """
        left = self.tokens[self.known : -1]
        for part in steps_of(left, step):
            with self._past.marked():
                self._read(part, self._past.noting(), last=0)
            self.known += len(part)
            if self._drift is not None:
                self._drift.prefilled()
            yield self.known
        self.figures.prompt_bytes_read = self.figures.bytes_read

    def check(self, most: int, ends: Collection[int] = ()) -> list[Checked]:
        """Draft and check once, and return the tokens that stand.

        Args:
            most: tokens that are wanted at most, 1 at least.
            ends: tokens after which nothing follows.
        """
        last = self.tokens[-1]
        with self._past.marked():
            drafted = self._drafted(last, min(self.length(), most - 1), ends)
            self._past.back()
        if self._drift is not None:
            self._drift.decide(len(self.tokens) - self._asked)
        with self._past.marked():
            read = [last, *drafted]
            logits = self._read(read, self._past.noting(), last=len(read))
            logits = self.rule.decoding.processed(logits, self.tokens + drafted)
            stand, following = self.rule.judge(drafted, logits)
            self._past.keep(stand + 1, len(read))
        logprobs = nn.log_softmax(logits, axis=-1)
        said = [*drafted[:stand], following]
        if stand and drafted[stand - 1] in ends:
            said.pop()
        self.known += stand + 1
        self.tokens += said
        self.figures.checks += 1
        self.figures.drafted += len(drafted)
        self.figures.accepted += stand
        if self._drift is not None:
            self._drift.note(stand + 1, len(drafted) - stand)
            self.figures.moves = self._drift.moves
        if drafted:
            self.length.note(stand, len(drafted))
        return [Checked(t, logprobs[n], n < stand) for n, t in enumerate(said)]

    def _drafted(self, last: int, most: int, ends: Collection[int]) -> list[int]:
        """Return what the compact model says next."""
        self.rule.begin()
        drafted: list[int] = []
        read, token = 0, mx.array([last])
        lazily = self.rule.greedy and not self.rule.decoding.all_processors
        said = []
        while read < most:
            logits = self.whole.model(token[None], cache=self.cache)[0]
            read += 1
            if lazily:  # the next step need not wait for this one
                token = self.rule.draft(logits)
                mx.async_eval(token)
                said.append(token)
                continue
            logits = self.rule.decoding.processed(logits, self.tokens + drafted)
            token = self.rule.draft(logits)
            drafted.append(int(np.array(token)[0]))
            if drafted[-1] in ends:
                break
        if lazily and said:
            drafted = np.array(mx.concatenate(said)).tolist()
            end = next((n for n, t in enumerate(drafted) if t in ends), len(drafted))
            drafted = drafted[: end + 1]
        return drafted

    def _read(self, tokens: list[int], cache: list[Any], last: int) -> mx.array:
        """Return the dense model's logits at the last of some tokens, ``[last, V]``, and
        note the bytes: other runs may read with the same model in between.
        """
        before = self.whole.bytes_read
        logits = self.whole(mx.array([tokens]), cache, last=last)[0]
        self.figures.bytes_read += self.whole.bytes_read - before
        return logits
