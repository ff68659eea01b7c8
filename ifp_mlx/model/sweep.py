"""Read a dense model layer by layer: one dense FFN is in memory at a time.

The forward pass is mlx-lm's own, layer after layer. Where it comes to an FFN, the
weights are read, the instruction's tokens go through them, and they are let go again:
all of them, or all but the channels that the instruction turned out to need, which can
learn on the spot to make up for the others. What the dense model's attention made of the
text is there at the end too, for an answer to go on from.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..files.progress import ProgressBar
from ..selection.masks import Selection
from ..slicing.compensation import cut_compensated
from ..slicing.reading import check_channels, read_layer, read_text, visits_of
from ..slicing.shapes import at
from ..slicing.sliced import cut, note_units, sliced_names
from ..slicing.stock import steps_of
from ..storage.folder import Folder

Choose = Callable[[int, mx.array], mx.array]


class Swept(NamedTuple):
    """What a sweep leaves.

    Attributes:
        model: an ordinary mlx-lm model, with the channels that were chosen.
        kv: the text's KV cache, as the dense model made it.
    """

    model: nn.Module
    kv: list[Any]


def activation_scores(
    source: Folder, tokens: Sequence[int], *, progress: ProgressBar = iter
) -> mx.array:
    """Return :func:`ifp_mlx.slicing.reading.activation_scores` of a model that stays on disk.

    Args:
        source: where the weights are.
        tokens: ``T`` ids.
        progress: wraps the iteration over layers.

    Returns:
        ``[L, F]`` float32.
    """
    sweep = _Sweep(source, tokens, None, False, progress)
    sweep.run(tokens)
    return mx.sqrt(mx.stack(sweep.energy))


def compact_model(
    source: Folder,
    tokens: Sequence[int],
    choose: Choose,
    *,
    compensate: bool = False,
    progress: ProgressBar = iter,
) -> Swept:
    """Select channels by their activation and make the compact model, in one pass.

    About one dense layer is in memory above the compact model.

    Args:
        source: where the weights are.
        tokens: ``T`` ids.
        choose: returns the channels of a layer to keep, int32 ``[k]``, sorted, for its
            number and its activation scores, ``[F]``.
        compensate: let the kept channels make up for the dropped ones, as the text
            shows (:mod:`ifp_mlx.slicing.compensation`); else the model is equal to slicing the
            same channels out of the dense one.
        progress: wraps the iteration over layers.
    """
    sweep = _Sweep(source, tokens, choose, compensate, progress)
    cache = sweep.run(tokens)
    note_units(sweep.model, source.plan)
    mx.eval(sweep.model.parameters())
    return Swept(sweep.model, cache)


def compensated_model(
    source: Folder, selection: Selection, *, progress: ProgressBar = iter
) -> nn.Module:
    """Make the compact model of channels that are chosen already, compensated.

    Args:
        source: where the weights are.
        selection: made for the source's model; its text shows how.
        progress: wraps the iteration over layers.

    Raises:
        ValueError: if the selection has gates, or its text is lost.
    """
    selection.check_reproducible()

    def choose(layer: int, scores: mx.array) -> mx.array:
        return selection.indices[layer]

    tokens = selection.text or ()
    return compact_model(
        source, tokens, choose, compensate=True, progress=progress
    ).model


class _Sweep:
    """What is left of a model, layer by layer, while a text goes through it.

    A long text goes through in several steps, and some model types loop over their
    layers: all but the last visit read a layer and let it go.
    """

    def __init__(
        self,
        source: Folder,
        tokens: Sequence[int],
        choose: Choose | None,
        compensate: bool,
        progress: ProgressBar,
    ) -> None:
        check_channels(source.plan)
        self.source, self.plan = source, source.plan
        self.choose = choose
        self.compensate = compensate
        self.model = source.open()
        self.modules = self.plan.modules(self.model)
        self.energy = [mx.array(0.0)] * len(self.modules)
        steps = len(steps_of(tokens))
        visits = visits_of(source.skeleton, self.plan)
        self._visits = [count * steps for count in visits]
        self._names = sliced_names(self.model, self.plan)
        self._passing: list[nn.Module] = []
        self._ticks = iter(progress(range(sum(self._visits))))

    def run(self, tokens: Sequence[int]) -> list[Any]:
        """Send the text through the model, end the progress bar, return the KV cache."""
        cache = read_text(self.model, self.plan, tokens, self._visit)
        next(self._ticks, None)
        return cache

    def _visit(self, layer: int, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        """Compute a layer's module, and let go of its weights."""
        next(self._ticks, None)
        mx.eval(x)  # attention's arrays go before the FFN's come
        self._visits[layer] -= 1
        last = self._visits[layer] == 0
        module = self.modules[layer] if last else self._passing_module(layer)
        self.source.fill(module, layer)
        seen: list[mx.array] | None = [] if last and self.compensate else None
        plan = self.plan.layers[layer]
        output, energy = read_layer(module, plan, x, *args, seen=seen, **kwargs)
        self.energy[layer] = self.energy[layer] + energy
        mx.eval(self.energy[layer])
        if last and self.choose is not None:
            index = self.choose(layer, mx.sqrt(self.energy[layer]))
            self._cut(module, layer, index, seen)
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
        """Keep some channels of a layer, compensated by what was seen of them all."""
        plan = self.plan.layers[layer]
        if seen is not None:
            cut_compensated(module, plan, index, mx.concatenate(seen))
        else:
            cut(module, plan, index, self.plan.units)
        mx.eval(module.parameters())

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
