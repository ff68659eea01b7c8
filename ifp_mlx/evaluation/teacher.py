"""Teacher-forced quality: every model reads the same prompt and the same answer."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..model.checkpoint import IFPModel
from ..selection import scores
from ..selection.masks import Selection
from ..selection.request import Check, Request
from ..selection.widths import Allocation
from ..slicing.masked import mask_model, set_masks
from ..slicing.stock import log_softmax, prefill
from .rows import Row

METRICS = ("nll", "kl", "agreement")
PREFILL_STEP = 512
Prefill = Literal["compact", "dense"]


@dataclass(frozen=True)
class Setting:
    """One way of selecting, to be compared with others.

    Attributes:
        selector: where the scores come from.
        keep: kept share of the units.
        allocation: how they are spread over the layers.
        prefill: which model reads the prompt.
        bits: to which the compact model is quantised, or ``None``.
        compensate: whether kept channels make up for dropped ones, fitted to the text
            that selects.
        check: how the whole model checks generated answers. With any value, also
            ``off``, answers are made as ``generate`` makes them; with ``None`` the
            compact model alone reads the question and answers.
    """

    selector: str
    keep: float
    allocation: Allocation
    prefill: Prefill = "compact"
    bits: int | None = None
    compensate: bool = False
    check: Check | None = None

    def request(self, tokens: Sequence[int], seed: int = 0) -> Request:
        """Return the request for this setting, to select by a prompt's tokens."""
        return Request(
            instruction=list(tokens),
            keep=self.keep,
            selector=self.selector,
            allocation=self.allocation,
            compensate=self.compensate,
            seed=seed,
            check="off" if self.check is None else self.check,
        )

    @property
    def name(self) -> str:
        """What tables and logs call it."""
        return f"{self.label}, {self.prefill} prompt"

    @property
    def label(self) -> str:
        """The same without the prompt."""
        parts = f"{self.selector}, keep {self.keep:g}, {self.allocation}"
        parts += ", compensated" if self.compensate else ""
        parts += "" if self.check is None else f", check {self.check}"
        return parts if self.bits is None else f"{parts}, {self.bits} bits"


class Reference(NamedTuple):
    """The dense model's reading of a row.

    Attributes:
        log_probabilities: at each token of the answer, ``[A, V]``.
        cache: its cache after the prompt, or ``None`` if it was not kept.
    """

    log_probabilities: mx.array
    cache: list[Any] | None


class Evaluator:
    """Holds one model whose masks change, so that nothing is loaded twice.

    Masked and sliced logits are equal by test, which makes this the quality of the
    compact model.

    Args:
        model: from :func:`ifp_mlx.load`; its dense weights stay in memory here.
    """

    def __init__(self, model: IFPModel) -> None:
        self.model = model
        self._dense = model.dense()
        self._masked = mask_model(self._dense, model.plan)
        self._ones = mx.ones((model.layers, 1))

    def reference(self, row: Row, *, keep_cache: bool = False) -> Reference:
        """Return what the dense model makes of a row.

        Args:
            row: ``A`` answer tokens.
            keep_cache: for :meth:`measure` with a dense prompt.
        """
        set_masks(self._masked, self._ones)
        if keep_cache:
            return read_row(self._dense, row)
        return Reference(log_probabilities(self._dense, row), None)

    def measure(
        self,
        row: Row,
        mask: mx.array,
        reference: Reference,
        prefill: Prefill = "compact",
    ) -> dict[str, float]:
        """Return the metrics of one row.

        Args:
            row: ``A`` answer tokens.
            mask: ``[L, F]``.
            reference: from :meth:`reference`, with its cache for a dense prompt.
            prefill: which model reads the prompt, its last token included; that model
                also predicts the first token of the answer.
        """
        return self.compare(row, self.masked(mask), reference, prefill)

    def masked(self, mask: mx.array) -> nn.Module:
        """Return the model under a mask, ``[L, F]``, until the next call of any kind."""
        set_masks(self._masked, mask)
        return self._dense

    def compare(
        self,
        row: Row,
        model: nn.Module,
        reference: Reference,
        prefill: Prefill = "compact",
    ) -> dict[str, float]:
        """Return the metrics of one row for another model.

        Args:
            row: ``A`` answer tokens.
            model: any mlx-lm model of the same tokens; for a dense prompt, one with
                the same attention.
            reference, prefill: see :meth:`measure`.
        """
        if prefill == "compact":
            found = log_probabilities(model, row)
        else:
            found = continued(model, row, reference)
        return metrics(row, found, reference.log_probabilities)

    def selections(
        self, row: Row, settings: Sequence[Setting], seed: int = 0
    ) -> Iterator[tuple[Setting, Selection]]:
        """Yield the selection of each setting that does not compensate; the row is read for
        scores once.
        """
        scores: dict[str, mx.array] = {}
        for setting in settings:
            if setting.compensate:
                continue
            name = setting.selector
            if name not in scores:
                set_masks(self._masked, self._ones)
                scores[name] = self._scores(row, name, scores, seed)
            selection = self.model.select(
                row.prompt,
                keep=setting.keep,
                selector=name,
                allocation=setting.allocation,
                scores=scores[name],
            )
            yield setting, selection

    def _scores(
        self, row: Row, name: str, known: dict[str, mx.array], seed: int
    ) -> mx.array:
        prior = self.model.prior
        if name == "blend" and prior is not None:
            if "activation" not in known:
                known["activation"] = self._scores(row, "activation", known, seed)
            unit = self.model.plan.unit
            return scores.blend_scores(known["activation"], prior, unit=unit)
        return self.model.scores(row.prompt, name, seed=seed, dense=self._dense)


def log_probabilities(model: nn.Module, row: Row) -> mx.array:
    """Return a model's log-probabilities at the answer, float32 ``[A, V]``.

    Logits are computed only there; for the rest of the prompt only the cache is.
    """
    cache = prefill(model, row.prompt[:-1], PREFILL_STEP)
    tokens = [row.prompt[-1], *row.answer[:-1]]
    return log_softmax(model(mx.array(tokens)[None], cache=cache)[0])


def read_row(model: nn.Module, row: Row) -> Reference:
    """Return a model's log-probabilities at the answer, ``[A, V]``, and its cache after
    the prompt, for :func:`continued`.
    """
    cache = prefill(model, row.prompt[:-1], PREFILL_STEP)
    first = log_softmax(model(mx.array(row.prompt[-1:])[None], cache=cache)[0])
    prompt = Reference(first, cache)
    return Reference(continued(model, row, prompt), cache)


def continued(model: nn.Module, row: Row, prompt: Reference) -> mx.array:
    """Return the log-probabilities at the answer, ``[A, V]``, of a model that goes on
    after another has read the prompt. The first row is the other's.

    Args:
        model: with the same attention as the other.
        row: ``A`` answer tokens.
        prompt: the other's reading of the row; its cache is not changed.
    """
    assert prompt.cache is not None, "the cache was to be kept"
    first = prompt.log_probabilities[:1]
    if len(row.answer) == 1:
        return first
    cache = copy.deepcopy(prompt.cache)
    rest = model(mx.array(row.answer[:-1])[None], cache=cache)[0]
    return mx.concatenate([first, log_softmax(rest)])


def metrics(row: Row, found: mx.array, reference: mx.array | None) -> dict[str, float]:
    """Return the metrics of a row's log-probabilities.

    Args:
        row: ``A`` answer tokens.
        found: ``[A, V]``.
        reference: the dense model's, ``[A, V]``, or ``None`` if its tokens are others.
    """
    truth = mx.array(row.answer)[:, None]
    values = {"nll": float(-mx.take_along_axis(found, truth, axis=-1).mean())}
    if reference is not None:
        kl = (mx.exp(reference) * (reference - found)).sum(axis=-1)
        same = found.argmax(axis=-1) == reference.argmax(axis=-1)
        values["kl"] = float(kl.mean())
        values["agreement"] = float(same.astype(mx.float32).mean())
    return values
