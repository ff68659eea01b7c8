"""Read a dense model layer by layer: one dense FFN is in memory at a time.

The forward pass is mlx-lm's own, layer after layer. Where it comes to an FFN, the
weights are read, the instruction's tokens go through them, and they are let go again:
all of them, or all but the channels that the instruction turned out to need, which can
learn on the spot to make up for the others. What the dense model's attention made of the
text is there at the end too, for an answer to go on from.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..selection.masks import Selection
from ..slicing.compensation import slice_compensated
from ..slicing.pruning import PROJECTIONS, ffn_layers, note_width, slice_ffn
from ..slicing.reading import read_ffn, read_text, steps_of, visits_of
from ..storage.folder import Folder

Progress = Callable[[Iterable], Iterable]


Choose = Callable[[int, mx.array], mx.array]


class Cut(NamedTuple):
    """What a sweep leaves.

    Attributes:
        model: an ordinary mlx-lm model, with the channels that were chosen.
        cache: the text's KV cache, as the dense model made it.
    """

    model: nn.Module
    cache: list[Any]


class Swept(NamedTuple):
    """What :meth:`ifp_mlx.model.IFPModel.sweep` makes.

    Attributes:
        selection: what is kept.
        compact: an ordinary mlx-lm model.
        cache: the instruction's KV cache of the dense model, if that read it.
    """

    selection: Selection
    compact: nn.Module
    cache: list[Any] | None = None


def activation_scores(
    source: Folder, tokens: Sequence[int], *, progress: Progress = iter
) -> mx.array:
    """Return :func:`ifp_mlx.selectors.activation_scores` of a model that stays on disk.

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
    progress: Progress = iter,
) -> Cut:
    """Select channels by their activation and make the compact model, in one pass.

    About one dense layer is in memory above the compact model.

    Args:
        source: where the weights are.
        tokens: ``T`` ids.
        choose: returns the channels of a layer to keep, int32 ``[k]``, sorted, for its
            number and its activation scores, ``[F]``.
        compensate: let the kept channels make up for the dropped ones, as the text
            shows (:mod:`ifp_mlx.compensation`); else the model is equal to slicing the
            same channels out of the dense one.
        progress: wraps the iteration over layers.
    """
    sweep = _Sweep(source, tokens, choose, compensate, progress)
    cache = sweep.run(tokens)
    note_width(sweep.model)
    mx.eval(sweep.model.parameters())
    return Cut(sweep.model, cache)


def compensated_model(
    source: Folder, selection: Selection, *, progress: Progress = iter
) -> nn.Module:
    """Make the compact model of channels that are chosen already, compensated.

    Args:
        source: where the weights are.
        selection: made for the source's model; its text shows how.
        progress: wraps the iteration over layers.

    Raises:
        ValueError: if the selection has gates.
    """
    if selection.gates is not None:
        raise ValueError(
            f"The mask {selection.mask_id} has gates from training, which compensation "
            "does not know; leave compensation out."
        )

    def choose(layer: int, scores: mx.array) -> mx.array:
        return selection.indices[layer]

    tokens = selection.text or ()
    return compact_model(
        source, tokens, choose, compensate=True, progress=progress
    ).model


class _Sweep:
    """What is left of a model, layer by layer, while a text goes through it.

    A long text goes through in several steps, and some model types loop over their
    layers: all but the last visit read an FFN and let it go.
    """

    def __init__(
        self,
        source: Folder,
        tokens: Sequence[int],
        choose: Choose | None,
        compensate: bool,
        progress: Progress,
    ) -> None:
        self.source = source
        self.choose = choose
        self.compensate = compensate
        self.model = source.open()
        self.ffns = [ffn.module for ffn in ffn_layers(self.model)]
        self.energy = [mx.array(0.0)] * len(self.ffns)
        steps = len(steps_of(tokens))
        self._visits = [visits * steps for visits in visits_of(self.model)]
        self._passing: list[nn.Module] = []
        self._ticks = iter(progress(range(sum(self._visits))))

    def run(self, tokens: Sequence[int]) -> list[Any]:
        """Send the text through the model, end the progress bar, return the KV cache."""
        cache = read_text(self.model, tokens, self._visit)
        next(self._ticks, None)
        return cache

    def _visit(self, layer: int, x: mx.array) -> mx.array:
        """Compute the FFN of a layer, ``[1, T, D]``, and let go of its weights."""
        next(self._ticks, None)
        mx.eval(x)  # attention's arrays go before the FFN's come
        self._visits[layer] -= 1
        last = self._visits[layer] == 0
        ffn = self.ffns[layer] if last else self._passing_ffn(layer)
        self.source.fill(ffn, layer)
        seen: list[mx.array] = []
        output, energy = read_ffn(ffn, x, seen if last and self.compensate else None)
        self.energy[layer] = self.energy[layer] + energy
        mx.eval(self.energy[layer])
        if last and self.choose is not None:
            self._cut(ffn, self.choose(layer, mx.sqrt(self.energy[layer])), seen)
        else:
            for name in PROJECTIONS:
                ffn[name] = nn.Identity()
        mx.clear_cache()  # or MLX would hold on to the dense layer's memory
        return output

    def _cut(self, ffn: nn.Module, index: mx.array, seen: list[mx.array]) -> None:
        """Keep some channels of an FFN, compensated by what was seen of them all."""
        if self.compensate:
            slice_compensated(ffn, index, mx.concatenate(seen))
        else:
            slice_ffn(ffn, index)
        mx.eval(ffn.parameters())

    def _passing_ffn(self, layer: int) -> nn.Module:
        """Return a layer's FFN, unread, for a visit that is not the last."""
        if layer == 0:
            self._passing = [ffn.module for ffn in ffn_layers(self.source.open())]
        return self._passing[layer]
