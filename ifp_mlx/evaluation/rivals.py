"""The honest alternatives to a compact model: the dense one at fewer bits, and a
smaller dense one of its family.
"""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..model.checkpoint import IFPModel
from ..selection.masks import Selection
from ..selection.tokenizer import open_tokenizer
from ..slicing.shapes import Plan
from ..slicing.sliced import sliced_names
from ..slicing.stock import vocabulary_of
from ..storage.folder import resolve, source_of
from .rows import Row, retokenize, same_tokens
from .teacher import log_probabilities, metrics

BITS = (8, 6, 5, 4, 3, 2)
GROUPS = (64, 32)
HALF = 2  # bytes of a number that is not quantised, as models are published


@dataclass
class Rival:
    """A whole model that is measured like a compact one.

    Attributes:
        name: what tables call it.
        model: mlx-lm's own.
        tokenizer: its own, or ``None`` if it reads the dense model's tokens.
    """

    name: str
    model: nn.Module
    tokenizer: Any = None

    def measure(
        self, row: Row, reference: mx.array, tokenizer: Any
    ) -> tuple[Row, dict[str, float]]:
        """Return the row in its tokens, and the metrics; no KL if its tokens differ.

        Args:
            row: in the dense model's tokens.
            reference: the dense model's log-probabilities, ``[A, V]``.
            tokenizer: the dense model's.
        """
        if self.tokenizer is not None:
            other = retokenize(row, tokenizer, self.tokenizer)
            found = log_probabilities(self.model, other)
            return other, metrics(other, found, None)
        return row, metrics(row, log_probabilities(self.model, row), reference)


def weight_bytes(model: nn.Module) -> int:
    """Return what a model's weights take, embeddings included; a number that is not
    quantised counts 2 bytes, whatever it is computed in here. Nothing is read.
    """
    return sum(_sizes(model).values())


def compact_bytes(
    model: nn.Module, plan: Plan, selection: Selection, bits: int | None = None
) -> int:
    """Return :func:`weight_bytes` of the compact model.

    Args:
        model: the dense one.
        plan: its plan.
        selection: made for it.
        bits: that the compact model is quantised to, if it is.
    """
    sizes = _sizes(model, bits)
    units = (sum(sizes[name] for name in names) for names in sliced_names(model, plan))
    layers = zip(selection.sizes, units, strict=True)
    dropped = sum((1 - k / plan.units) * whole for k, whole in layers)
    return sum(sizes.values()) - round(dropped)


def quantised_bytes(model: nn.Module, bits: int) -> int:
    """Return what :func:`weight_bytes` of :func:`quantised` will be."""
    return sum(_sizes(model, bits).values())


def _sizes(model: nn.Module, bits: int | None = None) -> dict[str, int]:
    """Return the bytes of every parameter, for weights as if they were quantised."""
    arrays = dict(tree_flatten(model.parameters()))
    found = {name: _bytes(array) for name, array in arrays.items()}
    if bits is None:
        return found
    group = group_of(model)
    own = getattr(model, "quant_predicate", None) or (lambda path, module: True)
    for path, module in model.named_modules():
        assert "scales" not in module, path
        if _can_quantise(module, group):
            how = {"group_size": group, "bits": bits}
            if isinstance(said := own(path, module), dict):  # a class may know better
                how |= said
            size, each = module.weight.size, how["group_size"]
            found[f"{path}.weight"] = size * how["bits"] // 8 + size // each * 2 * HALF
    return found


def choose_bits(model: nn.Module, sizes: Sequence[int], below: int = 16) -> list[int]:
    """Return the bits whose quantisation of the dense model comes nearest to each
    size, and the most bits that do not exceed it; most first, none twice.

    Args:
        model: dense, not quantised.
        sizes: in bytes.
        below: bits of the source: more would add nothing.
    """
    can = {bits: quantised_bytes(model, bits) for bits in BITS if bits < below}
    chosen = {min(can, key=lambda b: abs(can[b] - size)) for size in sizes if can}
    for size in sizes:
        chosen |= set([bits for bits in can if can[bits] <= size][:1])
    return sorted(chosen, reverse=True)


def unquantised(model: IFPModel) -> nn.Module:
    """Return the dense model, its quantisation taken back where there is one."""
    from mlx_lm.utils import dequantize_model

    dense = model.dense()
    return dequantize_model(dense) if "quantization" in model.config else dense


def quantised(model: IFPModel, bits: int) -> Rival:
    """Return the dense model at ``bits`` bits, by mlx-lm's own quantiser."""
    from mlx_lm.utils import quantize_model

    dense = unquantised(model)
    config = {k: v for k, v in model.config.items() if "quantization" not in k}
    group = group_of(dense)
    with redirect_stdout(sys.stderr):  # it prints what it did
        small, _ = quantize_model(dense, config, group, bits)
    mx.eval(small.parameters())
    return Rival(f"dense, {bits} bits", small)


def smaller(path: str, model: IFPModel) -> Rival:
    """Open a smaller dense model.

    Args:
        path: its folder or hub id.
        model: the large one; where both have the same tokens, KL can be measured.
    """
    folder: Path = resolve(path)
    source = source_of(folder)
    other, small = open_tokenizer(folder, source.config), source.dense()
    mx.eval(small.parameters())  # now, not while it is timed
    same = same_tokens(model.tokenizer, other)
    same &= vocabulary_of(small) == model.vocabulary
    return Rival(f"dense, {folder.resolve().name}", small, None if same else other)


def _bytes(array: mx.array) -> int:
    floating = mx.issubdtype(array.dtype, mx.floating)
    return array.size * HALF if floating else array.nbytes


def _can_quantise(module: nn.Module, group: int) -> bool:
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % group == 0


def group_of(model: nn.Module) -> int:
    """Return the largest quantisation group that fits every weight of a model."""
    modules = [m for _, m in model.named_modules() if hasattr(m, "to_quantized")]
    for group in GROUPS:
        if all(_can_quantise(module, group) for module in modules):
            return group
    return GROUPS[-1]
