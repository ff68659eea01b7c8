"""What mlx-lm provides to run a stock model that mlx-lm did not load."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .masked import becoming
from .shapes import at, put_at

PREFILL_STEP = 2048  # tokens that go through the model at once, as in mlx-lm
IN_LAYER = re.compile(r"\.\d+\.")  # of a parameter's name


@contextmanager
def unmoved_random_state() -> Iterator[None]:
    """Leave MLX's random state as it was: building a model draws random weights, and
    what is sampled or initialised later must not depend on how many were built.
    """
    state: Any = mx.random.state
    high, low = state[0].tolist()
    try:
        yield
    finally:
        mx.random.seed(high << 32 | low)


def build(config: dict[str, Any]) -> nn.Module:
    """Return mlx-lm's model of a config.json; its weights are random, never computed.

    Raises:
        ValueError: if mlx-lm cannot build it.
    """
    from mlx_lm.utils import _get_classes

    try:
        model_class, args_class = _get_classes(config)
        return model_class(args_class.from_dict(config))
    except Exception as error:  # whatever mlx-lm's model code raises
        raise ValueError(
            f"mlx-lm cannot build the {config.get('model_type')!r} model of this "
            f"config.json ({type(error).__name__}: {error}); check it."
        ) from error


def steps_of(tokens: Sequence[int], step: int = 0) -> list[list[int]]:
    """Return the parts in which a text goes through the model.

    Args:
        tokens: ``T`` ids.
        step: tokens of one part; the last part may be shorter. Default: mlx-lm's step,
            where the first part may be shorter and the last is whole.
    """
    if step:
        return [list(tokens[n : n + step]) for n in range(0, len(tokens), step)]
    ends = range(len(tokens), 0, -PREFILL_STEP)
    return [list(tokens[max(0, end - PREFILL_STEP) : end]) for end in reversed(ends)]


def prefill(model: nn.Module, tokens: Sequence[int], step: int = 0) -> list[Any]:
    """Return mlx-lm's KV cache after a model has read some tokens, which may be none.

    The output layer is not computed.

    Args:
        model: any stock model.
        tokens: ``T`` ids.
        step: see :func:`steps_of`.
    """
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    for part in steps_of(tokens, step):
        model(mx.array(part)[None], cache=cache)
        mx.eval([layer.state for layer in cache])
    return cache


def final_norm(model: nn.Module) -> str | None:
    """Return the path of the norm before the output layer; ``None`` if it has no
    weight to know it by (nanochat).
    """
    names = [name for name, _ in tree_flatten(model.parameters())]
    norms = [n for n in names if n.endswith("norm.weight") and not IN_LAYER.search(n)]
    final = [name for name in norms if re.search(r"(^|\.)norm\.weight$", name)][:1]
    found = next(iter([*final, *norms[::-1]]), None)
    return None if found is None else found.removesuffix(".weight")


@contextmanager
def logits_at(
    model: nn.Module, places: mx.array, beside: mx.array | None = None
) -> Iterator[Callable[[mx.array], mx.array]]:
    """Let a model compute its output layer for some tokens only, inside the ``with``
    block.

    Args:
        model: any stock model; one whose final norm is not known, or which goes through
            it more than once, computes all.
        places: int32 ``[n]``, which of the tokens of a call.
        beside: what :func:`noted_at` noted of a model with the same output layer,
            ``[B, m, ...]``; its logits come first.

    Yields:
        A function that turns the logits of a call into ``[B, m + n, V]``.
    """

    def some(found: mx.array) -> mx.array:
        parts = [found[:, places]]
        return mx.concatenate(parts if beside is None else [beside, *parts], axis=1)

    with _norm_changed(model, some) as known:
        yield (lambda logits: logits) if known else some


@contextmanager
def noted_at(
    model: nn.Module, places: mx.array
) -> Iterator[Callable[[mx.array], mx.array]]:
    """Note, inside the ``with`` block, what a model's output layer gets for some
    tokens; that layer need not be computed.

    Args:
        model, places: see :func:`logits_at`.

    Yields:
        A function that gets the logits of a call and returns what was noted: ``[B, n,
        D]``, or the logits ``[B, n, V]`` of a model that computes all.
    """
    noted: list[mx.array] = []

    def note(found: mx.array) -> mx.array:
        noted[:] = [found[:, places]]
        return found

    with _norm_changed(model, note) as known:
        yield lambda logits: noted[0] if known else logits[:, places]


@contextmanager
def _norm_changed(
    model: nn.Module, change: Callable[[mx.array], mx.array]
) -> Iterator[bool]:
    """Let a function change what a model's final norm returns, inside the ``with``
    block; yield whether the model has such a norm and goes through it once.
    """
    path = final_norm(model)
    if path is None or _calls_of(model, path) > 1:
        yield False
        return

    def call(stock: type) -> Any:
        return lambda self, x: change(stock.__call__(self, x))

    with becoming([at(model, path)], "Some", [call]):
        yield True


def _calls_of(model: nn.Module, path: str) -> int:
    """Return how often one forward pass calls a module; no weight is read."""
    from mlx_lm.models.cache import make_prompt_cache

    module, calls = at(model, path), 0

    def count(x: mx.array) -> mx.array:
        nonlocal calls
        calls += 1
        counted: mx.array = module(x)
        return counted

    with standing_in(model, {path: count}):
        model(mx.array([[0]]), cache=make_prompt_cache(model))
    return calls


def vocabulary_of(model: nn.Module) -> int:
    """Return how many tokens a model knows: the rows of its largest embedding, since
    config files name that number differently or leave it to a default.
    """
    kinds = (nn.Embedding, nn.QuantizedEmbedding)
    found = (module for module in model.modules() if isinstance(module, kinds))
    return max(int(embedding.weight.shape[0]) for embedding in found)


def context_of(config: dict[str, Any]) -> int | None:
    """Return how many tokens a model was made to read and write together, or ``None``
    where its config.json does not say.
    """
    homes = (config, config.get("text_config") or {})
    found = (home.get("max_position_embeddings") for home in homes)
    return next((context for context in found if context), None)


class StandIn:
    """A stand-in that is called instead of a module, and otherwise acts as that module.

    Args:
        module: the one it replaces.
        call: is called instead of it.
    """

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        self.module, self.call = module, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what ``call`` makes of the arguments."""
        return self.call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


@contextmanager
def standing_in(
    model: nn.Module, calls: Mapping[str, Callable[..., Any]]
) -> Iterator[None]:
    """Let functions be called instead of some modules of a model, inside the ``with``
    block.

    Args:
        model: unchanged afterwards.
        calls: by the path of the module.
    """
    there = {path: at(model, path) for path in calls}
    try:
        for path, call in calls.items():
            put_at(model, path, StandIn(there[path], call))
        yield
    finally:
        for path, module in there.items():
            put_at(model, path, module)


def log_softmax(logits: mx.array) -> mx.array:
    """Return the log-probabilities of logits ``[..., V]``, float32, computed."""
    found = nn.log_softmax(logits.astype(mx.float32), axis=-1)
    mx.eval(found)
    return found
