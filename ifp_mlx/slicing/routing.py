"""Which experts get a token in a mixture, and what they contribute.

mlx-lm's blocks multiply gate weights in by themselves, each in its own way, so no hook
sees them. But the derivative of what a block returns with respect to what an expert
returned is that expert's gate weight, whatever the block is.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..selection.masks import Selection
from .masked import becoming
from .shapes import LayerPlan, Plan, at

# Statistics of an expert: what it contributed, its gate weights, and its tokens.
CONTRIBUTION, MASS, COUNT = range(3)

See = Callable[[mx.array, mx.array, mx.array], None]


@contextmanager
def watched(module: nn.Module, layer: LayerPlan, see: See) -> Iterator[None]:
    """Let a function see every routing that a layer makes inside the ``with`` block.

    Args:
        module: the layer's, of a plan of experts.
        layer: its plan.
        see: gets the chosen experts, integers ``[N, K]``, their gate weights, float32
            ``[N, K]``, and the length of what each returned, float32 ``[N, K]``, for
            the ``N`` tokens of a call. Where a block does more than add up what its
            experts return, gate weights are known only up to a factor for each token.
    """
    above, _, name = layer.experts.rpartition(".")
    call = partial(_watched_call, name, see)
    with becoming([at(module, above)], "Watched", [call]):
        yield


def _watched_call(name: str, see: See, stock: type) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        experts = getattr(self, name)
        made: list[mx.array] = []

        def remember(x: mx.array, indices: mx.array, *more: Any) -> mx.array:
            made[:] = indices, experts(x, indices, *more)
            return made[1]

        def run(answer: Callable[..., mx.array]) -> mx.array:
            setattr(self, name, answer)
            return stock.__call__(self, *args, **kwargs)

        try:
            output = run(remember)
            indices, outputs = made
            ones = mx.ones(output.shape, output.dtype)
            _, (slopes,) = mx.vjp(lambda y: run(lambda *_: y), [outputs], [ones])
        finally:
            setattr(self, name, experts)
        chosen = indices.reshape(-1, indices.shape[-1])
        gates, lengths = _lengths(slopes) / outputs.shape[-1] ** 0.5, _lengths(outputs)
        see(chosen, gates.reshape(chosen.shape), lengths.reshape(chosen.shape))
        return output

    return call


def _lengths(vectors: mx.array) -> mx.array:
    return mx.linalg.norm(vectors.astype(mx.float32), axis=-1)


@contextmanager
def overheard(
    model: nn.Module, plan: Plan
) -> Iterator[tuple[list[mx.array], list[mx.array]]]:
    """Record the routers' logits and the experts they choose, of all that is computed
    inside the ``with`` block; gradients flow through the logits.

    Args:
        model: of this plan, its routers giving logits; masked and adapted, or not.
        plan: of experts.

    Yields:
        Two lists that fill up, a layer at a time: logits ``[..., E]``, masks already
        applied, and the chosen experts, integers ``[..., K]``.
    """
    logits: list[mx.array] = []
    chosen: list[mx.array] = []
    pairs = zip(plan.modules(model), plan.layers, strict=True)
    experts = [at(module, layer.experts) for module, layer in pairs]
    routers = plan.inlets(model)
    hearing = [partial(_logits_call, logits)] * len(routers)
    seeing = [partial(_choice_call, chosen)] * len(experts)
    with becoming(routers, "Heard", hearing), becoming(experts, "Heard", seeing):
        yield logits, chosen


def _logits_call(logits: list[mx.array], stock: type) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> mx.array:
        logits.append(stock.__call__(self, *args, **kwargs))
        return logits[-1]

    return call


def _choice_call(chosen: list[mx.array], stock: type) -> Any:
    def call(self: Any, x: mx.array, indices: mx.array, *more: Any) -> mx.array:
        chosen.append(indices)
        return stock.__call__(self, x, indices, *more)

    return call


def tally(
    weights: mx.array, E: int, chosen: mx.array, gates: mx.array, lengths: mx.array
) -> mx.array:
    """Return the statistics of each expert over some tokens, float32 ``[W, 3, E]``.

    Args:
        weights: how much each token counts, float32 ``[W, N]``.
        E: how many experts there are.
        chosen, gates, lengths: of ``N`` tokens, as :func:`watched` gives them.
    """
    each = mx.stack([gates * lengths, gates, mx.ones(gates.shape)])
    values = (weights[:, None, :, None] * each).reshape(*weights.shape[:1], 3, -1)
    found = mx.zeros((*values.shape[:2], E))
    return found.at[:, :, chosen.flatten()].add(values)


def saliency(use: mx.array) -> mx.array:
    """Return each expert's score from its statistics.

    Args:
        use: float32 ``[..., 3, E]``, of :func:`tally`.

    Returns:
        float32 ``[..., E]``: gate weight times length of the output, summed over the
        tokens that the expert got.

    Source: REAP, Lasby et al. 2025 (arXiv:2510.13999) eq. 9, which takes the mean.
    """
    return use[..., CONTRIBUTION, :]


def mass_share(uses: mx.array, selection: Selection) -> float:
    """Return the share of all gate weights that the kept experts had, 0 to 1.

    Args:
        uses: float32 ``[L, 3, E]``, over the text that selected.
        selection: of the same model.
    """
    mass = np.array(uses[:, MASS])
    kept = [
        row[np.array(i)].sum() for row, i in zip(mass, selection.indices, strict=True)
    ]
    return float(sum(kept) / max(mass.sum(), 1e-30))


def slots_of(model: nn.Module, plan: Plan) -> int:
    """Return ``K``, the experts that each token is sent to; no weight is read."""
    seen: list[int] = []
    module, layer = plan.modules(model)[0], plan.layers[0]

    def see(chosen: mx.array, gates: mx.array, lengths: mx.array) -> None:
        seen.append(chosen.shape[-1])

    with watched(module, layer, see):
        model(mx.array([[0]]))
    return seen[0]
