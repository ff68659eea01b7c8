"""Let the kept channels make up for the dropped ones, as far as one text shows how.

A dropped channel's contribution to the FFN's output is partly predictable from the
channels that stay. Where the dense model has just read a text (as it does to choose
by activation), the channels of every token are at hand, and the best linear stand-in
is a ridge regression of what is missing on what is kept. It changes ``down_proj``
alone, needs no training and no stored statistic, and costs nothing afterwards.
"""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from .masks import Selection
from .pruning import TappedFFN, ffn_layers, note_width, slice_ffn

STRENGTH = 0.3  # as good as any between 0.1 and 1 on other text than it was chosen on


def compensate(model: nn.Module, selection: Selection, tokens: Sequence[int]) -> None:
    """Cut a dense model down to the selected channels, in place, compensated.

    Args:
        model: a dense stock model; its weights are in memory meanwhile.
        selection: made for this model, without gates.
        tokens: ``T`` ids of the text that shows what dropped channels do.

    Raises:
        ValueError: if ``down_proj`` is quantised, or the selection has gates.
    """
    layers = ffn_layers(model)
    if any("scales" in ffn.module.down_proj for ffn in layers):
        raise ValueError(
            "Compensation changes down_proj, which is quantised here; use the model in "
            "16 or 32 bits, or leave compensation out."
        )
    if selection.gates is not None:
        raise ValueError(
            f"The mask {selection.mask_id} has gates from training, which compensation "
            "does not know; leave compensation out."
        )
    channels = read_channels(model, tokens)
    for ffn, index, h in zip(layers, selection.indices, channels, strict=True):
        down = compensated_down(ffn.module.down_proj.weight, h, index)
        slice_ffn(ffn.module, index)
        ffn.module.down_proj.weight = down
        mx.eval(ffn.module.parameters())
    note_width(model)


def read_channels(model: nn.Module, tokens: Sequence[int]) -> list[mx.array]:
    """Return each layer's channels ``act(gate) * up`` of a text, ``[T, F]``."""
    channels: list[mx.array] = []

    def keep(h: mx.array) -> mx.array:
        channels.append(h[0])
        return h

    layers = ffn_layers(model)
    try:
        for block, name, module in layers:
            setattr(block, name, TappedFFN(module, keep))
        model(mx.array(list(tokens))[None])
        mx.eval(channels)
    finally:
        for block, name, module in layers:
            setattr(block, name, module)
    return channels


def compensated_down(
    down: mx.array, channels: mx.array, index: mx.array, strength: float = STRENGTH
) -> mx.array:
    """Return the kept columns of ``down_proj``, corrected for those that are dropped.

    Args:
        down, channels, index, strength: see :func:`down_correction`.

    Returns:
        ``[D, k]`` in the dtype of ``down``.
    """
    correction = down_correction(down, channels, index, strength)
    return (down[:, index].astype(mx.float32) + correction.T).astype(down.dtype)


def down_correction(
    down: mx.array, channels: mx.array, index: mx.array, strength: float = STRENGTH
) -> mx.array:
    """Return what to add to each kept column of ``down_proj``.

    With the tokens' channels split into kept ``K`` and dropped ``R``, the correction
    ``Δ`` minimises ``|K Δᵀ − R Rdownᵀ|² + λ |Δ|²``, each token counting the same. It
    is solved in whichever of the two dual forms is smaller.

    Args:
        down: ``[D, F]``, not quantised.
        channels: ``act(gate) * up`` of the dense FFN, ``[T, F]``.
        index: int32 ``[k]``, sorted, what is kept.
        strength: λ as a share of the mean energy that the kept channels have in a
            token; larger trusts the text less.

    Returns:
        ``[k, D]`` float32, one row per kept channel.
    """
    D, F = down.shape
    if index.size == F or not channels.shape[0]:
        return mx.zeros((index.size, D))
    h = channels.astype(mx.float32)
    h = h / mx.maximum(mx.linalg.norm(h, axis=1, keepdims=True), 1e-6)
    kept, all_columns = h[:, index], down.astype(mx.float32)
    missing = h @ all_columns.T - kept @ all_columns[:, index].T
    with mx.stream(mx.cpu):  # where linear systems are solved
        return _ridge(kept, missing, strength)


def _ridge(kept: mx.array, missing: mx.array, strength: float) -> mx.array:
    """Return the ridge solution of ``kept @ X = missing``, ``[k, D]``."""
    T, k = kept.shape
    penalty = strength * mx.square(kept).sum() / T
    if T <= k:
        gram = kept @ kept.T + penalty * mx.eye(T)
        return kept.T @ mx.linalg.solve(gram, missing)
    gram = kept.T @ kept + penalty * mx.eye(k)
    return mx.linalg.solve(gram, kept.T @ missing)
