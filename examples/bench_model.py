"""One resident dense model whose FFNs are swapped for sliced ones, cheaply.

A row costs one dense pass and then one pass for each distinct compact model: logits are
computed at the answer alone, `down_proj` is kept channel by channel so that a selection
is three row gathers, and a prompt that the dense model has read is not read again.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx import Selection, load
from ifp_mlx.compensation import down_correction
from ifp_mlx.evaluation.rows import Row
from ifp_mlx.pruning import TappedFFN, ffn_layers, stock_forward

GROUP = 64  # channels that a quantised model has in one group


class Reading(NamedTuple):
    """What the dense model made of a row.

    Attributes:
        reference: its log-probabilities at the answer, ``[A, V]``.
        cache: keys and values of the prompt, ``P`` tokens.
        channels: of the prompt, for each layer, ``[P, F]``.
    """

    reference: mx.array
    cache: list[Any]
    channels: list[mx.array]


class SlicedFFN(nn.Module):
    """An FFN of a stock class with other weights, ``down`` channel by channel.

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
        return stock_forward(
            self._ffn,
            x,
            gate_proj=lambda x: x @ gate.T,
            up_proj=lambda x: x @ up.T,
            down_proj=lambda h: h @ down,
        )


class Bench:
    """A dense model, and the compact models that selections make of it.

    Args:
        folder: of a model that is not quantised.
        answer_tokens: of each row that are compared, at most.
    """

    def __init__(self, folder: Path, answer_tokens: int = 96) -> None:
        self.answer_tokens = answer_tokens
        self.model, self.tokenizer = load(folder)
        prior = self.model.prior
        self.prior = self.model.compute_prior() if prior is None else prior
        self.dense = self.model.dense()
        self.ffns = ffn_layers(self.dense)
        self.down = [mx.contiguous(f.module.down_proj.weight.T) for f in self.ffns]
        mx.eval(self.dense.parameters(), self.down)

    def read(self, row: Row) -> Reading:
        """Let the dense model read a row."""
        from mlx_lm.models.cache import trim_prompt_cache

        channels: list[list[mx.array]] = [[] for _ in self.ffns]

        def tap(layer: int) -> Callable[[mx.array], mx.array]:
            def keep(h: mx.array) -> mx.array:
                channels[layer].append(h[0])
                return h

            return keep

        tapped = [TappedFFN(ffn.module, tap(n)) for n, ffn in enumerate(self.ffns)]
        with self.swapped(tapped):
            reference, cache = self._pass(row)
        trimmed = trim_prompt_cache(cache, len(row.answer) - 1)
        assert trimmed == len(row.answer) - 1, "a sliding window was left behind"
        found = [mx.concatenate(h)[: len(row.prompt)] for h in channels]
        mx.eval(found)
        return Reading(reference, cache, found)

    def compact(self, row: Row, modules: list[nn.Module]) -> mx.array:
        """Return the log-probabilities at the answer, ``[A, V]``, of a compact model
        that reads the prompt too.
        """
        with self.swapped(modules):
            return self._pass(row)[0]

    def decode(self, row: Row, modules: list[nn.Module], reading: Reading) -> mx.array:
        """Return them of a compact model that goes on where the dense one has read the
        prompt; the first token is the dense model's.
        """
        first = reading.reference[:1]
        if len(row.answer) == 1:
            return first
        cache = copy.deepcopy(reading.cache)
        with self.swapped(modules):
            rest = self.dense(mx.array([row.answer[:-1]]), cache=cache)
            return mx.concatenate([first, log_probabilities(rest[0])])

    def sliced(
        self,
        selection: Selection,
        channels: Sequence[mx.array] | None = None,
        *,
        quantise: bool = False,
    ) -> list[nn.Module]:
        """Return the selected FFNs, compensated by what a text's channels showed, and
        rounded as quantising ``down_proj`` again does.
        """
        modules: list[nn.Module] = []
        for layer, (_, _, ffn) in enumerate(self.ffns):
            index, down = selection.indices[layer], self.down[layer]
            part = [ffn.gate_proj.weight[index], ffn.up_proj.weight[index], down[index]]
            if channels is not None:
                part[2] += down_correction(down.T, channels[layer], index)
            if quantise:
                part[2] = rounded(part[2])
            mx.eval(part)
            modules.append(SlicedFFN(ffn, *part))
        return modules

    @contextmanager
    def swapped(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Put other FFNs into the dense model for a while."""
        try:
            for (block, name, _), module in zip(self.ffns, modules, strict=True):
                setattr(block, name, module)
            yield
        finally:
            for block, name, module in self.ffns:
                setattr(block, name, module)

    def _pass(self, row: Row) -> tuple[mx.array, list[Any]]:
        from mlx_lm.models.cache import make_prompt_cache

        cache = make_prompt_cache(self.dense)
        # MLX is lazy: these logits are never computed.
        self.dense(mx.array([row.prompt[:-1]]), cache=cache)
        mx.eval([layer.state for layer in cache])
        answer = mx.array([[row.prompt[-1], *row.answer[:-1]]])
        return log_probabilities(self.dense(answer, cache=cache)[0]), cache


def rounded(down: mx.array) -> mx.array:
    """Return ``down_proj``, channel by channel ``[k, D]``, as it is at 4 bits."""
    weight, scales, biases = mx.quantize(down.T, group_size=GROUP, bits=4)
    whole = mx.dequantize(weight, scales, biases, group_size=GROUP, bits=4)
    return mx.contiguous(whole.T)


def log_probabilities(logits: mx.array) -> mx.array:
    """Return them in float32, evaluated."""
    found = nn.log_softmax(logits.astype(mx.float32), axis=-1)
    mx.eval(found)
    return found


def energy(channels: mx.array) -> mx.array:
    """Return the statistic of some tokens' channels ``[T, F]``, squared, ``[F]``."""
    square = mx.square(channels.astype(mx.float32))
    return (square / mx.maximum(square.sum(axis=-1, keepdims=True), 1e-30)).sum(axis=0)
