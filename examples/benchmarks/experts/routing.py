"""The training of a mixture's routers; the model itself stays stock.

All experts shall be used: a load-balancing loss sees to that. It is taken over a whole
batch, hence over all domains, so that a single domain may use few of them. And each
document shall use few: its tokens choose from a pool, the experts that its prompts find
likeliest; the pool's size is drawn anew for every step. A document here is a batch's
questions of one domain; a single question is too short to be one.

Sources: the loss is eq. 4 of Fedus et al. 2021 (arXiv:2101.03961), with the choices of
top 2 as in Lepikhin et al. 2020 (arXiv:2006.16668), over the whole batch as in Qiu et
al. 2025 (arXiv:2501.11873), who trained Qwen3's mixtures so. The pools are those of EMO
(Ai2 2026, arXiv:2605.06663), where all of a document chooses its pool; here only its
prompts do, so that the pool reveals nothing of the answers.
"""

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.slicing.plan import plan_of
from ifp_mlx.training.batches import Batch


class Reading(NamedTuple):
    """What routers must know about a batch besides its tokens.

    Attributes:
        real: 1 where a token is read, and not padding, float32 ``[B, T - 1]``.
        prompt: 1 where it is one of the prompt, float32 ``[B, T - 1]``.
        document: 1 where two rows are of one document, float32 ``[B, B]``.
        pools: experts of each row's pool, int ``[B, 1]``, or ``None`` for all.
    """

    real: mx.array
    prompt: mx.array
    document: mx.array
    pools: mx.array | None


def read(batch: Batch, sizes: list[int] | None) -> Reading:
    """Return what routers must know about a batch.

    Args:
        batch: its prompts are what comes before the first target.
        sizes: experts of the pool of each domain, by number; ``None``: no pools.
    """
    assert batch.tasks is not None
    targets, tasks = batch.loss_mask, batch.tasks
    real = mx.cumsum(targets, axis=1, reverse=True)[:, 1:] > 0
    prompt = mx.cumsum(targets, axis=1)[:, :-1] == 0
    document = tasks[:, None] == tasks[None]
    pools = None if sizes is None else mx.array(sizes)[tasks][:, None]
    real, prompt, document = (
        found.astype(mx.float32) for found in (real, prompt, document)
    )
    return Reading(real, prompt, document, pools)


class Router(nn.Linear):
    """A stock router in training: it chooses within pools, and adds up its loss."""

    _reading: Reading
    _top_k: int
    _imbalance: mx.array

    def __call__(self, x: mx.array) -> mx.array:
        """Return the logits ``[B, T - 1, E]``, −∞ outside of a row's pool."""
        logits, reading = super().__call__(x), self._reading
        chances = mx.softmax(logits, axis=-1)
        if reading.pools is not None:
            likely = likelihood(mx.stop_gradient(chances), reading)
            inside = mx.argsort(mx.argsort(-likely)) < reading.pools
            logits = mx.where(inside[:, None], logits, -mx.inf)
        self._imbalance = imbalance(chances, logits, reading.real, self._top_k)
        return logits


def routers_in_training(model: nn.Module, top_k: int) -> list[Router]:
    """Make the routers of a stock mixture into :class:`Router`, in place."""
    routers = plan_of(model, unit="expert").inlets(model)
    for router in routers:
        router.__class__ = Router
        router._top_k = top_k
    return routers


def likelihood(chances: mx.array, reading: Reading) -> mx.array:
    """Return how likely the prompts of each row's document find each expert, ``[B,
    E]``: the sum over the document's rows, of which only the order counts.

    Args:
        chances: of each expert at each token, ``[B, T - 1, E]``.
        reading: of the batch.
    """
    weight = reading.prompt / reading.prompt.sum(axis=1, keepdims=True)
    return reading.document @ (chances * weight[..., None]).sum(axis=1)


def imbalance(
    chances: mx.array, logits: mx.array, real: mx.array, top_k: int
) -> mx.array:
    """Return the load-balancing loss of one layer; 1 is the same use of all experts.

    Args:
        chances: of each expert at each token, ``[B, T, E]``.
        logits: by which tokens choose, same shape.
        real: 1 where there is a token, float32 ``[B, T]``.
        top_k: experts that a token chooses.

    Returns:
        E · Σ f·P, where f is the share of all choices that fall on an expert, and P
        its mean chance.
    """
    ranked = mx.stop_gradient(logits)
    least = mx.sort(ranked, axis=-1)[..., -top_k, None]
    chosen = ((ranked >= least) * real[..., None]).sum(axis=(0, 1))
    mean = (chances * real[..., None]).sum(axis=(0, 1)) / real.sum()
    return chances.shape[-1] * (chosen / chosen.sum() * mean).sum()
