"""What an engine has prepared: selections by name, compact models within a budget."""

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..model.agreement import check_agreement
from ..model.checkpoint import IFPModel
from ..model.decide import decide, with_instruction
from ..model.decision import Decision
from ..selection.masks import Selection
from ..selection.prompts import Prompt
from ..selection.request import Request
from ..slicing.sliced import share_core
from .errors import Cancelled, OutOfMemory, UnknownTask
from .events import CancelToken, Progress, Stage, Task
from .lanes import mask_figures

Emit = Callable[[Progress], None]
REMEMBERED_BYTES = 64 << 20  # of selections of nameless instructions


class Shelf:
    """Selections and compact models of one large model; lives on the worker.

    Args:
        model: the large model.
        budget: bytes of compact models kept in memory, what they share once.
        limit: bytes that no request may exceed, or ``None``.

    Attributes:
        in_use: returns the selections that are being decoded with, whose models are
            the last to be let go.
    """

    in_use: Callable[[], Iterable[Selection]] = staticmethod(lambda: ())

    def __init__(self, model: IFPModel, budget: int, limit: int | None) -> None:
        self.model, self._limit = model, limit
        self.footprint = model.footprint
        self.residents = Residents(model, budget, self.footprint.channel_bytes)
        self.named: dict[str, Selection] = {}
        self._remembered: OrderedDict[Any, Selection] = OrderedDict()

    def select(
        self,
        request: Request,
        messages: Prompt,
        emit: Emit,
        stop: CancelToken,
        load: bool = True,
    ) -> Selection:
        """Return the selection of a request, made once for each instruction.

        Where the dense model reads that, the compact model is made on the way, unless
        it is not to be loaded.
        """
        if request.task is not None:
            if request.task not in self.named:
                known = ", ".join(sorted(self.named)) or "none is prepared"
                raise UnknownTask(f"There is no task {request.task!r} ({known}).")
            named = self.named[request.task]
            request = replace(request, task=None, selection=named)
        decision = decide(with_instruction(request, messages), self.model)
        if decision.selection is not None:
            return decision.selection
        key = self._key(decision)
        if key not in self._remembered:
            emit(Progress("select", 0, 0))
            progress = reporting("select", emit, stop)
            self._remembered[key] = self._choose(decision, progress, load)
        self._remembered.move_to_end(key)
        most = REMEMBERED_BYTES // (4 * self.model.layers * self.model.channels)
        while len(self._remembered) > max(16, most):
            self._remembered.popitem(last=False)
        selection = self._remembered[key]
        if decision.compares:
            check_agreement(selection, decision.request.min_agreement)
        return selection

    def _key(self, decision: Decision) -> tuple:
        """Return what tells a selection from those of other requests."""
        seed = decision.request.seed if decision.selector == "random" else None
        chosen = decision.selector, tuple(decision.sizes), decision.granularity
        how = decision.compensate, decision.compares, seed
        return tuple(decision.tokens), *chosen, *how

    def _choose(self, decision: Decision, progress: Any, load: bool) -> Selection:
        if decision.reads and load:
            self.check_limit(decision.sizes)
            self._touch_used()
            return self.residents.sweep(decision, progress)
        return self.model.selected(decision, progress=progress)

    def _touch_used(self) -> None:
        for used in self.in_use():
            self.residents.get(used)

    def load(self, selection: Selection, emit: Emit, stop: CancelToken) -> nn.Module:
        """Return the compact model of a selection, reading it if it is not there."""
        self.check_limit(selection)
        self._touch_used()
        return self.residents.get(selection, progress=reporting("channels", emit, stop))

    def prepare(
        self,
        name: str | None,
        request: Request,
        emit: Emit,
        stop: CancelToken,
        load: bool = True,
    ) -> Task:
        """Select and load under a name (default: the identity); see ``Engine``."""
        start = time.perf_counter()
        selection = self.select(request, request.instruction or "", emit, stop, load)
        selected = time.perf_counter()
        if load:
            self.load(selection, emit, stop)
        loaded = time.perf_counter()
        name = name or selection.identity
        self.named[name] = selection
        return self.task(name, select=selected - start, load=loaded - selected)

    def task(self, name: str, **seconds: float) -> Task:
        """Describe a named task."""
        if name not in self.named:
            raise UnknownTask(f"There is no task {name!r}; prepare it first.")
        selection = self.named[name]
        return Task(
            name=name,
            channels=selection.channels,
            widths=tuple(selection.sizes),
            bytes=self.weigh(selection),
            resident=selection.identity in self.residents,
            info=selection.as_text(),
            seconds=seconds,
            **mask_figures(selection),
        )

    def tasks(self) -> list[Task]:
        """Describe all named tasks."""
        return [self.task(name) for name in sorted(self.named)]

    def forget(self, name: str) -> None:
        """Take a name away."""
        self.task(name)
        del self.named[name]

    def save(self, name: str, path: str | os.PathLike[str]) -> None:
        """Write a task's mask file."""
        self.task(name)
        self.named[name].save(path)

    def mask(self, name: str) -> np.ndarray:
        """Return a task's mask, float32 ``[L, F]``."""
        self.task(name)
        return np.array(self.named[name].mask())

    def weigh(self, *selections: Selection | Sequence[int]) -> int:
        """Return the bytes of the compact models of selections, or of so many units
        in each layer, without loading them.

        They share all but their units.
        """
        channels = sum(map(self.footprint.channel_bytes, selections))
        return self.footprint.core_bytes + channels

    def check_limit(self, selection: Selection | Sequence[int], tokens: int = 0) -> int:
        """Return the bytes of the KV cache of a request.

        Args:
            selection: of the request, or what it keeps of each layer.
            tokens: of its prompt and its answer.

        Raises:
            OutOfMemory: if they and the compact model exceed the limit.
        """
        kv_bytes = self.footprint.kv_bytes(tokens)
        needed = self.weigh(selection) + kv_bytes
        if self._limit is not None and needed > self._limit:
            raise OutOfMemory(
                f"This needs {needed / 1e6:.0f} MB, more than the memory limit of "
                f"{self._limit / 1e6:.0f} MB; keep fewer {self.model.plan.unit}s, shorten "
                "the conversation, or raise the limit."
            )
        return kv_bytes

    def unload(self) -> None:
        """Let all weights go; the selections stay."""
        self.residents.clear()
        for name in ("predictor", "prior"):
            self.model.__dict__.pop(name, None)


class Residents:
    """Compact models in memory, the least recently used let go first.

    Only their units differ: all else is one set of arrays.

    Args:
        model: the large model.
        budget: bytes of all of them together.
        channel_bytes: returns the bytes that a selection adds, or that so many units
            of each layer do.
    """

    def __init__(
        self, model: IFPModel, budget: int, channel_bytes: Callable[[Any], int]
    ) -> None:
        self._model, self._budget, self._adds = model, budget, channel_bytes
        self._models: OrderedDict[str, tuple[nn.Module, Selection]] = OrderedDict()

    def __contains__(self, identity: str) -> bool:
        return identity in self._models

    def get(self, selection: Selection, *, progress: Any = iter) -> nn.Module:
        """Return the selection's compact model."""
        if selection.identity not in self._models:
            self._make_room(self._adds(selection))
            compact = self._model.compact(
                selection, beside=self._nearest(selection), progress=progress
            )
            self._models[selection.identity] = compact, selection
        self._models.move_to_end(selection.identity)
        self._make_room()
        return self._models[selection.identity][0]

    def sweep(self, decision: Decision, progress: Any) -> Selection:
        """Select and make the compact model in one pass, and keep it.

        The dense model's KV cache is not kept: answers would depend on which of two
        prompts that begin alike came first.
        """
        self._make_room(self._adds(decision.sizes))
        made = self._model.prepare(decision, progress=progress)
        other = next(iter(self._models.values()), None)
        if other is not None:
            share_core(made.model, other[0], self._model.plan)
        self._models[made.selection.identity] = made.model, made.selection
        self._make_room()
        return made.selection

    def _nearest(self, selection: Selection) -> tuple[nn.Module, Selection] | None:
        """Return the resident that has most of a selection's units already."""
        return max(
            self._models.values(),
            key=lambda one: common_units(one[1], selection),
            default=None,
        )

    def _make_room(self, more: int = 0) -> None:
        """Let models go until ``more`` bytes fit; the newest stays, for its core."""
        while len(self._models) > 1 and self.nbytes + more > self._budget:
            self._models.popitem(last=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all the models' weights, each array counted once."""
        models = [model.parameters() for model, _ in self._models.values()]
        return sum({id(w): w.nbytes for _, w in tree_flatten(models)}.values())

    def clear(self) -> None:
        """Let all of them go."""
        self._models.clear()


def common_units(one: Selection, other: Selection) -> int:
    """Return how many units both keep, in all layers together."""
    pairs = zip(one.indices, other.indices, strict=True)
    return sum(np.intersect1d(np.array(a), np.array(b)).size for a, b in pairs)


def reporting(
    stage: Stage, emit: Emit, stop: CancelToken
) -> Callable[[Iterable], Iterator]:
    """Return a wrapper of iterations that reports each step and can be cancelled."""

    def report(items: Iterable) -> Iterator:
        steps = list(items)
        for number, item in enumerate(steps):
            emit(Progress(stage, number, len(steps)))
            if stop.cancelled:
                raise Cancelled(f"Cancelled after {number} of {len(steps)}: {stage}.")
            yield item
        emit(Progress(stage, len(steps), len(steps)))

    return report


def clear_memory() -> None:
    """Give back what nothing refers to any more."""
    import gc

    gc.collect()
    mx.clear_cache()
