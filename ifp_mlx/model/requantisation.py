"""What it costs to quantise a cut ``down_proj`` again: measured on calibration text."""

import mlx.core as mx
import mlx.nn as nn

from ..files.progress import ProgressBar
from ..selection.masks import Selection
from ..slicing.shapes import at, put_at
from ..slicing.sliced import cut
from ..slicing.stock import log_softmax
from .calibration import calibration_texts
from .checkpoint import IFPModel


def requantisation_cost(
    model: IFPModel,
    compact: nn.Module,
    selection: Selection,
    *,
    progress: ProgressBar = iter,
) -> float:
    """Return what a compact model loses because its ``down_proj`` is quantised again.

    Args:
        model: what ``compact`` was made from.
        compact: from :meth:`IFPModel.compact`; unchanged afterwards.
        selection: what it keeps; cuts quantisation groups.
        progress: wraps the iteration over layers whose groups are cut.

    Returns:
        KL of the next-token distributions, nats per token, over a few of the
        package's calibration chats.
    """
    cut_ones = _dequantised(model, selection, progress)
    inlets = model.plan.inlets(compact)
    quantised = {layer: inlets[layer] for layer in cut_ones}
    nats, count = 0.0, 0
    for tokens in calibration_texts(model):
        q = log_softmax(compact(mx.array([tokens]))[0])
        _put(model, compact, cut_ones)
        p = log_softmax(compact(mx.array([tokens]))[0])
        _put(model, compact, quantised)
        nats += float((mx.exp(p) * (p - q)).sum())
        count += len(tokens)
    return nats / count


def _dequantised(
    model: IFPModel, selection: Selection, progress: ProgressBar
) -> dict[int, nn.Module]:
    """Return every cut layer's sliced inlet before it is quantised again."""
    plan, modules = model.plan, model.plan.modules(model.source.open())
    found = {}
    for number in progress(model.cut_layers(selection)):
        module, layer = modules[number], plan.layers[number]
        model.source.fill(module, number)
        cut(module, layer, selection.indices[number], plan.units, requantise=False)
        found[number] = at(module, layer.inlet)
        mx.eval(found[number].parameters())
    return found


def _put(model: IFPModel, compact: nn.Module, inlets: dict[int, nn.Module]) -> None:
    for number, inlet in inlets.items():
        layer = model.plan.layers[number]
        put_at(at(compact, layer.path), layer.inlet, inlet)
