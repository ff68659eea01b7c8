"""The training-free sources of channel scores. Each returns float32 ``[L, F]``.

Rankings by weight magnitude are not offered: at keep 0.5 they leave a model that
speaks noise (KL to the dense model about 12 nats per token on SmolLM2-135M).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .pruning import TappedFFN, ffn_layers

PREFILL_STEP = 2048  # tokens that go through the model at once, as in mlx-lm


FFN_STEP = 512


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


def task_scores(
    model: nn.Module,
    examples: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    progress: Callable[[Iterable], Iterable] = iter,
) -> mx.array:
    """Score channels by how strongly a task's prompts and its answers use them.

    Prompts and answers have the same say, however long they are.

    Args:
        model: the dense stock model.
        examples: token ids of each prompt and its answer, which may be empty.
        progress: wraps the iteration over examples.

    Returns:
        ``[L, F]`` float32, not negative.
    """
    prompts = both = mx.array(0.0)
    for prompt, answer in progress(examples):
        energy = _energy(model, prompt)
        prompts = prompts + energy
        # What a token uses does not depend on those after it.
        both = both + (_energy(model, [*prompt, *answer]) if answer else energy)
        mx.eval(prompts, both)
    answers = mx.maximum(both - prompts, 0)
    return mx.sqrt(_shares(prompts) + _shares(answers))


def read_text(
    model: nn.Module,
    tokens: Sequence[int],
    visit: Callable[[int, mx.array], mx.array],
) -> list[Any]:
    """Run a text through a dense model, its FFNs computed by ``visit``.

    The forward pass is mlx-lm's own. The output layer is not computed.

    Args:
        model: as it was, afterwards.
        tokens: ``T`` ids; they go through in :func:`steps_of`.
        visit: computes the FFN of a layer, by number, ``[1, T, D]`` to ``[1, T, D]``.
            It is called layer after layer, :func:`visits_of` times in every step.

    Returns:
        The text's KV cache, as mlx-lm makes it.

    Raises:
        ValueError: if there are no tokens.
    """
    from mlx_lm.models.cache import make_prompt_cache

    if not len(tokens):
        raise ValueError("The instruction has no tokens; give some text.")
    cache = make_prompt_cache(model)
    with _computed_by(model, visit):
        for step in steps_of(tokens):
            model(mx.array(step)[None], cache=cache)
            mx.eval([layer.state for layer in cache])
    return cache


def visits_of(model: nn.Module) -> list[int]:
    """Return how often each layer is gone through in one forward pass: once, but for
    model types that loop over their layers. No weight is read to find out.
    """
    from mlx_lm.models.cache import make_prompt_cache

    visits = [0] * len(ffn_layers(model))

    def count(layer: int, x: mx.array) -> mx.array:
        visits[layer] += 1
        return x

    with _computed_by(model, count):
        model(mx.array([[0]]), cache=make_prompt_cache(model))
    return visits


@contextmanager
def _computed_by(
    model: nn.Module, visit: Callable[[int, mx.array], mx.array]
) -> Iterator[None]:
    layers = ffn_layers(model)
    try:
        for number, (block, name, _) in enumerate(layers):
            setattr(block, name, partial(visit, number))
        yield
    finally:
        for block, name, module in layers:
            setattr(block, name, module)


def steps_of(tokens: Sequence[int]) -> list[list[int]]:
    """Return the parts in which a text goes through the model; the last is whole."""
    ends = range(len(tokens), 0, -PREFILL_STEP)
    return [list(tokens[max(0, end - PREFILL_STEP) : end]) for end in reversed(ends)]


def read_ffn(
    ffn: nn.Module, x: mx.array, seen: list[mx.array] | None = None
) -> tuple[mx.array, mx.array]:
    """Compute one FFN, and how strongly each of its channels was used.

    Args:
        ffn: the stock module; its weights are read if they are still lazy.
        x: ``[1, T, D]``.
        seen: gets the channels ``act(gate) * up`` of one part of the tokens after the
            other, ``[<= FFN_STEP, F]``.

    Returns:
        The output ``[1, T, D]``, and each channel's energy, float32 ``[F]``; both
        computed, so that nothing needs the weights any more.
    """
    energy = mx.zeros(ffn.gate_proj.weight.shape[0])

    def record(h: mx.array) -> mx.array:
        nonlocal energy
        square = mx.square(h.astype(mx.float32))
        share = square / mx.maximum(square.sum(axis=-1, keepdims=True), 1e-30)
        energy = energy + share.sum(axis=(0, 1))
        if seen is not None:
            seen.append(h[0])
        return h

    outputs = []
    for start in range(0, x.shape[1], FFN_STEP):  # [T, F] is the largest array of all
        outputs.append(TappedFFN(ffn, record)(x[:, start : start + FFN_STEP]))
        mx.eval(outputs[-1], energy)
    output = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=1)
    mx.eval(output)
    return output, energy


def _energy(model: nn.Module, tokens: Sequence[int]) -> mx.array:
    ffns = [ffn.module for ffn in ffn_layers(model)]
    energy = [mx.array(0.0)] * len(ffns)

    def visit(layer: int, x: mx.array) -> mx.array:
        output, more = read_ffn(ffns[layer], x)
        energy[layer] = energy[layer] + more
        return output

    read_text(model, tokens, visit)
    return mx.stack(energy)


def _shares(energy: mx.array) -> mx.array:
    return energy / mx.maximum(energy.sum(axis=-1, keepdims=True), 1e-30)
