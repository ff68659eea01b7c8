"""A predictor's head in closed form, from the frozen model, before training.

A head that begins at random gives all instructions nearly the same mask, and training
then makes the masks the same. Here the head begins as a ridge regression. From the
instruction it predicts how strongly the model uses each of its channels or experts, on
the instruction and the text after it: the use by each example, or the average use in
the example's group. If there are groups, the predictor alone is then trained to tell
them apart.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.optimizers import AdamW, clip_grad_norm

from ..selection.predictor import SparsityPredictor
from ..slicing.masked import masked_inlets, tapped
from ..slicing.plan import plan_of
from ..slicing.routing import saliency, tally, watched
from ..slicing.shapes import Plan
from .batches import Batch
from .step import schedule

Importance = Callable[[nn.Module, Batch], np.ndarray]

STRENGTHS = tuple(10.0**power for power in range(-4, 3))
ALWAYS = 1000.0  # a score far above all others, whose spread is 1
WEAKEST = 0.05  # directions below this share of the strongest are noise


def channel_importance(model: nn.Module, batch: Batch) -> np.ndarray:
    """Return how strongly every row uses every channel, float32 ``[B, L, F]``.

    The logarithm of the statistic of :func:`ifp_mlx.slicing.reading.scores`, over
    a row's tokens up to its last target.

    Args:
        model: the stock model, dense.
        batch: ``B`` examples.
    """
    real, energy = batch.real[:, :, None], []

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
    rows = mx.eye(len(batch.tokens))[:, :, None] * batch.real
    found: list[mx.array] = []

    def see(*routed: mx.array) -> None:
        weights = rows.reshape(len(rows), -1)
        found.append(saliency(tally(weights, plan.units, *routed)))

    with ExitStack() as stack:
        for module, layer in zip(plan.modules(model), plan.layers, strict=True):
            stack.enter_context(watched(module, layer, see))
        model(batch.tokens[:, :-1])
    return _logarithm(found)


def _logarithm(energy: list[mx.array]) -> np.ndarray:
    used = mx.sqrt(mx.stack(energy, axis=1))
    # The offset keeps hardly used units from dominating the logarithm.
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
            spread; otherwise a global prior stays, to which the instruction adds.
        decorrelate: make the instruction's part equally strong in all its directions
            except the weakest, so that similar tasks are told apart.
        importance: measures the model's use of its units.
        progress: wraps the iteration over batches.

    Returns:
        ``prior``: mean importance, float32 ``[L, F]``; ``explained``: share of the
        importance's variance over instructions that the instruction predicts, each
        example being left out of its own fit; ``rank``: directions in use.
    """
    wanted, features = [], []
    for batch in progress(batches):
        wanted.append(importance(model, batch))
        features.append(np.array(predictor.features(batch.instruction, batch.lengths)))
    y, x = np.concatenate(wanted), np.concatenate(features)
    found = solve_head(predictor, x, y, centred=centred, decorrelate=decorrelate)
    return found | {"prior": mx.array(y.mean(axis=0))}


def group_start(
    predictor: SparsityPredictor,
    model: nn.Module,
    batches: Sequence[Batch],
    later: Callable[[int], Batch],
    *,
    steps: int,
    rate: float,
    centred: bool,
    decorrelate: bool,
    importance: Importance = channel_importance,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, Any]:
    """Give a predictor masks that stay the same within a group and differ between
    groups, in place: the head in closed form, then all of it by gradient.

    Args:
        predictor: its head is solved, and all its unfrozen weights are trained.
        model: the stock model, dense.
        batches: ``N`` examples, their ``tasks`` the numbers of their groups.
        later: gives the batch of a step, whose ``tasks`` are groups too.
        steps: of training the predictor alone.
        rate: their highest learning rate.
        centred: as in :func:`warm_start`.
        decorrelate: as in :func:`warm_start`; here in all directions alike.
        importance: measures the model's use of its units.
        progress: wraps the iterations over batches and over steps.

    Returns:
        As :func:`warm_start` does; ``explained`` is the share of the groups' codes that
        the predictor explains in the last steps.
    """
    wanted, features, groups = [], [], []
    for batch in progress(batches):
        wanted.append(importance(model, batch))
        features.append(np.array(predictor.features(batch.instruction, batch.lengths)))
        groups.append(np.array(batch.tasks))
    group, y = np.concatenate(groups), np.concatenate(wanted)
    rank = predictor.reduce.weight.shape[0]
    how = {"centred": centred, "decorrelate": decorrelate}
    codes, channels, prior = _codes(y.reshape(len(y), -1), group, rank, **how)
    _set_head(predictor, np.concatenate(features), codes, group, channels)
    predictor.expand.bias = mx.array(np.zeros_like(prior) if centred else prior)
    left = _tell_apart(predictor, later, mx.array(codes), steps, rate, progress)
    about = {"explained": 1 - left, "rank": codes.shape[1]}
    return about | {"prior": mx.array(y.mean(axis=0))}


def _codes(
    used: np.ndarray, group: np.ndarray, rank: int, *, centred: bool, decorrelate: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return orthogonal codes of the groups, ``[groups, r]``, what each number of a
    code means for the channels, ``[r, L·F]``, and the mean over groups, ``[L·F]``.
    """
    found = np.unique(group)
    means = np.stack([used[group == number].mean(axis=0) for number in found])
    prior = means.mean(axis=0)
    means = means - prior
    if centred:
        means /= means.std(axis=0) + 1e-6
    u, s, vt = np.linalg.svd(means, full_matrices=False)
    some = np.flatnonzero(s > (WEAKEST if decorrelate else 1e-3) * s[0])[:rank]
    codes = np.zeros((found.max() + 1, len(some)), dtype=np.float32)
    codes[found] = u[:, some] * np.sqrt(len(found))
    strength = (np.full(len(some), s[0]) if decorrelate else s[some]) / len(
        found
    ) ** 0.5
    return codes, (vt[some] * strength[:, None]).astype(np.float32), prior


def _set_head(
    predictor: SparsityPredictor,
    features: np.ndarray,
    codes: np.ndarray,
    group: np.ndarray,
    channels: np.ndarray,
) -> None:
    """Set the head so that it predicts the code of an instruction's group."""
    x = features.astype(np.float64)
    middle = x.mean(axis=0)
    fit, _ = _ridge(x - middle, codes[group])
    fit = fit @ codes[group]  # [D, r]
    rank, (reduce, expand) = codes.shape[1], (predictor.reduce, predictor.expand)
    weights, biases = np.array(reduce.weight), np.array(reduce.bias)
    weights[:rank], biases[:rank] = fit.T, -middle @ fit
    reduce.weight, reduce.bias = mx.array(weights), mx.array(biases)
    padding = ((0, 0), (0, len(weights) - rank))  # zeros here: these may still learn
    expand.weight = mx.array(np.pad(channels.T, padding))


def _tell_apart(
    predictor: SparsityPredictor,
    batches: Callable[[int], Batch],
    codes: mx.array,
    steps: int,
    rate: float,
    progress: Callable[[Iterable], Iterable],
) -> float:
    """Train the predictor alone to predict codes; return the variance left, as a
    share.
    """
    rank = codes.shape[1]

    def loss(batch: Batch) -> mx.array:
        features = predictor.features(batch.instruction, batch.lengths)
        wanted = codes[batch.tasks]
        off = predictor.reduce(features)[:, :rank] - wanted
        return mx.square(off).sum() / mx.maximum(mx.square(wanted).sum(), 1e-9)

    predictor.expand.freeze()
    optimizer = AdamW(schedule(rate, min(20, steps // 2), steps), bias_correction=True)
    gradient = nn.value_and_grad(predictor, loss)
    ends: list[float] = []
    for number in progress(range(steps)):
        left, grads = gradient(batches(number))
        optimizer.update(predictor, clip_grad_norm(grads, 1.0)[0])
        mx.eval(predictor.parameters(), optimizer.state)
        ends = [*ends[-7:], float(left)]
    predictor.expand.unfreeze()
    return float(np.mean(ends)) if ends else float(loss(batches(0)))


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
        predictor: its head's bias is set accordingly.
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
    """Return the map ``[D, N]`` from targets to ridge coefficients, with a strength
    chosen by leave-one-out, and the share of the variance explained.
    """
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    whole = float((y**2).sum())
    power = max(float((s**2).mean()), 1e-12)  # a single example has none
    best = (-np.inf, STRENGTHS[-1])
    for strength in STRENGTHS:
        shrink = s**2 / (s**2 + strength * power)
        hat = ((u * shrink) @ u.T).astype(np.float32)
        # Centring used one degree of freedom; 1/N is its part of the leverage.
        leverage = np.minimum(np.diag(hat) + 1 / len(x), 0.999)
        left_out = (y - hat @ y) / (1 - leverage)[:, None]
        best = max(best, (1 - float((left_out**2).sum()) / max(whole, 1e-12), strength))
    explained, strength = best
    inverse = s / (s**2 + strength * power)
    # Without differences there is nothing to explain.
    return (vt.T * inverse) @ u.T, explained if whole else 0.0


def _low_rank(
    fit: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    predictor: SparsityPredictor,
    decorrelate: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Split the fitted map into the head's two matrices, ``[r, D]`` and ``[L·F, r]``.

    The values between the two have a spread of 1, so that one learning rate suits both.
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
