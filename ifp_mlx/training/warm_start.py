"""A predictor's head in closed form: what the frozen model shows, before training.

A head that begins at random gives all instructions nearly the same mask, and training
then makes the masks the same. Here the head begins as the ridge regression from the
instruction to how strongly the model uses each of its channels or experts, on the
instruction and on what follows it.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..selection.predictor import SparsityPredictor
from ..slicing.masked import masked_inlets, tapped
from ..slicing.plan import plan_of
from ..slicing.routing import saliency, tally, watched
from ..slicing.shapes import Plan
from .batches import Batch

Importance = Callable[[nn.Module, Batch], np.ndarray]

STRENGTHS = tuple(10.0**power for power in range(-4, 3))
ALWAYS = 1000.0  # a score no other comes near: those have a spread of 1
WEAKEST = 0.05  # directions below this share of the strongest are noise


def channel_importance(model: nn.Module, batch: Batch) -> np.ndarray:
    """Return how strongly every row uses every channel, float32 ``[B, L, F]``.

    The logarithm of the statistic of :func:`ifp_mlx.slicing.reading.scores`, over
    a row's tokens up to its last target.

    Args:
        model: the stock model, dense.
        batch: ``B`` examples.
    """
    real, energy = _real(batch)[:, :, None], []

    def record(h: mx.array) -> mx.array:
        square = mx.square(h.astype(mx.float32))
        share = square / mx.maximum(square.sum(axis=-1, keepdims=True), 1e-30)
        energy.append((share * real).sum(axis=1))
        return h

    inlets = masked_inlets(model) or plan_of(model).inlets(model)
    with tapped(inlets, [record] * len(inlets)):
        model(batch.tokens[:, :-1])
    return _logarithm(energy)


def expert_importance(plan: Plan, model: nn.Module, batch: Batch) -> np.ndarray:
    """Return how strongly every row uses every expert, float32 ``[B, L, E]``; like
    :func:`channel_importance`.

    Args:
        plan: of the model, of experts.
        model: the stock model, dense.
        batch: ``B`` examples.
    """
    rows = mx.eye(len(batch.tokens))[:, :, None] * _real(batch)
    found: list[mx.array] = []

    def see(*routed: mx.array) -> None:
        weights = rows.reshape(len(rows), -1)
        found.append(saliency(tally(weights, plan.units, *routed)))

    with ExitStack() as stack:
        for module, layer in zip(plan.modules(model), plan.layers, strict=True):
            stack.enter_context(watched(module, layer, see))
        model(batch.tokens[:, :-1])
    return _logarithm(found)


def _real(batch: Batch) -> mx.array:
    """Return 1 for every row's tokens up to its last target, float32 ``[B, T - 1]``."""
    later = mx.cumsum(batch.loss_mask, axis=1, reverse=True)
    return (later > 0).astype(mx.float32)[:, :-1]


def _logarithm(energy: list[mx.array]) -> np.ndarray:
    used = mx.sqrt(mx.stack(energy, axis=1))
    # The offset keeps what is hardly used from filling the logarithm's scale.
    return np.array(mx.log(used + 0.1 * used.mean(axis=-1, keepdims=True)))


def warm_start(
    predictor: SparsityPredictor,
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    centred: bool,
    decorrelate: bool,
    importance: Importance = channel_importance,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, Any]:
    """Solve the predictor's head from some training examples, in place.

    Args:
        predictor: its backbone stays as it is.
        model: the stock model, dense.
        batches: ``N`` examples, some hundreds.
        centred: leave out the mean over instructions, and give every channel the same
            spread; else a global prior remains, to which the instruction adds.
        decorrelate: make the instruction's part equally strong in all the directions
            it has, but for the weakest, so that similar tasks are told apart.
        importance: measures the model's use of its units.
        progress: wraps the iteration over batches.

    Returns:
        ``prior``: mean importance, float32 ``[L, F]``; ``explained``: share of the
        importance's variance over instructions that the instruction predicts, each
        example left out of its own fit in turn; ``rank``: directions in use.
    """
    wanted, features = [], []
    for batch in progress(batches):
        wanted.append(importance(model, batch))
        features.append(np.array(predictor.features(batch.instruction, batch.lengths)))
    y, x = np.concatenate(wanted), np.concatenate(features)
    found = solve_head(predictor, x, y, centred=centred, decorrelate=decorrelate)
    return found | {"prior": mx.array(y.mean(axis=0))}


def solve_head(
    predictor: SparsityPredictor,
    features: np.ndarray,
    importance: np.ndarray,
    *,
    centred: bool,
    decorrelate: bool,
) -> dict[str, Any]:
    """Solve the predictor's head from what was measured on ``N`` examples, in place.

    Args:
        predictor: its backbone stays as it is.
        features: what the head reads of every example, ``[N, D]``.
        importance: of :func:`channel_importance`, ``[N, L, F]``.
        centred: as in :func:`warm_start`.
        decorrelate: as in :func:`warm_start`.

    Returns:
        ``explained`` and ``rank``, as :func:`warm_start` gives them.
    """
    x = features.astype(np.float64)
    y = importance.reshape(len(importance), -1)
    prior, middle = y.mean(axis=0), x.mean(axis=0)
    y = y - prior
    if centred:
        y /= y.std(axis=0) + 1e-6
    fit, explained = _ridge(x - middle, y)
    reduce, expand = _low_rank(fit, x - middle, y, predictor, decorrelate)
    rank = len(reduce)
    head = predictor.reduce, predictor.expand
    weights, biases = np.array(head[0].weight), np.array(head[0].bias)
    weights[:rank], biases[:rank] = reduce, -reduce @ middle
    padding = ((0, 0), (0, len(weights) - rank))  # zeros here: these may still learn
    head[0].weight, head[0].bias = mx.array(weights), mx.array(biases)
    head[1].weight = mx.array(np.pad(expand, padding).astype(np.float32))
    head[1].bias = mx.array(np.zeros_like(prior) if centred else prior)
    return {"explained": explained, "rank": rank}


def scale_layers(
    predictor: SparsityPredictor, batches: Iterable[Batch], *, centred: bool
) -> None:
    """Give the scores of every layer a spread of 1 over its channels, in place.

    The scale becomes part of the head, so training and inference cannot differ in it.

    Args:
        predictor: its head is scaled.
        batches: some examples to measure the spread on.
        centred: also take away each channel's mean over the instructions.
    """
    found = [np.array(predictor(batch.instruction, batch.lengths)) for batch in batches]
    scores = np.concatenate(found)
    mean = scores.mean(axis=0) if centred else np.zeros_like(scores[0])
    spread = (scores - mean).std(axis=-1).mean(axis=0)  # [L]
    factor = np.repeat(1 / np.maximum(spread, 1e-6), predictor.channels)
    expand = predictor.expand
    expand.weight = expand.weight * mx.array(factor.astype(np.float32))[:, None]
    bias = (np.array(expand.bias) - mean.ravel()) * factor
    expand.bias = mx.array(bias.astype(np.float32))


def share_channels(
    predictor: SparsityPredictor, prior: mx.array, shared: int, granularity: int
) -> None:
    """Keep the most used channels of every layer for all instructions, in place.

    Args:
        predictor: its head's bias says so from now on.
        prior: ``[L, F]``.
        shared: channels per layer, a multiple of ``granularity``.
        granularity: channels per selectable block.
    """
    L, F = prior.shape
    blocks = np.array(prior).reshape(L, F // granularity, granularity).mean(axis=-1)
    order = np.argsort(-blocks, axis=-1, kind="stable")[:, : shared // granularity]
    bonus = np.zeros_like(blocks)
    np.put_along_axis(bonus, order, ALWAYS, axis=-1)
    bonus = np.repeat(bonus, granularity, axis=-1).ravel()
    predictor.expand.bias = predictor.expand.bias + mx.array(bonus.astype(np.float32))


def _ridge(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the map ``[D, N]`` from targets to ridge coefficients, its strength chosen
    by leaving one out, and the share of the variance explained then.
    """
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    best = (-np.inf, STRENGTHS[-1])
    for strength in STRENGTHS:
        shrink = s**2 / (s**2 + strength * (s**2).mean())
        hat = ((u * shrink) @ u.T).astype(np.float32)
        # Centring used one degree of freedom; 1/N is its part of the leverage.
        leverage = np.minimum(np.diag(hat) + 1 / len(x), 0.999)
        left_out = (y - hat @ y) / (1 - leverage)[:, None]
        best = max(best, (1 - float((left_out**2).sum() / (y**2).sum()), strength))
    explained, strength = best
    inverse = s / (s**2 + strength * (s**2).mean())
    return (vt.T * inverse) @ u.T, explained


def _low_rank(
    fit: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    predictor: SparsityPredictor,
    decorrelate: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Split the fitted map into the head's two matrices, ``[r, D]`` and ``[L·F, r]``.

    What passes between the two has a spread of 1, so that one learning rate suits both.
    """
    fitted = (x @ fit).astype(np.float32) @ y  # [N, L·F]
    power, u = np.linalg.eigh(fitted @ fitted.T)
    largest = np.argsort(-power)[: predictor.reduce.weight.shape[0]]
    s, u = np.sqrt(np.maximum(power[largest], 1e-20)), u[:, largest]
    some = s > (WEAKEST if decorrelate else 1e-3) * s[0]
    s, u = s[some], u[:, some]
    v = (fitted.T @ u) / s
    to_unit = s / np.sqrt(len(x))
    reduce = (fit @ (y @ v) / to_unit).T
    strength = np.sqrt(to_unit * to_unit[0]) if decorrelate else to_unit
    return reduce.astype(np.float32), (v * strength).astype(np.float32)
