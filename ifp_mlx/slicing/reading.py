"""A dense model reads a text, and how strongly it uses each channel is measured.

Rankings by weight magnitude are not offered: at keep 0.5 they leave a model that
speaks noise (KL to the dense model about 12 nats per token on SmolLM2-135M).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .masked import tapped
from .shapes import LayerPlan, Plan, at, put_at
from .stock import steps_of

FFN_STEP = 512  # tokens that go through an FFN at once: [T, F] is the largest array

Visit = Callable[..., Any]


def activation_scores(model: nn.Module, plan: Plan, tokens: Sequence[int]) -> mx.array:
    """Score channels by how strongly the tokens of one text use them.

    Every token's channels are normalised to length 1, so that no single token
    (the first one has huge activations) decides; a channel's score is its l2 norm
    over all tokens, template included.

    Args:
        model: the dense stock model; its weights are read if they are still lazy.
        plan: its plan, of channels.
        tokens: ``T`` ids.

    Returns:
        ``[L, F]`` float32, not negative.

    Source: GRIFFIN, Dong et al. 2024 (arXiv:2404.01365) sec. 4.
    """
    return mx.sqrt(_energy(model, plan, tokens))


def prior_scores(
    model: nn.Module,
    plan: Plan,
    texts: Sequence[Sequence[int]],
    *,
    progress: Callable[[Iterable], Iterable] = iter,
) -> mx.array:
    """Score channels by how strongly a calibration text uses them: a property of the
    model, computed once.

    Args:
        model: the dense stock model.
        plan: its plan, of channels.
        texts: token ids of each text; every token of all texts counts the same.
        progress: wraps the iteration over texts, for a progress bar.

    Returns:
        ``[L, F]`` float32, the statistic of :func:`activation_scores`.

    Source: the global ranking of GLASS (arXiv:2508.14302).
    """
    energy = mx.array(0.0)
    for tokens in progress(texts):
        energy = energy + _energy(model, plan, tokens)
        mx.eval(energy)
    return mx.sqrt(energy)


def task_scores(
    model: nn.Module,
    plan: Plan,
    examples: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    progress: Callable[[Iterable], Iterable] = iter,
) -> mx.array:
    """Score channels by how strongly a task's prompts and its answers use them.

    Prompts and answers have the same say, however long they are.

    Args:
        model: the dense stock model.
        plan: its plan, of channels.
        examples: token ids of each prompt and its answer, which may be empty.
        progress: wraps the iteration over examples.

    Returns:
        ``[L, F]`` float32, not negative.
    """
    prompts = both = mx.array(0.0)
    for prompt, answer in progress(examples):
        energy = _energy(model, plan, prompt)
        prompts = prompts + energy
        # What a token uses does not depend on those after it.
        both = both + (_energy(model, plan, [*prompt, *answer]) if answer else energy)
        mx.eval(prompts, both)
    answers = mx.maximum(both - prompts, 0)
    return mx.sqrt(_shares(prompts) + _shares(answers))


def read_text(
    model: nn.Module, plan: Plan, tokens: Sequence[int], visit: Visit
) -> list[Any]:
    """Run a text through a dense model, its layers' modules computed by ``visit``.

    The forward pass is mlx-lm's own. The output layer is not computed.

    Args:
        model: as it was, afterwards.
        plan: its plan.
        tokens: ``T`` ids; they go through in :func:`steps_of`.
        visit: computes what the module of a layer does, by number and with the
            arguments of the module. It is called layer after layer,
            :func:`visits_of` times in every step.

    Returns:
        The text's KV cache, as mlx-lm makes it.

    Raises:
        ValueError: if there are no tokens.
    """
    from mlx_lm.models.cache import make_prompt_cache

    if not len(tokens):
        raise ValueError("The instruction has no tokens; give some text.")
    cache = make_prompt_cache(model)
    with _computed_by(model, plan, visit):
        for step in steps_of(tokens):
            model(mx.array(step)[None], cache=cache)
            mx.eval([layer.state for layer in cache])
    return cache


def visits_of(model: nn.Module, plan: Plan) -> list[int]:
    """Return how often each layer is gone through in one forward pass: once, but for
    model types that loop over their layers. No weight is read to find out.
    """
    from mlx_lm.models.cache import make_prompt_cache

    visits = [0] * len(plan.layers)

    def count(layer: int, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        visits[layer] += 1
        return x

    with _computed_by(model, plan, count):
        model(mx.array([[0]]), cache=make_prompt_cache(model))
    return visits


@contextmanager
def _computed_by(model: nn.Module, plan: Plan, visit: Visit) -> Iterator[None]:
    modules = plan.modules(model)
    try:
        for number, layer in enumerate(plan.layers):
            put_at(model, layer.path, partial(visit, number))
        yield
    finally:
        for layer, module in zip(plan.layers, modules, strict=True):
            put_at(model, layer.path, module)


def read_layer(
    module: nn.Module,
    layer: LayerPlan,
    x: mx.array,
    *args: Any,
    seen: list[mx.array] | None = None,
    **kwargs: Any,
) -> tuple[Any, mx.array]:
    """Compute one layer's module, and how strongly each of its channels was used.

    Args:
        module: the stock module; its weights are read if they are still lazy.
        layer: its plan.
        x: ``[1, T, D]``.
        args, kwargs: what the module gets besides; then it is computed at once.
        seen: gets the channels, as they come into the inlet, of one part of the tokens
            after the other, ``[<= FFN_STEP, F]``.

    Returns:
        The output, as of the module, and each channel's energy, float32 ``[F]``; both
        computed, so that nothing needs the weights any more.
    """
    energy = mx.array(0.0)

    def record(h: mx.array) -> mx.array:
        nonlocal energy
        square = mx.square(h.astype(mx.float32).reshape(-1, h.shape[-1]))
        share = square / mx.maximum(square.sum(axis=-1, keepdims=True), 1e-30)
        energy = energy + share.sum(axis=0)
        if seen is not None:
            seen.append(h.reshape(-1, h.shape[-1]))
        return h

    with tapped([at(module, layer.inlet)], [record]):
        if args or kwargs:
            output = module(x, *args, **kwargs)
            mx.eval(output, energy)
            return output, energy
        outputs = []
        for start in range(0, x.shape[1], FFN_STEP):
            outputs.append(module(x[:, start : start + FFN_STEP]))
            mx.eval(outputs[-1], energy)
    output = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=1)
    mx.eval(output)
    return output, energy


def _energy(model: nn.Module, plan: Plan, tokens: Sequence[int]) -> mx.array:
    check_channels(plan)
    modules = plan.modules(model)
    energy = [mx.array(0.0)] * len(modules)

    def visit(layer: int, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        found = read_layer(modules[layer], plan.layers[layer], x, *args, **kwargs)
        output, more = found
        energy[layer] = energy[layer] + more
        return output

    read_text(model, plan, tokens, visit)
    return mx.stack(energy)


def check_channels(plan: Plan) -> None:
    """Raise ``ValueError`` where experts are to be scored by what reads a text."""
    if plan.unit != "channel":
        raise ValueError(
            f"This model is cut by experts ({plan.units} a layer), and a text can choose, "
            "compensate or train FFN channels only so far; choose experts with the "
            "selector random or a mask file, and do not compensate."
        )


def _shares(energy: mx.array) -> mx.array:
    return energy / mx.maximum(energy.sum(axis=-1, keepdims=True), 1e-30)
