"""The whole model computed with a part of it in memory; the rest is read in passing.

The kept channels of every layer are in memory, in the compact model. When the whole one
is to read some tokens, the dropped channels of one layer after the other are read from
where they are, used for all the tokens, and let go; the next layer's are read
meanwhile. An FFN's output is the sum of both parts: the dense model's own, up to the
order of addition.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..slicing.apart import Apart, linear_of
from ..slicing.compensation import evidence, learned
from ..slicing.reading import FFN_STEP, computed_by
from ..slicing.shapes import LayerPlan, Plan, at
from ..slicing.sliced import elements, gathered, sliced_names, tensors_along
from ..slicing.stock import logits_at, standing_in
from ..storage.device import FEWEST_BYTES
from ..storage.folder import Folder
from ..storage.units import Wanted


class Whole:
    """The whole model, beside the compact one it is made of.

    Args:
        source: where the weights are.
        model: the compact model, its parts apart (:mod:`ifp_mlx.slicing.apart`).
        room: bytes in which dropped channels may stay in memory: those of the first
            layers, which could not be read ahead.

    Attributes:
        model: the compact model.
        plan: of both.
        parts: what the inlet of each layer does with the kept channels.
        visits_once: whether a forward pass goes through each layer once.
        held: the modules of layers whose dropped channels are in memory for good.
    """

    def __init__(self, source: Folder, model: nn.Module, room: int = 0) -> None:
        self.source, self.model, self.plan = source, model, source.plan
        self.parts = parts_of(model, self.plan)
        self._passing_plan = _without_whole_inlets(self.plan, self.parts)
        self._reader = source.reader_of(self._passing_plan, FEWEST_BYTES)
        self._kept = self.plan.modules(model)
        self._order = source.order
        self.visits_once = len({*self._order}) == len(self._order)
        self._shells = self.plan.modules(source.open())
        self._coming: list[mx.array] | None = None
        self._reading = 0  # tokens being read now
        self.held: dict[int, nn.Module] = {}
        self._hold(room)

    @property
    def bytes_read(self) -> int:
        """Bytes that were asked of the system so far, for dropped channels."""
        return self._reader.bytes_read

    @property
    def throttle(self) -> Callable[[int, float], None]:
        """See :class:`ifp_mlx.storage.units.UnitReader`."""
        return self._reader.throttle

    @throttle.setter
    def throttle(self, throttle: Callable[[int, float], None]) -> None:
        self._reader.throttle = throttle

    @property
    def dense_bytes(self) -> int:
        """Bytes of all channels of all layers: what streaming reads for each token."""
        names = sum(sliced_names(self.source.skeleton, self.plan), [])
        weights = tree_flatten(self.source.skeleton.parameters(), destination={})
        return sum(weights[name].nbytes for name in names)

    def __call__(
        self, tokens: mx.array, cache: Sequence[Any], last: int = 1
    ) -> mx.array:
        """Return the dense model's logits, ``[B, last, V]``, computed.

        Args:
            tokens: ``[B, T]``.
            cache: mlx-lm's KV cache; the tokens' keys and values are put in.
            last: at how many of the last tokens; 0 leaves the output layer out.

        Raises:
            OSError: if the dropped channels cannot be read.
            ValueError: if a record of them is damaged.
        """
        self._reading, count = tokens.size, tokens.shape[1]
        cut: Any = nullcontext(lambda logits: logits[:, count - last :])
        if 0 < last < count:
            cut = logits_at(self.model, mx.arange(count - last, count))
        with cut as some, computed_by(self.model, self.plan, self._visits()):
            logits = some(self.model(tokens, cache=cache))
            # For no tokens, compute none: a quantised output layer would divide by 0.
            mx.eval(logits if last else [], [layer.state for layer in cache])
        self._coming = None
        return logits

    def exchange(self, indices: Sequence[mx.array]) -> None:
        """Let the next call exchange the channels of the compact model.

        That call has all channels in memory, one layer at a time. How the new ones make
        up for those then dropped is learned from the tokens that :class:`Apart`
        remembers.

        Args:
            indices: of every layer, int32 ``[k_l]``, sorted, as many as it has now.
        """
        self._coming = list(indices)

    def _visits(self) -> Callable[..., Any]:
        """Return what computes the layers' modules in one forward pass."""
        passing = [layer for layer in self._order if self._passes(layer)]
        arriving = self._arrivals(passing)

        def visit(layer: int, x: mx.array, *args: Any, **kwargs: Any) -> Any:
            mx.eval(x)
            if not self._passes(layer):
                other = self.held.get(layer)
                output = self._computed(layer, other, x, *args, **kwargs)
                self._exchange(layer, other)
                return output
            came = next(arriving)
            assert came == layer
            output = self._computed(layer, self._shells[layer], x, *args, **kwargs)
            self._exchange(layer, self._shells[layer])
            self._let_go(layer)
            return output

        return visit

    def _exchange(self, layer: int, other: nn.Module | None) -> None:
        """Give a layer the channels that were asked for, if any were."""
        if self._coming is None or other is None:
            return
        part, kept = self.parts[layer], self._kept[layer]
        new = Apart(self._coming[layer], part.units, whole=part.whole)
        new.recent = part.recent
        plan = self._passing_plan.layers[layer]
        exchange(kept, other, plan, part, new)
        if part.recent is not None and len(part.recent) > self._reading:
            # The tokens being read now have not been judged.
            known = part.recent[: len(part.recent) - self._reading]
            shown = evidence(known)
            missing = self._made_of_dropped(layer, other, new, shown.rows)
            new.correction = learned(shown, new.index, missing)
        at(kept, plan.inlet)._apart = self.parts[layer] = new
        mx.eval(kept.parameters(), new.correction)

    def _made_of_dropped(
        self, layer: int, other: nn.Module, part: Apart, channels: mx.array
    ) -> mx.array:
        """Return what dropped channels add to the output for some tokens, ``[n,
        D]``.
        """
        inlet = at(other, self.plan.layers[layer].inlet)
        if not part.whole:
            return _without_bias(inlet, gathered(channels, part.dropped_index))
        dropped = mx.ones(part.units, channels.dtype)
        dropped[part.index] = 0
        own = at(self._kept[layer], self.plan.layers[layer].inlet)
        made = linear_of(own)(channels * dropped)
        return made - own.bias if "bias" in own else made

    def _passes(self, layer: int) -> bool:
        """Whether dropped channels of a layer have to be read."""
        return layer not in self.held and self.parts[layer].drops

    def _arrivals(self, layers: Sequence[int]) -> Iterator[int]:
        """Read the dropped channels of layers into their shells, one after the other."""
        for once in _rounds(layers):
            if not self._reader.reads_all:
                self._reader.check_unchanged()
                self._shells = self.plan.modules(self.source.open())
            work = [
                Wanted(self._shells[layer], layer, self.parts[layer].dropped_index)
                for layer in once
            ]
            yield from self._reader.fill_each(work)

    def _hold(self, room: int) -> None:
        """Read dropped channels for good, layer by layer while there is room."""
        dense = self._passing_plan.modules(self.source.skeleton)
        for layer, part in enumerate(self.parts):
            tensors = _tensors(dense[layer], self._passing_plan.layers[layer])
            share = 1 - part.index.size / part.units
            room -= round(share * sum(home[name].nbytes for home, name in tensors))
            if room < 0:
                return
            for _ in self._arrivals([layer] if part.drops else []):
                self.held[layer] = self._shells[layer]

    def _let_go(self, layer: int) -> None:
        """Forget the dropped channels of a layer."""
        plan = self._passing_plan.layers[layer]
        for home, name in _tensors(self._shells[layer], plan):
            home[name] = mx.zeros(0)

    def _computed(
        self,
        layer: int,
        other: nn.Module | None,
        x: mx.array,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Return the output of the dense layer's module, computed in steps of some
        tokens.

        Args:
            layer: its number.
            other: the module with the dropped channels, or ``None``.
            x, args, kwargs: what the module gets.
        """
        step = x.shape[1] if args or kwargs else FFN_STEP
        outputs = []
        for start in range(0, x.shape[1], step):
            some = x[:, start : start + step]
            with self._beside(layer, other, some, *args, **kwargs):
                outputs.append(self._kept[layer](some, *args, **kwargs))
            mx.eval(outputs[-1])
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=1)

    @contextmanager
    def _beside(
        self, layer: int, other: nn.Module | None, *args: Any, **kwargs: Any
    ) -> Iterator[None]:
        """Let the inlet of the kept channels add the dropped ones' part inside the
        block.
        """
        part, plan = self.parts[layer], self.plan.layers[layer]
        if other is None:
            yield
            return
        inlet = at(other, plan.inlet)
        width = at(self._kept[layer], plan.inlet).weight.shape[0]

        def catch(h: mx.array) -> mx.array:
            if part.whole:
                made = mx.zeros((*h.shape[:-1], width), h.dtype)
            else:
                made = _without_bias(inlet, h)
            part.dropped = h, made
            return made

        try:
            with standing_in(other, {plan.inlet: catch}):
                other(*args, **kwargs)
            yield
        finally:
            part.dropped = None


def exchange(
    kept: nn.Module, other: nn.Module, layer: LayerPlan, old: Apart, new: Apart
) -> None:
    """Exchange channels between the two modules of a layer, in place.

    Args:
        kept: the module that has the channels of ``old.index`` now, and then those of
            ``new.index``.
        other: the module that has the rest.
        layer: the plan of what both have.
        old, new: the channels before and after.
    """
    for piece in layer.slices:
        homes = [at(module, piece.module) for module in (kept, other)]
        there = [old.index, old.dropped_index]
        rows = mx.concatenate([elements(piece, index, old.units) for index in there])
        order = mx.argsort(rows)  # where each channel is
        for name in tensors_along(homes[1], piece):
            both = mx.concatenate([home[name] for home in homes], axis=piece.axis)
            for home, index in zip(homes, (new.index, new.dropped_index), strict=True):
                places = order[elements(piece, index, old.units)]
                home[name] = gathered(both, places, piece.axis)
            mx.eval([home[name] for home in homes])


def _without_bias(linear: nn.Module, h: mx.array) -> mx.array:
    """Return a linear's output without its bias."""
    made: mx.array = linear(h)
    return made - linear.bias if "bias" in linear else made


def parts_of(model: nn.Module, plan: Plan) -> list[Apart]:
    """Return what :func:`set_apart` gave every layer of a compact model."""
    return [inlet._apart for inlet in plan.inlets(model)]


def _rounds(layers: Sequence[int]) -> Iterator[list[int]]:
    """Yield layers in runs in which none comes twice: some model types go through theirs
    more than once.
    """
    run: list[int] = []
    for layer in layers:
        if layer in run:
            yield run
            run = []
        run.append(layer)
    if run:
        yield run


def _without_whole_inlets(plan: Plan, parts: Sequence[Apart]) -> Plan:
    """Return the plan of reading dropped channels, without inlets that stay whole."""
    layers = []
    for layer, part in zip(plan.layers, parts, strict=True):
        own = [s for s in layer.slices if not (part.whole and s.module == layer.inlet)]
        layers.append(replace(layer, slices=tuple(own if part.drops else ())))
    return replace(plan, layers=tuple(layers))


def _tensors(module: nn.Module, layer: LayerPlan) -> list[tuple[nn.Module, str]]:
    """Return where a layer's sliced tensors are: module and name."""
    homes = [(at(module, piece.module), piece) for piece in layer.slices]
    return [
        (home, name) for home, piece in homes for name in tensors_along(home, piece)
    ]
