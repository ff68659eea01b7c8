"""How far a compact model says what the dense model says, on the text that selected.

The dense model has just read that text to select by it, so what it would have said at
each token is known. The compact model reads it too, and both are compared.
"""

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..selection.masks import Selection
from ..slicing.stock import log_softmax, logits_at, steps_of

PLACES = 64  # tokens at which they are compared, at most


def places_of(tokens: Sequence[int]) -> mx.array:
    """Return where in the last step of a text both are compared, int32 ``[n]``: evenly
    spread, with the last token, which begins the answer.
    """
    count = len(steps_of(tokens)[-1])
    places = np.linspace(count - 1, 0, min(count, PLACES)).round()[::-1]
    return mx.array(places.astype(np.int32))


def compared(
    selection: Selection, model: nn.Module, said: mx.array, tokens: Sequence[int]
) -> Selection:
    """Return a selection that knows how far its compact model agrees with the dense one.

    Args:
        selection: what the compact model keeps.
        model: the compact model.
        said: the dense model's log-probabilities, ``[n, V]``, at :func:`places_of`.
        tokens: ``T`` ids of the text.
    """
    found = _says(model, tokens)
    same = (found.argmax(axis=-1) == said.argmax(axis=-1)).astype(mx.float32).mean()
    kl = (mx.exp(said) * (said - found)).sum(axis=-1).mean()
    origin = replace(selection.origin, agreement=float(same), kl=float(kl))
    return replace(selection, origin=origin)


def _says(model: nn.Module, tokens: Sequence[int]) -> mx.array:
    """Return a model's log-probabilities at :func:`places_of`, float32 ``[n, V]``."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    *before, last = steps_of(tokens)
    for step in before:
        model(mx.array(step)[None], cache=cache)
        mx.eval([layer.state for layer in cache])
    with logits_at(model, places_of(tokens)) as some:
        return log_softmax(some(model(mx.array(last)[None], cache=cache))[0])


def check_agreement(selection: Selection, least: float | None) -> None:
    """Refuse a selection that agrees too little with the dense model.

    Args:
        selection: that was :func:`compared`.
        least: the share of tokens at which both must choose alike; ``None`` asks for
            nothing.

    Raises:
        ValueError: if it does not reach that, or was never compared.
    """
    found = selection.origin.agreement
    if least is None or (found is not None and found >= least):
        return
    if found is None:
        raise ValueError(
            f"min_agreement={least} asks how often the compact model says what the dense "
            "one says on the instruction, which is known only where the dense model "
            "reads that to select by it: use the selector activation or blend."
        )
    raise ValueError(
        f"The compact model of the mask {selection.mask_id} chooses the dense model's "
        f"next token at {found:.1%} of the instruction's tokens, and min_agreement="
        f"{least} was asked for; keep more than {selection.share:.0%} of the "
        f"{selection.unit}s, or ask for less."
    )
