"""What it costs to quantise a cut ``down_proj`` again: measured on calibration text."""

import mlx.core as mx
import mlx.nn as nn

from ..selection.masks import Selection
from ..slicing.pruning import ffn_layers, slice_ffn
from .calibration import calibration_texts
from .checkpoint import IFPModel, Progress


def requantisation_cost(
    model: IFPModel,
    compact: nn.Module,
    selection: Selection,
    *,
    progress: Progress = iter,
) -> float:
    """Compare a compact model with itself, its ``down_proj`` left dequantised.

    Args:
        model: what ``compact`` was made from.
        compact: from :meth:`IFPModel.compact`; as it was, afterwards.
        selection: what it keeps; cuts quantisation groups.
        progress: wraps the iteration over layers whose groups are cut.

    Returns:
        KL of the next-token distributions, nats per token, over a few of the
        package's calibration chats.
    """
    ffns = {layer: ffn.module for layer, ffn in enumerate(ffn_layers(compact))}
    cut = _dequantised(model, selection, progress)
    quantised = {layer: ffns[layer].down_proj for layer in cut}
    nats, count = 0.0, 0
    for tokens in calibration_texts(model):
        q = _log_probabilities(compact, tokens)
        _put(ffns, cut)
        p = _log_probabilities(compact, tokens)
        _put(ffns, quantised)
        nats += float((mx.exp(p) * (p - q)).sum())
        count += len(tokens)
    return nats / count


def _dequantised(
    model: IFPModel, selection: Selection, progress: Progress
) -> dict[int, nn.Module]:
    """Return every cut layer's sliced ``down_proj`` before it is quantised again."""
    ffns = ffn_layers(model.source.open())
    found = {}
    for layer in progress(model.cut_layers(selection)):
        ffn = ffns[layer].module
        model.source.fill(ffn, layer)
        slice_ffn(ffn, selection.indices[layer], requantise=False)
        mx.eval(ffn.down_proj.parameters())
        found[layer] = ffn.down_proj
    return found


def _put(ffns: dict[int, nn.Module], downs: dict[int, nn.Module]) -> None:
    for layer, down in downs.items():
        ffns[layer].down_proj = down


def _log_probabilities(model: nn.Module, tokens: list[int]) -> mx.array:
    """Return ``[T, V]``."""
    logits = model(mx.array([tokens]))[0].astype(mx.float32)
    found = nn.log_softmax(logits, axis=-1)
    mx.eval(found)
    return found
