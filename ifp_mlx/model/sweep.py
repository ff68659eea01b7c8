"""Read a dense model layer by layer: one dense FFN, or mixture, is in memory at a time.

The forward pass is mlx-lm's own, layer after layer. Where it comes to an FFN, the
weights are read, the instruction's tokens go through them, and they are let go again:
all of them, or all but the units that the instruction turned out to need. Channels can
learn on the spot to make up for the others. What the dense model's attention made of the
text is there at the end too, for an answer to go on from.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..files.progress import ProgressBar
from ..selection.masks import Selection
from ..slicing.apart import cut_apart
from ..slicing.compensation import correction_of, cut_compensated
from ..slicing.reading import (
    Example,
    Texts,
    batches_of,
    order_of,
    read_layer,
    read_text,
    scores_of,
)
from ..slicing.shapes import at
from ..slicing.sliced import cut, note_units, settle, sliced_names
from ..slicing.stock import log_softmax, logits_at, steps_of
from ..storage.folder import Folder

Choose = Callable[[int, mx.array], mx.array]


class Swept(NamedTuple):
    """What a sweep leaves.

    Attributes:
        model: an ordinary mlx-lm model, with the units that were chosen.
        kv: the text's KV cache, as the dense model made it.
        uses: of each layer's units, from :func:`ifp_mlx.slicing.reading.read_layer`.
        said: the dense model's log-probabilities at the places of the text that were
            asked for, float32 ``[n, V]``.
    """

    model: nn.Module
    kv: list[Any]
    uses: list[mx.array]
    said: mx.array | None


def scores(
    source: Folder, examples: Sequence[Example], *, progress: ProgressBar = iter
) -> mx.array:
    """Return :func:`ifp_mlx.slicing.reading.scores` of a model that stays on disk.

    Args:
        source: where the weights are.
        examples: see there.
        progress: wraps the iteration over layers, of all batches of texts.

    Returns:
        ``[L, F]`` float32.
    """
    batches = batches_of(examples)
    visits = sum(sum(_visits_of(source, texts)) for texts in batches)
    ticks = iter(progress(range(visits)))
    uses = [mx.array(0.0)] * len(source.plan.layers)
    for texts in batches:
        sweep = _Sweep(source, texts, ticks)
        sweep.run()
        uses = [use + more for use, more in zip(uses, sweep.uses, strict=True)]
    next(ticks, None)
    return mx.stack([scores_of(source.plan.unit, use) for use in uses])


def compact_model(
    source: Folder,
    tokens: Sequence[int],
    choose: Choose,
    *,
    compensate: bool = False,
    apart: bool = False,
    remember: int = 0,
    places: mx.array | None = None,
    progress: ProgressBar = iter,
) -> Swept:
    """Select units by their use and make the compact model, in one pass.

    About one dense layer is in memory above the compact model.

    Args:
        source: where the weights are.
        tokens: ``T`` ids.
        choose: returns the units of a layer to keep, int32 ``[k]``, sorted, for its
            number and its scores, ``[F]``.
        compensate: let the kept channels make up for the dropped ones, as the text
            shows (:mod:`ifp_mlx.slicing.compensation`); else the model is equal to slicing the
            same units out of the dense one.
        apart: leave the kept channels' weights as they are, and what makes up for
            others apart (:mod:`ifp_mlx.slicing.apart`).
        remember: of how many of the last tokens the channels are remembered, where they
            are apart and compensated.
        places: int32 ``[n]``, of the text's last step, where it is kept what the dense
            model says.
        progress: wraps the iteration over layers.
    """
    texts = batches_of([(tokens,)])[0]
    ticks = iter(progress(range(sum(_visits_of(source, texts)))))
    sweep = _Sweep(source, texts, ticks, choose, places)
    sweep.compensate, sweep.apart, sweep.remember = compensate, apart, remember
    cache = sweep.run()
    next(ticks, None)
    note_units(sweep.model, source.plan)
    mx.eval(sweep.model.parameters())
    return Swept(sweep.model, cache, sweep.uses, sweep.said)


def compensated_model(
    source: Folder,
    selection: Selection,
    *,
    apart: bool = False,
    progress: ProgressBar = iter,
) -> nn.Module:
    """Make the compact model of channels that are chosen already, compensated.

    Args:
        source: where the weights are.
        selection: made for the source's model; its text shows how.
        apart: see :func:`compact_model`.
        progress: wraps the iteration over layers.

    Raises:
        ValueError: if the selection has gates, or its text is lost.
    """
    selection.check_reproducible()

    def choose(layer: int, scores: mx.array) -> mx.array:
        return selection.indices[layer]

    tokens = selection.text or ()
    how: dict[str, Any] = {"compensate": True, "apart": apart}
    return compact_model(source, tokens, choose, **how, progress=progress).model


class _Sweep:
    """What is left of a model, layer by layer, while texts go through it.

    A long text goes through in several steps, and some model types loop over their
    layers: all but the last visit read a layer and let it go.
    """

    def __init__(
        self,
        source: Folder,
        texts: Texts,
        ticks: Iterator,
        choose: Choose | None = None,
        places: mx.array | None = None,
    ) -> None:
        self.source, self.plan, self.texts = source, source.plan, texts
        self.choose, self.places = choose, places
        self.compensate = self.apart = False
        self.remember = 0
        self.model = source.open()
        self.modules = self.plan.modules(self.model)
        self.uses = [mx.array(0.0)] * len(self.modules)
        self.said: mx.array | None = None
        self._visits = _visits_of(source, texts)
        self._names = sliced_names(self.model, self.plan)
        self._passing: list[nn.Module] = []
        self._ticks = ticks

    def run(self) -> list[Any]:
        """Send the texts through the model, and return the KV cache."""
        read = partial(read_text, self.model, self.plan, self.texts, self._visit)
        if self.places is None:
            return read()[0]
        with logits_at(self.model, self.places) as some:
            cache, logits = read()
            self.said = log_softmax(some(logits)[0])
        return cache

    def _visit(self, layer: int, weights: mx.array, *args: Any, **kwargs: Any) -> Any:
        """Compute a layer's module, and let go of its weights."""
        next(self._ticks, None)
        mx.eval(args[0])  # attention's arrays go before the FFN's come
        self._visits[layer] -= 1
        last = self._visits[layer] == 0
        module = self.modules[layer] if last else self._passing_module(layer)
        self.source.fill(module, layer)
        seen: list[mx.array] | None = [] if last and self.compensate else None
        plan = self.plan.layers[layer]
        output, use = read_layer(module, plan, weights, *args, seen=seen, **kwargs)
        self.uses[layer] = self.uses[layer] + use
        mx.eval(self.uses[layer])
        if last and self.choose is not None:
            scores = scores_of(self.plan.unit, self.uses[layer])
            self._cut(module, layer, self.choose(layer, scores), seen)
        else:
            self._let_go(module, layer)
        mx.clear_cache()  # or MLX would hold on to the dense layer's memory
        return output

    def _cut(
        self,
        module: nn.Module,
        layer: int,
        index: mx.array,
        seen: list[mx.array] | None,
    ) -> None:
        """Keep some units of a layer, compensated by what was seen of all channels."""
        plan, units = self.plan.layers[layer], self.plan.units
        channels = None if seen is None else mx.concatenate(seen)
        if self.apart:
            correction = None
            if channels is not None and index.size < units:
                correction = correction_of(at(module, plan.inlet), channels, index)
                mx.eval(correction)
            part = cut_apart(module, plan, index, units, correction=correction)
            if self.remember and channels is not None:
                part.recent = mx.array(channels[-self.remember :])
        elif channels is not None:
            cut_compensated(module, plan, index, channels)
        else:
            cut(module, plan, index, units)
        settle(module)

    def _let_go(self, module: nn.Module, layer: int) -> None:
        """Forget the weights of a layer that has been read."""
        above = f"{self.plan.layers[layer].path}."
        for name in self._names[layer]:
            path, _, tensor = name.removeprefix(above).rpartition(".")
            at(module, path)[tensor] = mx.zeros(0)

    def _passing_module(self, layer: int) -> nn.Module:
        """Return a layer's module, unread, for a visit that is not the last."""
        if layer == 0:
            self._passing = self.plan.modules(self.source.open())
        return self._passing[layer]


def _visits_of(source: Folder, texts: Texts) -> list[int]:
    """Return how often each layer is gone through, in all steps together."""
    steps = len(steps_of(range(texts.tokens.shape[1])))
    order = order_of(source.skeleton, source.plan)
    return [steps * order.count(layer) for layer in range(len(source.plan.layers))]
