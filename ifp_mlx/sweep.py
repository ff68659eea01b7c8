"""Read a dense model layer by layer: one dense FFN is in memory at a time.

The forward pass is mlx-lm's own, layer after layer. Where it comes to an FFN, the
weights are read, the instruction's tokens go through them, and they are let go again:
all of them, or all but the channels that the instruction turned out to need.
"""

from collections.abc import Callable, Iterable, Sequence

import mlx.core as mx
import mlx.nn as nn

from .pruning import PROJECTIONS, ffn_layers, note_width, slice_ffn
from .selectors import read_ffn, read_text, steps_of, visits_of
from .store import Folder

Progress = Callable[[Iterable], Iterable]
Choose = Callable[[int, mx.array], mx.array]


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
    sweep = _Sweep(source, tokens, None, progress)
    sweep.run(tokens)
    return mx.sqrt(mx.stack(sweep.energy))


def compact_model(
    source: Folder,
    tokens: Sequence[int],
    choose: Choose,
    *,
    progress: Progress = iter,
) -> nn.Module:
    """Select channels by their activation and make the compact model, in one pass.

    About one dense layer is in memory above the compact model.

    Args:
        source: where the weights are.
        tokens: ``T`` ids.
        choose: returns the channels of a layer to keep, int32 ``[k]``, sorted, for its
            number and its activation scores, ``[F]``.
        progress: wraps the iteration over layers.

    Returns:
        An ordinary mlx-lm model, equal to slicing the same channels out of the dense
        one.
    """
    sweep = _Sweep(source, tokens, choose, progress)
    sweep.run(tokens)
    note_width(sweep.model)
    mx.eval(sweep.model.parameters())
    return sweep.model


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
        progress: Progress,
    ) -> None:
        self.source = source
        self.choose = choose
        self.model = source.open()
        self.ffns = [ffn.module for ffn in ffn_layers(self.model)]
        self.energy = [mx.array(0.0)] * len(self.ffns)
        steps = len(steps_of(tokens))
        self._visits = [visits * steps for visits in visits_of(self.model)]
        self._passing: list[nn.Module] = []
        self._ticks = iter(progress(range(sum(self._visits))))

    def run(self, tokens: Sequence[int]) -> None:
        """Send the text through the model, and end the progress bar."""
        read_text(self.model, tokens, self._visit)
        next(self._ticks, None)

    def _visit(self, layer: int, x: mx.array) -> mx.array:
        """Compute the FFN of a layer, ``[1, T, D]``, and let go of its weights."""
        next(self._ticks, None)
        mx.eval(x)  # attention's arrays go before the FFN's come
        self._visits[layer] -= 1
        last = self._visits[layer] == 0
        ffn = self.ffns[layer] if last else self._passing_ffn(layer)
        self.source.fill(ffn, layer)
        output, energy = read_ffn(ffn, x)
        self.energy[layer] = self.energy[layer] + energy
        mx.eval(self.energy[layer])
        if last and self.choose is not None:
            slice_ffn(ffn, self.choose(layer, mx.sqrt(self.energy[layer])))
            mx.eval(ffn.parameters())
        else:
            for name in PROJECTIONS:
                ffn[name] = nn.Identity()
        mx.clear_cache()  # or MLX would hold on to the dense layer's memory
        return output

    def _passing_ffn(self, layer: int) -> nn.Module:
        """Return a layer's FFN, unread, for a visit that is not the last."""
        if layer == 0:
            self._passing = [ffn.module for ffn in ffn_layers(self.source.open())]
        return self._passing[layer]
