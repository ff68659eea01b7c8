"""DWQ of mlx-lm in minutes on a CPU: its own training, and layers that unpack first.

A quantised product on a CPU takes twenty times as long as unpacking and a plain
product.
"""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

# mlx-lm has 512 steps of 4 times 1,024 tokens at a rate of 1e-6. So few steps need more:
# the rates, by type, are the best at 3 bits of 1e-5 and 1e-4 for SmolLM2, and by mlx-lm's
# validation of 1e-5, 3e-5 and 1e-4 for Gemma.
PIECE, BATCH, STEPS, SEED = 128, 2, 40, 0
RATES = {"llama": 1e-4, "gemma3_text": 3e-5}


class UnpackedLinear(nn.QuantizedLinear):
    """The same, computed with the unpacked weight."""

    def __call__(self, x: mx.array) -> mx.array:
        """Return ``[..., D']`` for ``x``, ``[..., D]``."""
        y = x @ unpacked(self).T
        return y + self["bias"] if "bias" in self else y


class UnpackedEmbedding(nn.QuantizedEmbedding):
    """The same, computed with the unpacked weight where it is the output layer."""

    def as_linear(self, x: mx.array) -> mx.array:
        """Return logits, ``[..., V]``, for ``x``, ``[..., D]``."""
        return x @ unpacked(self).T


def unpack(layer: nn.Module) -> None:
    """Keep a quantised layer's integers as numbers, ``[D', groups, group]``, and compute
    with them from now on. Training leaves them as they are.
    """
    ones, zeros = mx.ones_like(layer.scales), mx.zeros_like(layer.scales)
    codes = mx.dequantize(layer.weight, ones, zeros, layer.group_size, layer.bits)
    layer._codes = codes.reshape(*layer.scales.shape, -1)
    layer.__class__ = STAND_INS[type(layer)]


def pack(layer: nn.Module) -> None:
    """Make an unpacked layer the stock one again."""
    del layer._codes
    layer.__class__ = type(layer).__base__


def unpacked(layer: nn.Module) -> mx.array:
    """Return an unpacked layer's weight, ``[D', D]``."""
    weight = layer._codes * layer.scales[..., None] + layer.biases[..., None]
    return weight.reshape(len(weight), -1)


STAND_INS = {
    nn.QuantizedLinear: UnpackedLinear,
    nn.QuantizedEmbedding: UnpackedEmbedding,
}


def distil(student: nn.Module, teacher: nn.Module, text: mx.array, rate: float) -> None:
    """Train a quantised model's scales and biases, in place.

    Args:
        student: quantised.
        teacher: the dense model.
        text: ``[N, T]``; cut into pieces, which are read again and again, except the
            last few, on which mlx-lm validates.
        rate: of learning.
    """
    from mlx_lm.quant.dwq import dwq_quantize

    pieces = text[:, : text.shape[1] // PIECE * PIECE].reshape(-1, PIECE)
    data = [(piece.tolist(), 0) for piece in pieces]
    train = data[:-BATCH] * -(-STEPS * BATCH // len(data[:-BATCH]))
    layers = [m for _, m in student.named_modules() if type(m) in STAND_INS]
    for layer in layers:
        unpack(layer)
    dwq_quantize(
        student,
        lambda batch, number, split: teacher(batch),
        optim.Adam(learning_rate=rate, bias_correction=True),
        train[: STEPS * BATCH],
        data[-BATCH:],
        BATCH,
        PIECE,
        SEED,
        dtype=mx.float32,
    )
    for layer in layers:
        pack(layer)
    student.eval()
