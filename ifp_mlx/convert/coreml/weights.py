"""A module's weights as Core ML constants, with MLX's own quantised values."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Var
from coremltools.converters.mil.mil.types.type_mapping import string_to_nptype

from ...slicing.shapes import Plan
from ...slicing.sliced import count_units, pad

# How far, in steps, a zero point may be from the integer that stands in for it. MLX
# chooses integers; rounding to float16 or bfloat16 then moves them by up to 0.06.
INTEGER = 0.1
QUANTISED = (nn.QuantizedLinear, nn.QuantizedEmbedding)


def quantise(model: nn.Module, plan: Plan, bits: int, group: int) -> None:
    """Quantise a float32 model in place, so that MLX and Core ML read the same values.

    MLX makes biases whole multiples of the scales. With scales rounded to float16 and
    biases computed from these again, ``scale * (data - offset)`` gives exactly the same
    values.

    Args:
        model: its FFN layers may have any width; they grow to whole groups.
        plan: of its slices.
        bits: per weight.
        group: weights per scale.

    Raises:
        ValueError: if the width of any other matrix is not a multiple of the group.
    """
    for module, layer in zip(plan.modules(model), plan.layers, strict=True):
        pad(module, layer, -(-count_units(module, layer) // group) * group)
    for name, module in model.named_modules():
        width = module.weight.shape[-1] if hasattr(module, "to_quantized") else 0
        if width % group:
            raise ValueError(
                f"{name} is {width} wide, not a multiple of q_group_size={group}; "
                "choose another --q-group-size or leave -q out."
            )
    nn.quantize(model, group, bits)
    for _, module in model.named_modules():
        if isinstance(module, QUANTISED):
            scales = module.scales.astype(mx.float16).astype(mx.float32)
            whole = mx.round(module.biases / mx.where(scales == 0, 1, scales))
            module.biases = mx.where(scales == 0, module.biases, whole * scales)
            module.scales = scales


@dataclass(frozen=True)
class Quantised:
    """A matrix in MLX's affine form, ``w = scale * q + bias`` in every group.

    Attributes:
        q: unsigned integers below ``2**bits``, uint8 ``[N, K]``.
        scales, biases: float32 ``[N, K / group]``.
        bits: per weight.
    """

    q: np.ndarray
    scales: np.ndarray
    biases: np.ndarray
    bits: int

    @staticmethod
    def of(module: nn.Module) -> "Quantised":
        """Take the values of a quantised module; nothing is quantised again.

        Raises:
            ValueError: if they are not affine.
        """
        if module.mode != "affine":
            raise ValueError(
                f"Core ML has no {module.mode} weights; quantise the model with "
                "--q-mode affine, or export the unquantised one."
            )
        scales = module.scales.astype(mx.float32)
        biases = module.biases.astype(mx.float32)
        # Dequantising with w = 1 * q + 0 unpacks any number of bits.
        q = mx.dequantize(
            module.weight,
            mx.ones_like(scales),
            mx.zeros_like(biases),
            module.group_size,
            module.bits,
        )
        unpacked = np.array(q.astype(mx.uint8))
        return Quantised(unpacked, np.array(scales), np.array(biases), module.bits)


def shift_scale(w: Quantised) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rewrite a matrix as ``scale * (data - offset)`` with positive scales.

    About half of MLX's scales are negative, which converters of the format refuse; so
    such a group is mirrored: ``s q + b = -s (top - q) + (b + top s)``.

    Returns:
        ``data``, unsigned ``[N, K]``; ``scale``, float16 ``[N, K / group]``; and
        ``offset`` of that shape: of the type of ``data`` where every zero point is an
        integer, as in all that MLX quantises, else float16.
    """
    top = 2**w.bits - 1
    rows, groups = w.scales.shape
    q = w.q.reshape(rows, groups, -1)
    mirrored = w.scales < 0
    q = np.where(mirrored[..., None], top - q, q).astype(np.uint8)
    biases = np.where(mirrored, w.biases + top * w.scales, w.biases)
    scales = np.abs(w.scales)

    # Where a group is constant in float16, its scale says nothing and is often 0: the
    # constant's size becomes the scale, and data - offset is 1, 0 or -1.
    constant = scales * top <= np.abs(biases) * 2.0**-11
    size = np.abs(biases)
    scales = np.where(constant, np.where(size > 0, size, 1), scales)
    q[constant] = (biases[constant] > 0)[:, None]
    offset = np.where(constant, biases < 0, -biases / scales)

    dtype = string_to_nptype("uint4" if w.bits <= 4 else "uint8")
    nearest = np.clip(np.round(offset), 0, top)
    if np.abs(offset - nearest).max() <= INTEGER:
        offset = nearest.astype(np.uint8).astype(dtype)
    else:
        offset = _float16(offset, "an offset")
    data = q.reshape(rows, -1).astype(dtype)
    return data, _float16(scales, "a scale"), offset


def lookup_tables(w: Quantised) -> tuple[np.ndarray, np.ndarray]:
    """Return indices and one table of ``2**bits`` values per group: exact, but larger.

    Returns:
        ``indices``, unsigned ``[N, K]``, and ``tables``, float16
        ``[N, K / group, 2**bits, 1]``.

    Raises:
        ValueError: if a table would be as large as its group or larger, or for 5 bits.
    """
    rows, groups = w.scales.shape
    if 2**w.bits >= w.q.shape[1] // groups or w.bits == 5:
        raise ValueError(
            f"Lookup tables for {w.bits} bits in groups of {w.q.shape[1] // groups} "
            "would not pay; use --lut with 4 bits, or leave it out."
        )
    steps = np.arange(2**w.bits, dtype=np.float32)
    tables = w.scales[..., None] * steps + w.biases[..., None]
    indices = w.q.astype(string_to_nptype(f"uint{w.bits}"))
    return indices, _float16(tables, "a table")[..., None]


def constant(module: nn.Module, name: str, *, lut: bool = False) -> Var:
    """Return the weight of a linear or embedding module as a constant, ``[N, K]``.

    Args:
        module: stock, quantised or not.
        name: of the constant in the program.
        lut: store quantised values as lookup tables.

    Raises:
        ValueError: if a weight is too large for float16, or quantised in a way that
            Core ML does not have.
    """
    if not isinstance(module, QUANTISED):
        return mb.const(val=array(module.weight, name), name=name)
    w = Quantised.of(module)
    if lut:
        indices, tables = lookup_tables(w)
        return mb.constexpr_lut_to_dense(indices=indices, lut=tables, name=name)
    data, scale, offset = shift_scale(w)
    return mb.constexpr_blockwise_shift_scale(
        data=data, scale=scale, offset=offset, name=name
    )


def array(values: mx.array, name: str) -> np.ndarray:
    """Return ``values`` as float16.

    Raises:
        ValueError: if one of them is too large, or not a number.
    """
    return _float16(np.array(values.astype(mx.float32)), name)


def _float16(values: np.ndarray, name: str) -> np.ndarray:
    top = np.abs(values).max(initial=0)
    if not top < np.finfo(np.float16).max:
        raise ValueError(
            f"{name} reaches {top:.4g}, which float16 cannot hold; this model cannot "
            "be exported to Core ML."
        )
    return values.astype(np.float16)
