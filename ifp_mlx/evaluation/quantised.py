"""Compact models at few bits, as `compact -q` writes them."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..model.checkpoint import IFPModel
from ..slicing.shapes import LayerPlan, at, put_at
from ..slicing.sliced import count_units, cut, twin
from .rivals import group_of, quantised


class QuantisedCompact:
    """One quantised model whose units are cut anew for every mask.

    FFNs are cut, then quantised: the groups of ``down_proj`` lie along the kept
    channels, so the rounding of a weight depends on the mask. No group spans two
    experts, so experts are quantised once, and then cut.

    Args:
        model: from :func:`ifp_mlx.load`, not quantised.
        bits: of every weight that mlx-lm quantises.

    Raises:
        ValueError: if the model is quantised already.
    """

    def __init__(self, model: IFPModel, bits: int) -> None:
        if "quantization" in model.config:
            raise ValueError(
                f"{model.path} is quantised already, and its compact models with it; "
                "leave out -q."
            )
        self._plan, self._bits = model.plan, bits
        if self._plan.unit == "expert":
            self._dense = quantised(model, bits).model
        else:
            self._dense = model.dense()
            self._quantise_core()
        self._modules = self._plan.modules(self._dense)

    def _quantise_core(self) -> None:
        """Quantise all but the FFNs."""
        self._group = group_of(self._dense)
        modules = self._plan.modules(self._dense)
        wide = {
            id(at(module, piece.module))
            for layer, module in zip(self._plan.layers, modules, strict=True)
            for piece in layer.slices
        }
        nn.quantize(
            self._dense,
            self._group,
            self._bits,
            class_predicate=lambda _, module: (
                hasattr(module, "to_quantized") and id(module) not in wide
            ),
        )
        mx.eval(self._dense.parameters())

    def of(self, mask: mx.array) -> nn.Module:
        """Return the compact model of a binary mask, ``[L, F]``, in place of the last
        one.

        Raises:
            ValueError: if a layer keeps channels that fill no whole groups.
        """
        layers = zip(self._plan.layers, self._modules, np.array(mask), strict=True)
        for layer, module, row in layers:
            index = mx.array(np.flatnonzero(row).astype(np.int32))
            put_at(self._dense, layer.path, self._cut(module, layer, index))
        return self._dense

    def round(self, compact: nn.Module) -> None:
        """Quantise a compact model made otherwise, in place.

        Raises:
            ValueError: as :meth:`of`.
        """
        for count in map(count_units, self._plan.modules(compact), self._plan.layers):
            self._check(count)
        nn.quantize(compact, self._group, self._bits)

    def _check(self, width: int) -> None:
        if width % self._group:
            below = width // self._group * self._group
            raise ValueError(
                f"A layer keeps {width} channels, no multiple of the quantisation "
                f"group {self._group}; with -q use --allocation uniform and a --keep "
                f"that gives {below} or {below + self._group}."
            )

    def _cut(self, module: nn.Module, layer: LayerPlan, index: mx.array) -> nn.Module:
        part = twin(module)
        cut(part, layer, index, self._plan.units)
        if self._plan.unit == "channel":
            self._check(index.size)
            nn.quantize(part, self._group, self._bits)
        return part
