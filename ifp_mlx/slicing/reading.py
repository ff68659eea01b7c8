"""Measure how strongly a dense model uses each unit while it reads texts.

Rankings by the size of weights are not offered: they leave a model that writes noise.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import routing, stock
from .masked import tapped
from .shapes import LayerPlan, Plan, Unit, at
from .sliced import count_units
from .stock import standing_in, steps_of

FFN_STEP = 512  # tokens that go through a layer at once: [T, F] is the largest array

Visit = Callable[..., Any]
See = Callable[[mx.array, mx.array], None]
Example = Sequence[Sequence[int]]  # token ids of one text, in parts


@dataclass(frozen=True)
class Texts:
    """Texts that go through a model together.

    Attributes:
        tokens: int32 ``[B, T]``, padded on the right, which changes no real token.
        weights: float32 ``[W, B, T]``: for each of ``W`` parts of a text, 1 at the
            part's tokens, else 0.
    """

    tokens: mx.array
    weights: mx.array


def batches_of(examples: Sequence[Example]) -> list[Texts]:
    """Return texts in batches that go through a model in one step each; a text longer
    than a step is a batch of its own.

    Args:
        examples: each in the same number ``W`` of parts, read one after another: a
            prompt and its answer, or one part that is all.

    Raises:
        ValueError: if one has no tokens.
    """
    if not all(any(len(part) for part in parts) for parts in examples):
        raise ValueError("The instruction has no tokens; give some text.")
    batches: list[list[Example]] = []
    for parts in sorted(examples, key=_length):
        rows = batches[-1] + [parts] if batches else [parts]
        if batches and len(rows) * _length(parts) <= stock.PREFILL_STEP:
            batches[-1] = rows
        else:
            batches.append([parts])
    return [padded(rows) for rows in batches]


def _length(parts: Example) -> int:
    return sum(map(len, parts))


def padded(rows: Sequence[Example]) -> Texts:
    """Return texts as they go through a model together; see :func:`batches_of`."""
    shape = (len(rows), max(map(_length, rows)))
    tokens = np.zeros(shape, dtype=np.int32)
    weights = np.zeros((len(rows[0]), *shape), dtype=np.float32)
    for number, parts in enumerate(rows):
        start = 0
        for part, ids in enumerate(parts):
            tokens[number, start : start + len(ids)] = ids
            weights[part, number, start : start + len(ids)] = 1
            start += len(ids)
    return Texts(mx.array(tokens), mx.array(weights))


def scores(
    model: nn.Module,
    plan: Plan,
    examples: Sequence[Example],
    *,
    progress: Callable[[Iterable], Iterable] = iter,
) -> mx.array:
    """Score units by how strongly some texts use them.

    Args:
        model: the dense stock model; its weights are read if they are still lazy.
        plan: its plan.
        examples: as for :func:`batches_of`: an instruction alone, a calibration text
            for the prior, or a task's prompts and answers.
        progress: wraps the iteration over batches, for a progress bar.

    Returns:
        ``[L, F]`` float32, not negative; see :func:`scores_of`.
    """
    modules = plan.modules(model)
    uses = [mx.array(0.0)] * len(modules)

    def visit(layer: int, weights: mx.array, *args: Any, **kwargs: Any) -> Any:
        read = partial(read_layer, modules[layer], plan.layers[layer], weights)
        output, use = read(*args, **kwargs)
        uses[layer] = uses[layer] + use
        return output

    for texts in progress(batches_of(examples)):
        read_text(model, plan, texts, visit)
        mx.eval(uses)
    return mx.stack([scores_of(plan.unit, use) for use in uses])


def scores_of(unit: Unit, use: mx.array) -> mx.array:
    """Return the scores of one layer's units.

    A channel's score is its l2 norm over all tokens, each of which is normalised to
    length 1 over its channels, so that no single token (the first one has huge
    activations) decides: GRIFFIN, Dong et al. 2024 (arXiv:2404.01365) sec. 4. An
    expert's is the root of its :func:`ifp_mlx.slicing.routing.saliency`. All parts of a
    text count the same, however long they are.

    Args:
        unit: what they are.
        use: from :func:`read_layer`, added up over texts: ``[W, F]`` of channels,
            ``[W, 3, E]`` of experts.

    Returns:
        ``[F]`` or ``[E]`` float32, not negative.
    """
    energy = use if unit == "channel" else routing.saliency(use)
    if len(energy) > 1:
        energy = energy / mx.maximum(energy.sum(axis=-1, keepdims=True), 1e-30)
    return mx.sqrt(energy.sum(axis=0))


def read_text(
    model: nn.Module, plan: Plan, texts: Texts, visit: Visit, *, kv: bool = True
) -> tuple[list[Any], mx.array]:
    """Run texts through a dense model, its layers' modules computed by ``visit``.

    The forward pass is mlx-lm's own. The output layer is not computed.

    Args:
        model: unchanged afterwards.
        plan: its plan.
        texts: they go through in :func:`steps_of`.
        visit: computes what the module of a layer does, by number, with the weights
            of the step's tokens, ``[W, B, T]``, and the arguments of the module. It is
            called in :func:`order_of`.
        kv: whether a KV cache is kept; texts of several steps need one.

    Returns:
        The texts' KV cache, as mlx-lm makes it, or none, and the logits of the last step,
        not computed.
    """
    from mlx_lm.models.cache import make_prompt_cache

    if not kv and texts.tokens.shape[1] <= stock.PREFILL_STEP:
        with computed_by(model, plan, visit, texts.weights):
            return [], model(texts.tokens)
    cache = make_prompt_cache(model)
    for part in steps_of(range(texts.tokens.shape[1])):
        now = slice(part[0], part[-1] + 1)
        with computed_by(model, plan, visit, texts.weights[..., now]):
            logits = model(texts.tokens[:, now], cache=cache)
            mx.eval([layer.state for layer in cache])
    return cache, logits


def order_of(model: nn.Module, plan: Plan) -> list[int]:
    """Return the layers in the order in which one forward pass goes through them: each
    once, except in model types that loop over their layers. No weight is read for it.
    """
    from mlx_lm.models.cache import make_prompt_cache

    order: list[int] = []
    modules = plan.modules(model)

    def note(layer: int, *args: Any, **kwargs: Any) -> Any:
        order.append(layer)
        return modules[layer](*args, **kwargs)

    with computed_by(model, plan, note):
        model(mx.array([[0]]), cache=make_prompt_cache(model))
    return order


@contextmanager
def computed_by(
    model: nn.Module, plan: Plan, visit: Visit, *first: mx.array
) -> Iterator[None]:
    """Let ``visit`` compute the modules of a model's layers inside the ``with`` block.

    Args:
        model: in memory or not.
        plan: its plan.
        visit: gets the number of a layer, ``first``, and the module's arguments.
        first: the same in every call.
    """
    calls = {path: partial(visit, n, *first) for n, path in enumerate(plan.paths)}
    with standing_in(model, calls):
        yield


def read_layer(
    module: nn.Module,
    layer: LayerPlan,
    weights: mx.array,
    x: mx.array,
    *args: Any,
    seen: See | None = None,
    **kwargs: Any,
) -> tuple[Any, mx.array]:
    """Compute one layer's module, and how strongly each of its units was used.

    Args:
        module: the stock module; its weights are read if they are still lazy.
        layer: its plan.
        weights: how much each token counts, in each of ``W`` parts, ``[W, B, T]``.
        x: ``[B, T, D]``.
        args, kwargs: what the module gets besides; then all tokens go through at once.
        seen: gets the channels, as they come into the inlet, ``[<= FFN_STEP, F]``, and
            how much each token counts, ``[W, <= FFN_STEP]``, of one part of the tokens
            after the other.

    Returns:
        The output, as of the module, and each unit's use: float32 ``[W, F]`` of
        channels, or ``[W, 3, E]`` of experts (:func:`ifp_mlx.slicing.routing.tally`);
        both are computed, so that the weights are no longer needed.
    """
    use, counting = mx.array(0.0), weights

    def count(*found: mx.array) -> None:
        nonlocal use
        w = counting.reshape(len(counting), -1)
        use = use + _use(layer, module, w, *found)

    def record(h: mx.array) -> mx.array:
        count(h.reshape(-1, h.shape[-1]))
        if seen is not None:
            seen(h.reshape(-1, h.shape[-1]), counting.reshape(len(counting), -1))
        return h

    if layer.experts:
        watching: Any = routing.watched(module, layer, count)
    else:
        watching = tapped([at(module, layer.inlet)], [record])
    step = x.shape[1] if args or kwargs else max(1, FFN_STEP // len(x))
    outputs = []
    with watching:
        for start in range(0, x.shape[1], step):
            counting = weights[:, :, start : start + step]
            outputs.append(module(x[:, start : start + step], *args, **kwargs))
            mx.eval(outputs[-1], use)
    output = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=1)
    mx.eval(output)
    return output, use


def _use(
    layer: LayerPlan, module: nn.Module, weights: mx.array, *found: mx.array
) -> mx.array:
    """Return the use of a layer's units by tokens of weights ``[W, N]``."""
    if layer.experts:
        return routing.tally(weights, count_units(module, layer), *found)
    square = mx.square(found[0].astype(mx.float32))
    share = square / mx.maximum(square.sum(axis=-1, keepdims=True), 1e-30)
    return weights @ share
