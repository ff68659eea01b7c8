"""One resident dense model whose FFNs are swapped for sliced ones, cheaply.

A row costs one dense pass and then one pass for each distinct compact model: logits are
computed only at the answer, `down_proj` is stored channel by channel so that a
selection takes three gathers of rows, and a prompt that the dense model has read is not
read again.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx import Selection, load
from ifp_mlx.evaluation.rows import Row
from ifp_mlx.evaluation.teacher import Reference, continued, log_probabilities, read_row
from ifp_mlx.slicing.compensation import Evidence, down_correction, evidence
from ifp_mlx.slicing.masked import tapped
from ifp_mlx.slicing.shapes import put_at

GROUP = 64  # channels that a quantised model has in one group


class Reading(NamedTuple):
    """The dense model's reading of a row.

    Attributes:
        prompt: its log-probabilities at the answer, and its cache after the prompt.
        channels: of the prompt, for each layer, ``[P, F]``.
    """

    prompt: Reference
    channels: list[mx.array]

    @property
    def reference(self) -> mx.array:
        """The log-probabilities, ``[A, V]``."""
        return self.prompt.log_probabilities


class SlicedFFN(nn.Module):
    """An FFN of a stock class with other weights, ``down`` stored channel by channel;
    the models measured here name their matrices gate, up and down.

    Args:
        ffn: whose class computes.
        gate, up, down: ``[k, D]``.
    """

    def __init__(
        self, ffn: nn.Module, gate: mx.array, up: mx.array, down: mx.array
    ) -> None:
        super().__init__()
        self._ffn, self._weights = ffn, (gate, up, down)

    def __call__(self, x: mx.array) -> mx.array:
        """Return the FFN's output, ``[B, T, D]``, for ``x``, ``[B, T, D]``."""
        gate, up, down = self._weights
        stand_in = copy.copy(self._ffn)
        stand_in.gate_proj = lambda x: x @ gate.T
        stand_in.up_proj = lambda x: x @ up.T
        stand_in.down_proj = lambda h: h @ down
        return type(self._ffn).__call__(stand_in, x)


class Bench:
    """A dense model, and the compact models that selections make of it.

    Args:
        folder: of a model that is not quantised.
        answer_tokens: most tokens of each answer that are compared.
    """

    def __init__(self, folder: Path, answer_tokens: int = 96) -> None:
        self.answer_tokens = answer_tokens
        self.model, self.tokenizer = load(folder)
        self.sketch = self.model.sketch()
        self.prior = self.model.known_prior()
        self.dense = self.model.dense()
        self.plan = self.model.plan
        self.ffns = self.plan.modules(self.dense)
        self.down = [mx.contiguous(ffn.down_proj.weight.T) for ffn in self.ffns]
        mx.eval(self.dense.parameters(), self.down)

    def read(self, row: Row) -> Reading:
        """Let the dense model read a row."""
        channels: list[list[mx.array]] = [[] for _ in self.ffns]

        def tap(layer: int) -> Callable[[mx.array], mx.array]:
            def keep(h: mx.array) -> mx.array:
                channels[layer].append(h[0])
                return h

            return keep

        taps = [tap(layer) for layer in range(len(self.ffns))]
        with tapped(self.plan.inlets(self.dense), taps):
            prompt = read_row(self.dense, row)
        found = [mx.concatenate(h)[: len(row.prompt)] for h in channels]
        mx.eval(found)
        return Reading(prompt, found)

    def compact(self, row: Row, modules: list[nn.Module]) -> mx.array:
        """Return the log-probabilities at the answer, ``[A, V]``, of a compact model
        that reads the prompt too.
        """
        with self.swapped(modules):
            return log_probabilities(self.dense, row)

    def decode(self, row: Row, modules: list[nn.Module], reading: Reading) -> mx.array:
        """Return them of a compact model that goes on where the dense one has read the
        prompt; the first token is the dense model's.
        """
        with self.swapped(modules):
            return continued(self.dense, row, reading.prompt)

    def evidence(
        self, channels: Sequence[mx.array], *, alone: bool = False
    ) -> list[Evidence]:
        """Return what compensates each layer.

        Args:
            channels: of a text, for each layer, ``[T, F]``.
            alone: whether no sketch of the calibration text stands beside them.
        """
        sketch = [None] * len(channels) if alone else self.sketch
        return [evidence(*known) for known in zip(channels, sketch, strict=True)]

    def sliced(
        self,
        selection: Selection,
        known: Sequence[Evidence] | None = None,
        *,
        quantise: bool = False,
    ) -> list[nn.Module]:
        """Return the selected FFNs, compensated by some :meth:`evidence`, and rounded as
        quantising ``down_proj`` again does.
        """
        modules: list[nn.Module] = []
        for layer, ffn in enumerate(self.ffns):
            index, down = selection.indices[layer], self.down[layer]
            part = [ffn.gate_proj.weight[index], ffn.up_proj.weight[index], down[index]]
            if known is not None:
                part[2] += down_correction(down.T, known[layer], index)
            if quantise:
                part[2] = rounded(part[2])
            mx.eval(part)
            modules.append(SlicedFFN(ffn, *part))
        return modules

    @contextmanager
    def swapped(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Put other FFNs into the dense model for a while."""
        try:
            self._put(modules)
            yield
        finally:
            self._put(self.ffns)

    def _put(self, modules: Sequence[nn.Module]) -> None:
        for layer, module in zip(self.plan.layers, modules, strict=True):
            put_at(self.dense, layer.path, module)


def rounded(down: mx.array) -> mx.array:
    """Return ``down_proj``, channel by channel ``[k, D]``, as it is at 4 bits."""
    weight, scales, biases = mx.quantize(down.T, group_size=GROUP, bits=4)
    whole = mx.dequantize(weight, scales, biases, group_size=GROUP, bits=4)
    return mx.contiguous(whole.T)


def energy(channels: mx.array) -> mx.array:
    """Return the statistic of some tokens' channels ``[T, F]``, squared, ``[F]``."""
    square = mx.square(channels.astype(mx.float32))
    return (square / mx.maximum(square.sum(axis=-1, keepdims=True), 1e-30)).sum(axis=0)
