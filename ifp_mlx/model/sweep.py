"""Read a dense model layer by layer: one dense FFN, or mixture, is in memory at a time.

Such a sweep is mlx-lm's own forward pass. At an FFN the weights are read, the
instruction's tokens go through them, and the weights are let go again: all of them, or
all except those of the units that the instruction turned out to need. On the way the
kept channels can learn to make up for the dropped ones. At the end the dense model's KV
cache of the text is there too, for an answer to go on from.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..files.progress import ProgressBar
from ..selection.masks import Selection
from ..slicing.apart import cut_apart
from ..slicing.compensation import Evidence, correction_of, cut_compensated, evidence
from ..slicing.reading import (
    Example,
    Texts,
    batches_of,
    padded,
    read_layer,
    read_text,
    scores_of,
)
from ..slicing.shapes import at
from ..slicing.sketch import condensed, unit_rows
from ..slicing.sliced import cut, note_units, settle, sliced_names
from ..slicing.stock import noted_at, steps_of
from ..storage.folder import Folder

# Chooses the units of a layer to keep, int32 [k], sorted, by its number, its scores
# [F], and, where it is compensated, what is known of its channels.
Choose = Callable[[int, mx.array, Evidence | None], mx.array]
# Returns the sketch of a layer, [r, F], read when called: all together are large.
Sketch = Callable[[int], mx.array]


class Swept(NamedTuple):
    """What a sweep leaves.

    Attributes:
        model: an ordinary mlx-lm model, with the units that were chosen.
        kv: the text's KV cache, as the dense model made it.
        uses: how strongly each layer's units were used, from
            :func:`ifp_mlx.slicing.reading.read_layer`.
        noted: what the dense model's output layer gets at the places of the text that
            were asked for, from :func:`ifp_mlx.slicing.stock.noted_at`, ``[1, n, D]``.
    """

    model: nn.Module
    kv: list[Any]
    uses: list[mx.array]
    noted: mx.array | None


def scores(
    source: Folder, examples: Sequence[Example], *, progress: ProgressBar = iter
) -> mx.array:
    """Do what :func:`ifp_mlx.slicing.reading.scores` does with a model that stays on
    disk.

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


def calibration(
    source: Folder, texts: Sequence[Sequence[int]], *, progress: ProgressBar = iter
) -> tuple[mx.array, list[mx.array]]:
    """Return how some texts use each channel, and a sketch of each layer's channels.

    Args:
        source: where the weights are.
        texts: token ids of each. All are read together: each layer is read once, and
            what was seen of its channels is let go once it is condensed.
        progress: wraps the iteration over layers.

    Returns:
        The scores, ``[L, F]`` float32, and for each layer ``[r, F]`` float32 from
        :func:`ifp_mlx.slicing.sketch.condensed`.
    """
    together = padded([(text,) for text in texts])
    ticks = iter(progress(range(sum(_visits_of(source, together)))))
    sweep = _Sweep(source, together, ticks)
    sweep.sketches = [mx.array(0.0)] * len(source.plan.layers)
    sweep.run()
    next(ticks, None)
    found = [scores_of(source.plan.unit, use) for use in sweep.uses]
    return mx.stack(found), sweep.sketches


def read(
    source: Folder, tokens: Sequence[int], places: int
) -> tuple[list[Any], mx.array]:
    """Let the dense model read a text, layer by layer.

    Args:
        source: where the weights are.
        tokens: ``T`` ids.
        places: for how many of the last tokens the dense model's result is noted.

    Returns:
        Its KV cache, and :attr:`Swept.noted`.
    """
    texts = batches_of([(tokens,)])[0]
    count = len(steps_of(tokens)[-1])
    sweep = _Sweep(source, texts, iter(()), places=mx.arange(count - places, count))
    cache = sweep.run()
    assert sweep.noted is not None
    return cache, sweep.noted


def compact_model(
    source: Folder,
    tokens: Sequence[int],
    choose: Choose,
    *,
    compensate: bool = False,
    sketch: Sketch | None = None,
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
        choose: chooses a layer's units.
        compensate: let the kept channels make up for the dropped ones, as the text
            shows (:mod:`ifp_mlx.slicing.compensation`); else the model is equal to slicing the
            same units out of the dense one.
        sketch: of a calibration text, from which the kept channels learn too.
        apart: leave the kept channels' weights as they are, and keep what makes up for
            dropped ones separately (:mod:`ifp_mlx.slicing.apart`).
        remember: the channels of this many last tokens are kept for later, with
            ``apart`` and ``compensate`` only.
        places: int32 ``[n]``, tokens of the text's last step for which the dense
            model's result is noted.
        progress: wraps the iteration over layers.
    """
    texts = batches_of([(tokens,)])[0]
    ticks = iter(progress(range(sum(_visits_of(source, texts)))))
    sweep = _Sweep(source, texts, ticks, choose, places)
    sweep.compensate, sweep.apart, sweep.remember = compensate, apart, remember
    sweep.sketch = sketch
    cache = sweep.run()
    next(ticks, None)
    note_units(sweep.model, source.plan)
    mx.eval(sweep.model.parameters())
    return Swept(sweep.model, cache, sweep.uses, sweep.noted)


def compensated_model(
    source: Folder,
    selection: Selection,
    *,
    sketch: Sketch | None = None,
    apart: bool = False,
    progress: ProgressBar = iter,
) -> nn.Module:
    """Make the compact model of channels that are chosen already, compensated.

    Args:
        source: where the weights are.
        selection: made for the source's model; its text shows how to compensate.
        sketch, apart: see :func:`compact_model`.
        progress: wraps the iteration over layers.

    Raises:
        ValueError: if the selection has gates, or its text is lost.
    """
    selection.check_reproducible()

    def choose(layer: int, scores: mx.array, known: Evidence | None) -> mx.array:
        return selection.indices[layer]

    tokens = selection.text or ()
    how: dict[str, Any] = {"compensate": True, "apart": apart, "sketch": sketch}
    return compact_model(source, tokens, choose, **how, progress=progress).model


class _Sweep:
    """What is left of a model, layer by layer, while texts go through it.

    A long text goes through in several steps, and some model types loop over their
    layers: every visit of a layer except the last reads it and lets it go.
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
        self.sketch: Sketch | None = None
        self.sketches: list[mx.array] | None = None
        self.model = source.open()
        self.modules = self.plan.modules(self.model)
        self.uses = [mx.array(0.0)] * len(self.modules)
        self.noted: mx.array | None = None
        self._visits = _visits_of(source, texts)
        self._seen: dict[int, list[mx.array]] = {}  # for the sketches
        self._names = sliced_names(self.model, self.plan)
        self._passing: list[nn.Module] = []
        self._ticks = ticks

    def run(self) -> list[Any]:
        """Send the texts through the model, and return the KV cache."""
        keeps = {"kv": self.sketches is None}
        read = partial(
            read_text, self.model, self.plan, self.texts, self._visit, **keeps
        )
        if self.places is None:
            return read()[0]
        with noted_at(self.model, self.places) as some:
            cache, logits = read()
            self.noted = some(logits)
            mx.eval(self.noted)
        return cache

    def _visit(self, layer: int, weights: mx.array, *args: Any, **kwargs: Any) -> Any:
        """Compute a layer's module, and let go of its weights."""
        next(self._ticks, None)
        mx.eval(args[0])  # frees attention's arrays before the FFN's are made
        self._visits[layer] -= 1
        last = self._visits[layer] == 0
        module = self.modules[layer] if last else self._passing_module(layer)
        self.source.fill(module, layer)
        compensate = last and self.compensate
        channels: list[mx.array] = []

        def see(rows: mx.array, counting: mx.array) -> None:
            if compensate:
                channels.append(rows)
            if self.sketches is not None:
                self._seen.setdefault(layer, []).append(_real_rows(rows, counting))

        plan = self.plan.layers[layer]
        output, use = read_layer(module, plan, weights, *args, seen=see, **kwargs)
        self.uses[layer] = self.uses[layer] + use
        mx.eval(self.uses[layer])
        if last and self.sketches is not None:
            self.sketches[layer] = condensed(self._seen.pop(layer))
            mx.eval(self.sketches[layer])
        if last and self.choose is not None:
            self._cut(module, layer, self.choose, channels if compensate else None)
        else:
            self._let_go(module, layer)
        mx.clear_cache()  # or MLX would hold on to the dense layer's memory
        return output

    def _cut(
        self,
        module: nn.Module,
        layer: int,
        choose: Choose,
        seen: list[mx.array] | None,
    ) -> None:
        """Keep some units of a layer, compensated by what was seen of all channels."""
        plan, units = self.plan.layers[layer], self.plan.units
        known, recent = None, None
        if seen is not None:
            channels = mx.concatenate(seen)
            known = evidence(channels, self.sketch and self.sketch(layer))
            recent = mx.array(channels[-self.remember :]) if self.remember else None
            mx.eval(known.rows, recent)
            seen.clear()
            del channels
        index = choose(layer, scores_of(self.plan.unit, self.uses[layer]), known)
        if self.apart:
            correction = None
            if known is not None and index.size < units:
                correction = correction_of(at(module, plan.inlet), known, index)
                mx.eval(correction)
            part = cut_apart(module, plan, index, units, correction=correction)
            part.recent = recent
        elif known is not None:
            cut_compensated(module, plan, index, known)
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


def _real_rows(channels: mx.array, weights: mx.array) -> mx.array:
    """Return the channels of tokens that are no padding, each of length 1, in float16.

    Args:
        channels: ``[T, F]``.
        weights: of the tokens, ``[W, T]``.
    """
    real = np.flatnonzero(np.array(weights.sum(axis=0)) > 0).astype(np.int32)
    rows = unit_rows(channels[mx.array(real)]).astype(mx.float16)
    mx.eval(rows)
    return rows


def _visits_of(source: Folder, texts: Texts) -> list[int]:
    """Return how often each layer is gone through, in all steps together."""
    steps = len(steps_of(range(texts.tokens.shape[1])))
    return [
        steps * source.order.count(layer) for layer in range(len(source.plan.layers))
    ]
