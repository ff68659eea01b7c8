"""How far a compact model says what the dense model says, on the text that selected.

The dense model has just read that text to select by it, so what it would say at each token
is known. The compact model reads the last tokens again, going on from the dense model's keys
and values as an answer does, and both are compared. So such a selection comes with a
measure of its quality that costs little. How well it predicts the quality of the answer
is measured in examples/benchmarks/auto.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..checking.rollback import without_last
from ..selection.masks import Selection
from ..slicing.stock import log_softmax, logits_at, prefill, steps_of

PLACES = 64  # tokens at which they are compared, at most
SHARE = 8  # one token in eight is compared, so that selecting takes little longer
FEWEST = 8


def places_of(tokens: Sequence[int]) -> mx.array:
    """Return the places at which both models are compared, int32 ``[n]``: the last
    tokens of a text, counted from the start of its last prefill step.
    """
    count = len(steps_of(tokens)[-1])
    some = min(count, PLACES, max(FEWEST, len(tokens) // SHARE))
    return mx.arange(count - some, count)


def compared(
    selection: Selection,
    model: nn.Module,
    noted: mx.array,
    tokens: Sequence[int],
    kv: list[Any],
) -> Selection:
    """Return a selection that knows how far its compact model agrees with the dense one.

    Args:
        selection: what the compact model keeps.
        model: the compact model.
        noted: what the dense model's output layer gets at :func:`places_of`, ``[1, n, D]``,
            from :func:`ifp_mlx.slicing.stock.noted_at`.
        tokens: ``T`` ids of the text.
        kv: the dense model's cache of the text; unchanged afterwards.
    """
    said, found = says(model, noted, tokens, kv)
    same = (found.argmax(axis=-1) == said.argmax(axis=-1)).astype(mx.float32).mean()
    kl = (mx.exp(said) * (said - found)).sum(axis=-1).mean()
    origin = replace(selection.origin, agreement=float(same), kl=float(kl))
    return replace(selection, origin=origin)


def says(
    model: nn.Module, noted: mx.array, tokens: Sequence[int], kv: list[Any]
) -> tuple[mx.array, mx.array]:
    """Return what both models say after each of a text's last tokens.

    One output layer computes both, since all of it is read for either.

    Args:
        model, noted, tokens, kv: as for :func:`compared`; ``noted`` of the last ``n``
            tokens.

    Returns:
        Log-probabilities, the dense model's first, float32 ``[n, V]`` each.
    """
    count = noted.shape[1]
    with without_last(kv, count) as shortened:
        cache, read = kv, list(tokens[-count:])
        if not shortened:  # the compact model reads all of the text itself
            read = steps_of(tokens)[-1]
            cache = prefill(model, tokens[: len(tokens) - len(read)])
        places = mx.arange(len(read) - count, len(read))
        with logits_at(model, places, noted) as some:
            both = log_softmax(some(model(mx.array(read)[None], cache=cache))[0])
    return both[:count], both[count:]


def _agrees(selection: Selection, least: float | None) -> bool:
    found = selection.origin.agreement
    everything = min(selection.sizes) == selection.channels
    return least is None or everything or (found is not None and found >= least)


def check_agreement(selection: Selection, least: float | None) -> None:
    """Refuse a selection that agrees too little with the dense model.

    Args:
        selection: that was :func:`compared`.
        least: the share of tokens at which both must choose alike; ``None`` asks for
            nothing.

    Raises:
        ValueError: if it does not reach that, or was never compared.
    """
    if _agrees(selection, least):
        return
    found = selection.origin.agreement
    if found is None:
        raise ValueError(
            f"min_agreement={least} asks how often the compact model says what the dense "
            "one says on the instruction, which is known only where the dense model "
            "reads that to select by it: use the selector activation or blend."
        )
    raise ValueError(
        f"The compact model of the mask {selection.mask_id}, which keeps "
        f"{selection.share:.0%} of the {selection.unit}s, chooses the dense model's next "
        f"token at {found:.1%} of the instruction's last tokens, and min_agreement="
        f"{least} is asked for; keep more (or give it more memory), or ask for less."
    )
