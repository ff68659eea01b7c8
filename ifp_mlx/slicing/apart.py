"""Kept channels with their weights unchanged; gates and corrections are held apart.

In a sliced layer, gates and the correction for dropped channels are folded into the
weights. To compute the dense layer too, from the kept and the dropped channels, the
weights are needed as they were. So here they stay unchanged, and gates and correction
are applied to what comes into the inlet. A correction is two factors, much smaller than
``down_proj``.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..selection.masks import Selection
from .compensation import Correction
from .masked import become
from .shapes import LayerPlan, Plan, at
from .sliced import cut, cut_rows, cuts_groups, gathered, others_of, settle

Linear = Callable[[mx.array], mx.array]


class Apart:
    """What an inlet computes from kept channels, with gates and correction apart.

    Attributes:
        index: int32 ``[k]``, sorted, the channels that are kept.
        units: ``F``.
        dropped_index: int32 ``[F - k]``, sorted, the channels that are not.
        whole: whether the inlet has all ``F`` columns: a quantised one whose groups the
            selection cuts could not be sliced without loss.
        gate: float32 ``[k]``, what each channel is multiplied with, or ``None``.
        correction: makes up for dropped channels, or ``None``.
        dropped: ``None``, except while the dense layer is computed: then the channels
            that are not kept, as they come into the inlet, ``[..., F - k]``, and what
            the inlet makes of them, ``[..., D]`` (0 if the inlet is whole).
        recent: channels of the latest tokens that the dense layer has read, ``[n, F]``,
            to which each token adds a row; ``None`` if they are not remembered.
    """

    def __init__(
        self,
        index: mx.array,
        units: int,
        *,
        whole: bool = False,
        gate: mx.array | None = None,
        correction: Correction | None = None,
    ) -> None:
        self.index, self.units, self.whole = index, units, whole
        self.gate, self.correction = gate, correction
        self.dropped_index = others_of(index, units)
        kept, left = np.array(index), np.array(self.dropped_index)
        places = np.full(units, kept.size, np.int32)
        places[kept] = np.arange(kept.size)
        self._places_alone = mx.array(places)
        places[left] = np.arange(kept.size, units)
        self._places = mx.array(places)
        self.dropped: tuple[mx.array, mx.array] | None = None
        self.recent: mx.array | None = None

    def __call__(self, linear: Linear, h: mx.array) -> mx.array:
        """Return what comes out of the inlet.

        Args:
            linear: the stock inlet.
            h: the kept channels, ``[..., k]``.
        """
        if self.dropped is not None:
            return self._dense(linear, h, *self.dropped)
        if self.gate is not None:
            h = h * self.gate.astype(h.dtype)
        y = linear(self._spread(h, None) if self.whole else h)
        if self.correction is not None:
            y = y + ((h @ self.correction.reads) @ self.correction.writes).astype(
                y.dtype
            )
        return y

    def _dense(
        self, linear: Linear, h: mx.array, others: mx.array, made: mx.array
    ) -> mx.array:
        if self.whole or self.recent is not None:
            channels = self._spread(h, others)
            if self.recent is not None:
                rows = channels.reshape(-1, self.units).astype(self.recent.dtype)
                self.recent = mx.concatenate([self.recent, rows])
            if self.whole:
                return linear(channels)
        return linear(h) + made

    def _spread(self, h: mx.array, others: mx.array | None) -> mx.array:
        """Return all channels, in their order, ``[..., F]``; dropped ones are 0 unless
        they are given.
        """
        alone = others is None
        if others is None:
            others = mx.zeros((*h.shape[:-1], 1), h.dtype)
        both = mx.concatenate([h, others.astype(h.dtype)], axis=-1)
        places = self._places_alone if alone else self._places
        return gathered(both, places)

    @property
    def drops(self) -> bool:
        """Whether any channel is not kept."""
        return self.index.size < self.units


def stays_whole(inlet: nn.Module, index: mx.array, units: int) -> bool:
    """Whether an inlet cannot be sliced to ``index`` without loss."""
    return cuts_groups(index, getattr(inlet, "group_size", 1), units)


def cut_apart(
    module: nn.Module,
    layer: LayerPlan,
    index: mx.array,
    units: int,
    *,
    gate: mx.array | None = None,
    correction: Correction | None = None,
) -> Apart:
    """Keep the channels ``index`` of one layer, in place, and let its inlet apply gates
    and correction.

    Args:
        module: the layer's, with all units.
        layer: its plan.
        index: int32 ``[k]``, sorted.
        units: ``F``.
        gate, correction: see :class:`Apart`.
    """
    whole = stays_whole(at(module, layer.inlet), index, units)
    if whole:
        cut_rows(module, layer, index, units)
    else:
        cut(module, layer, index, units)
    about: dict[str, Any] = {"gate": gate, "correction": correction}
    return set_apart(module, layer, Apart(index, units, whole=whole, **about))


def set_apart_all(
    model: nn.Module,
    plan: Plan,
    fills: Callable[[Sequence[mx.array | None]], Iterable[int]],
    selection: Selection,
    *,
    progress: Callable[[Iterable], Iterable] = iter,
) -> None:
    """Give every layer of ``model`` its selected channels, in place, gates apart.

    Args:
        model: a stock mlx-lm model, dense in shape; its weights are not in memory.
        plan: its plan.
        fills: gets for each layer the indices to read (``None`` for all), and returns
            an iterable; taking an item from that fills the next layer.
        selection: made for this model.
        progress: wraps the iteration over layers.
    """
    pairs = zip(plan.inlets(model), selection.indices, strict=True)
    whole = [stays_whole(inlet, index, plan.units) for inlet, index in pairs]
    arrive = zip(selection.indices, whole, strict=True)
    filled = iter(fills([None if all_ else index for index, all_ in arrive]))
    gates = selection.gates or (None,) * len(plan.layers)
    modules = plan.modules(model)
    for n, layer in enumerate(progress(plan.layers)):
        next(filled)
        index, gate = selection.indices[n], gates[n]
        if whole[n]:
            cut_rows(modules[n], layer, index, plan.units)
        set_apart(
            modules[n], layer, Apart(index, plan.units, whole=whole[n], gate=gate)
        )
        settle(modules[n])


def set_apart(module: nn.Module, layer: LayerPlan, apart: Apart) -> Apart:
    """Let a layer's inlet, which is cut already, apply gates and correction, in
    place.
    """
    inlet = at(module, layer.inlet)
    become(inlet, "Apart", _apart_call)
    inlet._apart = apart
    return apart


def put_together(inlet: nn.Module) -> Apart:
    """Undo :func:`set_apart`: give an inlet its stock class back, and return what it
    applied.
    """
    parts: Apart = inlet._apart
    inlet.__class__ = type(inlet).__bases__[0]
    del inlet._apart
    return parts


def linear_of(inlet: nn.Module) -> Linear:
    """Return the stock linear of an inlet that :func:`set_apart` has changed."""
    return partial(type(inlet).__mro__[1].__call__, inlet)


def _apart_call(stock: type) -> Any:
    def call(self: Any, h: mx.array) -> mx.array:
        return self._apart(partial(stock.__call__, self), h)

    return call
