"""The training-free sources of channel scores. Each returns float32 ``[L, F]``.

Rankings by weight magnitude are not offered: at keep 0.5 they leave a model that
speaks noise (KL to the dense model about 12 nats per token on SmolLM2-135M).
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .pruning import FFN, TappedFFN, ffn_layers

SELECTORS = ("auto", "predictor", "activation", "prior", "blend", "random")
PREFILL_STEP = 512


def activation_scores(model: nn.Module, tokens: Sequence[int]) -> mx.array:
    """Score channels by how strongly the tokens of one text use them.

    Every token's channels are normalised to length 1, so that no single token
    (the first one has huge activations) decides; a channel's score is its l2 norm
    over all tokens, template included.

    Args:
        model: the dense stock model; its weights are read if they are still lazy.
        tokens: ``T`` ids.

    Returns:
        ``[L, F]`` float32, not negative.

    Source: GRIFFIN, Dong et al. 2024 (arXiv:2404.01365) sec. 4.
    """
    return mx.sqrt(_energy(model, tokens))


def prior_scores(
    model: nn.Module,
    texts: Sequence[Sequence[int]],
    *,
    progress: Callable[[Iterable], Iterable] = iter,
) -> mx.array:
    """Score channels by how strongly a calibration text uses them: a property of the
    model, computed once.

    Args:
        model: the dense stock model.
        texts: token ids of each text; every token of all texts counts the same.
        progress: wraps the iteration over texts, for a progress bar.

    Returns:
        ``[L, F]`` float32, the statistic of :func:`activation_scores`.

    Source: the global ranking of GLASS (arXiv:2508.14302).
    """
    energy = mx.array(0.0)
    for tokens in progress(texts):
        energy = energy + _energy(model, tokens)
        mx.eval(energy)
    return mx.sqrt(energy)


def blend_scores(local: mx.array, prior: mx.array, weight: float = 0.5) -> mx.array:
    """Aggregate two rankings of the channels, layer by layer.

    Args:
        local: ``[L, F]``, of this instruction.
        prior: ``[L, F]``, of the model.
        weight: share of the prior, 0 to 1.

    Returns:
        ``[L, F]`` float32 in [0, 1]: the weighted mean of the two ranks.

    Source: GLASS (arXiv:2508.14302).
    """
    return (1 - weight) * _ranks(local) + weight * _ranks(prior)


def random_scores(layers: int, channels: int, seed: int = 0) -> mx.array:
    """Return random scores, ``[L, F]``: the baseline every selector must beat."""
    rng = np.random.default_rng(seed)
    return mx.array(rng.random((layers, channels), dtype=np.float32))


def calibration_chats() -> list[list[dict[str, str]]]:
    """Return the dialogues that ship with the package, written for it."""
    text = files("ifp_mlx").joinpath("calibration.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["messages"] for line in text.splitlines()]


def _energy(model: nn.Module, tokens: Sequence[int]) -> mx.array:
    from mlx_lm.models.cache import make_prompt_cache

    if not len(tokens):
        raise ValueError("The instruction has no tokens; give some text.")
    with _recording(model) as energy:
        cache = make_prompt_cache(model)
        for start in range(0, len(tokens), PREFILL_STEP):
            # The logits are never evaluated, so the output layer costs nothing.
            step = list(tokens[start : start + PREFILL_STEP])
            model(mx.array(step)[None], cache=cache)
            mx.eval(energy, [layer.state for layer in cache])
    return mx.stack(energy)


@contextmanager
def _recording(model: nn.Module) -> Iterator[list[mx.array]]:
    """Collect each channel's energy while the model runs, then leave no trace."""
    layers = ffn_layers(model)
    energy = [mx.zeros(ffn.module.gate_proj.weight.shape[0]) for ffn in layers]

    def tap(layer: int) -> Callable[[mx.array], mx.array]:
        def record(h: mx.array) -> mx.array:
            square = mx.square(h.astype(mx.float32))
            share = square / mx.maximum(square.sum(axis=-1, keepdims=True), 1e-30)
            energy[layer] = energy[layer] + share.sum(axis=(0, 1))
            return h

        return record

    try:
        for number, (block, name, module) in enumerate(layers):
            setattr(block, name, TappedFFN(module, tap(number)))
        yield energy
    finally:
        _restore(layers)


def _restore(layers: list[FFN]) -> None:
    for block, name, module in layers:
        setattr(block, name, module)


def _ranks(scores: mx.array) -> mx.array:
    order = np.argsort(np.array(scores), axis=-1, kind="stable")
    ranks = np.argsort(order, axis=-1, kind="stable")
    return mx.array(ranks.astype(np.float32) / (scores.shape[-1] - 1))
