"""The models of a point as float32 ones, which a CPU computes twenty times as fast.

Every number is the quantised model's. When the package selects from a quantised model,
it quantises the `down_proj` of cut layers again. Here it selects and compensates in a
folder of the same weights, unpacked, and the same matrices are rounded afterwards.
"""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx import load
from ifp_mlx.evaluation.rivals import compact_bytes, weight_bytes
from ifp_mlx.model.decide import decide
from ifp_mlx.selection.masks import Selection
from ifp_mlx.selection.request import Request

from .points import Point


class Whole:
    """One model for all prompts.

    Args:
        folder: of the model, quantised or not.

    Attributes:
        bytes: of its weights; a number that is not quantised counts two.
    """

    def __init__(self, folder: Path) -> None:
        self.bytes, self.model = unpacked(folder)
        mx.eval(self.model.parameters())

    def model_for(self, prompt: list[int]) -> nn.Module:
        """Return the model."""
        return self.model


class Selected:
    """A compact model for each prompt, selected as the package does by default.

    Args:
        point: of a selection.
        base: folder of the quantised model.
        plain: folder of the same weights, unpacked.

    Attributes:
        bytes: of a compact model; known once there was one.
    """

    def __init__(self, point: Point, base: Path, plain: Path) -> None:
        self._point = point
        self._quantised, _ = load(base)
        self._plain, _ = load(plain)
        self.bytes = 0

    def model_for(self, prompt: list[int]) -> nn.Module:
        """Return the compact model of a prompt's token ids."""
        keep = self._point.keep
        request = Request(instruction=prompt, keep=keep, selector="blend")
        # The quantised model decides: its layers keep whole groups of channels.
        decision = decide(request, self._quantised)
        made = self._plain.prepare(decision)
        self._round(made.model, made.selection)
        whole, plan = self._quantised.source.skeleton, self._quantised.plan
        self.bytes = compact_bytes(whole, plan, made.selection)
        return made.model

    def _round(self, model: nn.Module, selection: Selection) -> None:
        inlets = self._plain.plan.inlets(model)
        for inlet, size in zip(inlets, selection.sizes, strict=True):
            if size < self._plain.channels:
                inlet.weight = rounded(inlet.weight, self._point)
        mx.eval(model.parameters())


def unpacked(folder: Path) -> tuple[int, nn.Module]:
    """Return the bytes of a folder's weights, and its model in float32."""
    from mlx_lm.utils import dequantize_model, load_model

    model, _ = load_model(folder, lazy=True)
    size = weight_bytes(model)
    model.set_dtype(mx.float32)
    return size, dequantize_model(model)


def rounded(weight: mx.array, point: Point) -> mx.array:
    """Return a weight ``[D', D]`` as it is at a point's bits, with float16 scales."""
    how = point.group, int(point.bits)
    packed, *grid = mx.quantize(weight, *how)
    scales, biases = (a.astype(mx.float16).astype(mx.float32) for a in grid)
    return mx.dequantize(packed, scales, biases, *how)
