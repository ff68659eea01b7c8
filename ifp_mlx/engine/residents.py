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

from ..checking.whole import Whole
from ..decoding.kv import PLAIN, KVOptions
from ..model.agreement import check_agreement
from ..model.checkpoint import Compact, IFPModel
from ..model.decide import decide, with_instruction
from ..model.decision import Decision
from ..selection.masks import Selection
from ..selection.prompts import Prompt
from ..selection.request import Request
from ..slicing.sliced import share_core
from .errors import Cancelled, OutOfMemory, UnknownTask
from .events import CancelToken, Progress, Stage, Task
from .forms import (
    Held,
    Use,
    apart_of,
    moving_bytes,
    plain_of,
    promised,
    share,
    use_of,
    weigh,
)
from .lanes import mask_figures

Emit = Callable[[Progress], None]
REMEMBERED_BYTES = 64 << 20  # of selections made for requests without a task


class Shelf:
    """Selections and compact models of one large model; lives on the worker.

    Args:
        model: the large model.
        budget: bytes of compact models kept in memory; shared arrays count once.
        limit: bytes that no request may exceed, or ``None``.
        kv: how KV caches are kept.

    Attributes:
        in_use: returns the uses that are decoding; their models are freed last.
        read: gets the tokens that the dense model has read and its KV cache of them,
            where the whole model checks.
    """

    in_use: Callable[[], Iterable[Use]] = staticmethod(lambda: ())
    read: Callable[[Sequence[int], list[Any]], None] = staticmethod(lambda *_: None)

    def __init__(
        self,
        model: IFPModel,
        budget: int,
        limit: int | None,
        kv: KVOptions = PLAIN,
    ) -> None:
        self.model, self._limit = model, limit
        self.footprint = model.footprint.keeping(kv)
        self.residents = Residents(model, budget)
        self.named: dict[str, Selection] = {}
        self._remembered: OrderedDict[Any, Selection] = OrderedDict()

    def select(
        self,
        request: Request,
        messages: Prompt,
        emit: Emit,
        stop: CancelToken,
    ) -> Use:
        """Return what a request needs in memory. A selection is made once for each
        instruction; where the dense model reads that, the compact model is made at
        once, and kept.
        """
        if request.task is not None:
            if request.task not in self.named:
                known = ", ".join(sorted(self.named)) or "none is prepared"
                raise UnknownTask(f"There is no task {request.task!r} ({known}).")
            named = self.named[request.task]
            request = replace(request, task=None, selection=named)
        # Channels that follow an answer belong to that answer alone.
        asked = with_instruction(replace(request, reselect="off"), messages)
        measuring = reporting("card", emit, stop)
        decision = decide(asked, self.model, progress=measuring)
        if decision.selection is not None:
            return self.use(decision.selection, decision.checks)
        key = self._key(decision)
        if key not in self._remembered:
            self._calibrate(decision, reporting("calibrate", emit, stop))
            emit(Progress("select", 0, 0))
            progress = reporting("select", emit, stop)
            self._remembered[key] = self._choose(decision, progress)
        self._remembered.move_to_end(key)
        most = REMEMBERED_BYTES // (4 * self.model.layers * self.model.channels)
        while len(self._remembered) > max(16, most):
            self._remembered.popitem(last=False)
        selection = self._remembered[key]
        check_agreement(selection, decision.least)
        return self.use(selection, decision.checks)

    def use(self, selection: Selection, checked: bool = False) -> Use:
        """Return the use of a selection: what it needs in memory."""
        return use_of(self.model, selection, checked)

    def _key(self, decision: Decision) -> tuple:
        """Return what distinguishes a selection from those of other requests."""
        seed = decision.request.seed if decision.selector == "random" else None
        form = decision.compares and decision.checks  # the form that is compared
        how = decision.granularity, decision.compensate, form, seed
        return tuple(decision.tokens), decision.selector, tuple(decision.sizes), *how

    def _calibrate(self, decision: Decision, progress: Any) -> None:
        """Compute what is kept of the calibration text, if it is asked for and missing."""
        if decision.compensate:
            self.model.sketch(progress)
        elif decision.selector in ("prior", "blend"):
            self.model.known_prior(progress)

    def _choose(self, decision: Decision, progress: Any) -> Selection:
        if decision.reads:
            self._check_limit(sum(weigh(self.model, decision)))
            self._touch_used()
            made = self.residents.sweep(decision, progress)
            if decision.checks and made.kv is not None:
                self.read(decision.tokens, made.kv)
            return made.selection
        return self.model.selected(decision, progress=progress)

    def _touch_used(self) -> None:
        for used in self.in_use():
            if used in self.residents:
                self.residents.get(used)

    def load(self, use: Use, emit: Emit, stop: CancelToken) -> Held:
        """Return the compact model for a use, reading it if it is not there."""
        self.check_limit(use)
        self._touch_used()
        return self.residents.get(use, progress=reporting("channels", emit, stop))

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
        use = self.select(request, request.instruction or "", emit, stop)
        selected = time.perf_counter()
        if load:
            self.load(use, emit, stop)
        loaded = time.perf_counter()
        name = name or use.selection.identity
        self.named[name] = use.selection
        return self.task(name, select=selected - start, load=loaded - selected)

    def task(self, name: str, **seconds: float) -> Task:
        """Describe a named task."""
        if name not in self.named:
            raise UnknownTask(f"There is no task {name!r}; prepare it first.")
        selection = self.named[name]
        forms = [Use(selection, checked) for checked in (False, True)]
        return Task(
            name=name,
            channels=selection.channels,
            widths=tuple(selection.sizes),
            bytes=self.footprint.compact_bytes(selection),
            resident=any(form in self.residents for form in forms),
            info=selection.as_text(),
            seconds=seconds,
            **mask_figures(selection, promised(self.model, selection)),
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

    def mask(self, name: str | None, mask_id: str | None) -> np.ndarray:
        """Return the mask of a task or of any selection here, float32 ``[L, F]``."""
        if name is not None:
            self.task(name)
            return np.array(self.named[name].mask())
        known = (*self.named.values(), *self._remembered.values())
        for selection in (*known, *self.residents.selections):
            if selection.mask_id == mask_id:
                return np.array(selection.mask())
        raise UnknownTask(
            f"No selection {mask_id!r} is here any more; ask for it again."
        )

    def weigh(self, *uses: Use) -> int:
        """Return the bytes of the compact models for some uses, without loading them,
        and of the channels read in passing while one of them is checked.

        They share everything except their units; two forms of one selection also share
        most units.
        """
        shared = {use.selection.identity: use.shared for use in uses}
        own = {use.key: use.own for use in uses}
        passing = max((use.passing for use in uses), default=0)
        channels = sum(shared.values()) + sum(own.values())
        return self.footprint.core_bytes + channels + passing

    def check_limit(self, use: Use, tokens: int = 0, moving: bool = False) -> int:
        """Return the bytes that only one request needs: its KV cache, and channels that
        are exchanged for its answer alone.

        Args:
            use: of the request.
            tokens: of its prompt and its answer.
            moving: whether its answer exchanges channels (``reselect="drift"``).

        Raises:
            OutOfMemory: if they and the compact model exceed the limit.
        """
        own = self.footprint.kv_bytes(tokens)
        if use.checked:  # a rollback copies caches that overwrite themselves
            own += sum(c.bytes(tokens) for c in self.footprint.caches if c.window)
        if moving and use.checked:
            own += moving_bytes(self.model, use.selection)
        self._check_limit(self.weigh(use) - self.footprint.core_bytes + own)
        return own

    def _check_limit(self, more: int) -> None:
        """Refuse bytes that, with the core, exceed the limit."""
        needed = self.footprint.core_bytes + more
        if self._limit is not None and needed > self._limit:
            raise OutOfMemory(
                f"This needs {needed / 1e6:.0f} MB, more than the memory limit of "
                f"{self._limit / 1e6:.0f} MB; keep fewer {self.model.plan.unit}s, shorten "
                "the conversation, or raise the limit."
            )

    def unload(self) -> None:
        """Let all weights go; the selections stay."""
        self.residents.clear()
        for name in ("predictor", "prior"):
            self.model.__dict__.pop(name, None)


class Residents:
    """Compact models in memory, the least recently used let go first.

    Only their units differ: everything else is one set of arrays. The two forms of one
    selection share what they can.

    Args:
        model: the large model.
        budget: bytes of all of them together.
    """

    def __init__(self, model: IFPModel, budget: int) -> None:
        self._model, self._budget = model, budget
        self._held: OrderedDict[tuple[str, bool], Held] = OrderedDict()

    def __contains__(self, use: Use) -> bool:
        return use.key in self._held

    def get(self, use: Use, *, progress: Any = iter) -> Held:
        """Return the compact model for a use."""
        if use.key not in self._held:
            twin = self._twin(use)
            self._make_room(use.own + (0 if twin else use.shared))
            self._held[use.key] = self._made(use, twin, progress)
        self._held.move_to_end(use.key)
        self._make_room()
        return self._held[use.key]

    def sweep(self, decision: Decision, progress: Any) -> Compact:
        """Select and make the compact model in one pass, and keep it.

        Without a check, answers do not go on from the dense model's KV cache: else they
        would depend on which of two prompts with the same beginning came first.
        """
        self._make_room(weigh(self._model, decision)[0])
        made = self._model.prepare(decision, progress=progress)
        use = use_of(self._model, made.selection, made.whole is not None)
        if twin := self._twin(use):
            share(self._model, made.model, twin.model, use.selection)
        self._share_core(made.model)
        self._held[use.key] = Held(use, made.model, made.whole)
        self._make_room()
        return made

    def _made(self, use: Use, twin: Held | None, progress: Any) -> Held:
        model, selection = self._model, use.selection
        if twin is not None:
            other = apart_of if use.checked else plain_of
            made = other(model, selection, twin.model, progress=progress)
        elif use.checked:
            made = model.apart(selection, progress=progress)
        else:
            beside = self._nearest(selection)
            made = model.compact(selection, beside=beside, progress=progress)
        self._share_core(made)
        whole = Whole(model.source, made) if use.checked else None
        return Held(use, made, whole)

    def _share_core(self, made: nn.Module) -> None:
        """Let a model share everything except units with a model that is there."""
        if other := next(iter(self._held.values()), None):
            share_core(made, other.model, self._model.plan)

    def _twin(self, use: Use) -> Held | None:
        """Return the other form of a selection."""
        return self._held.get((use.selection.identity, not use.checked))

    def _nearest(self, selection: Selection) -> tuple[nn.Module, Selection] | None:
        """Return the plain resident that has most of a selection's units already."""
        plain = (held for held in self._held.values() if not held.use.checked)
        return max(
            ((held.model, held.use.selection) for held in plain),
            key=lambda one: common_units(one[1], selection),
            default=None,
        )

    def _make_room(self, more: int = 0) -> None:
        """Free models until ``more`` bytes fit; the newest stays, for its core."""
        while len(self._held) > 1 and self.nbytes + more > self._budget:
            self._held.popitem(last=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all the models' weights, each array counted once."""
        models = [held.model.parameters() for held in self._held.values()]
        wholes = [held.whole for held in self._held.values() if held.whole is not None]
        learned = [part.correction for whole in wholes for part in whole.parts]
        found = [w for _, w in tree_flatten([models, learned]) if w is not None]
        return sum({id(array): array.nbytes for array in found}.values())

    @property
    def selections(self) -> list[Selection]:
        """What the models keep."""
        return [held.use.selection for held in self._held.values()]

    def clear(self) -> None:
        """Let all of them go."""
        self._held.clear()


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
    """Give back memory that nothing refers to any more."""
    import gc

    gc.collect()
    mx.clear_cache()
