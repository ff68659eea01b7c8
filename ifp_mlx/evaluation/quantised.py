"""Compact models at few bits: sliced, then quantised, as `compact -q` writes them."""

import copy

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..model.checkpoint import IFPModel
from ..slicing.pruning import PROJECTIONS, ffn_layers, slice_ffn
from .rivals import group_of


class QuantisedCompact:
    """One quantised model whose FFNs are cut and quantised anew for every mask.

    The groups of ``down_proj`` lie along the kept channels, so what a weight is
    rounded to depends on the mask, and no mask on a quantised model would give it.

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
        self._dense, self._bits = model.dense(), bits
        self._group = group_of(self._dense)
        self._ffns = ffn_layers(self._dense)
        wide = {id(ffn.module[name]) for ffn in self._ffns for name in PROJECTIONS}
        nn.quantize(
            self._dense,
            self._group,
            bits,
            class_predicate=lambda _, module: (
                hasattr(module, "to_quantized") and id(module) not in wide
            ),
        )
        mx.eval(self._dense.parameters())

    def of(self, mask: mx.array) -> nn.Module:
        """Return the compact model of a binary mask, ``[L, F]``; the last one is gone.

        Raises:
            ValueError: if a layer keeps channels that fill no whole groups.
        """
        for (block, name, ffn), row in zip(self._ffns, np.array(mask), strict=True):
            index = mx.array(np.flatnonzero(row).astype(np.int32))
            setattr(block, name, self._cut(ffn, index))
        return self._dense

    def round(self, compact: nn.Module) -> None:
        """Quantise a compact model made otherwise, in place.

        Raises:
            ValueError: as :meth:`of`.
        """
        for ffn in ffn_layers(compact):
            self._check(ffn.module.gate_proj.weight.shape[0])
        nn.quantize(compact, self._group, self._bits)

    def _check(self, width: int) -> None:
        if width % self._group:
            below = width // self._group * self._group
            raise ValueError(
                f"A layer keeps {width} channels, no multiple of the quantisation "
                f"group {self._group}; with -q use --allocation uniform and a --keep "
                f"that gives {below} or {below + self._group}."
            )

    def _cut(self, ffn: nn.Module, index: mx.array) -> nn.Module:
        self._check(index.size)
        part = copy.copy(ffn)
        for name in PROJECTIONS:
            part[name] = copy.copy(ffn[name])
        slice_ffn(part, index)
        nn.quantize(part, self._group, self._bits)
        return part
