"""What pruning each layer costs: measured once, kept with the model.

One layer at a time is cut to a few widths, all others left whole, and the KL from the
dense model's next-token distribution is taken over some of the calibration text. The
allocation `sensitivity` then keeps more where cutting costs more.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..files.atomic import new_file
from ..files.progress import ProgressBar
from ..model.calibration import TOKENS, calibration_texts
from ..model.checkpoint import SENSITIVITY_FILE, IFPModel
from ..selection import top_k
from ..selection.widths import MEASURED_SHARES
from ..slicing import reading
from ..slicing.masked import mask_model, set_masks
from ..slicing.stock import StandIn, log_softmax
from .rows import read_rows

DATA_TEXTS = 12  # of a user's own files, all together
TEXTS_HASH = "texts"  # in the file's metadata: a hash of the texts it was measured on
PARTIAL_FILE = f"partial.{SENSITIVITY_FILE}"


def measure_sensitivity(
    model: IFPModel,
    texts: Sequence[Sequence[int]] | None = None,
    *,
    progress: ProgressBar = iter,
) -> mx.array:
    """Measure every layer and keep the result with the model.

    A run that was stopped goes on after its last whole layer.

    Args:
        model: from :func:`ifp_mlx.load`; its dense weights are in memory meanwhile.
        texts: token ids to measure on, of tasks like those to come, from
            :func:`data_texts`; default: some of the package's calibration text.
        progress: wraps the iteration over layers.

    Returns:
        KL to the dense model when a layer alone keeps each of ``MEASURED_SHARES``,
        nats per token, ``[L, 6]`` float32; the last column is 0.

    Raises:
        ValueError: if the model is a mixture, whose layers keep equally many experts.
    """
    if model.plan.unit == "expert":
        raise ValueError(
            f"The layers of {model.path} keep equally many experts, so that a stock model "
            "can have them: there is nothing to allocate by sensitivity."
        )
    texts = calibration_texts(model) if texts is None else texts
    about = {TEXTS_HASH: hash_of(texts)}
    partial_file = model.path / PARTIAL_FILE
    done = _read_partial(partial_file, about)
    probe = Probe(model, texts)
    for layer in progress(range(len(done), model.layers)):
        done.append(probe.costs(layer).mean(axis=0).tolist())
        _save(partial_file, done, about)
    costs = mx.array(np.array(done, dtype=np.float32))
    _save(model.path / SENSITIVITY_FILE, done, about)
    partial_file.unlink()
    model.__dict__["sensitivity"] = costs
    return costs


def data_texts(model: IFPModel, files: Sequence[Path]) -> list[list[int]]:
    """Return the token ids of some examples of each file, prompt and answer.

    The shortest examples that are long enough are taken: many tasks tell more than long
    texts of few.

    Args:
        model: whose tokenizer reads them.
        files: JSONL, in the formats of ``ifp_mlx.evaluate``; at least one.

    Raises:
        FileNotFoundError, ValueError: if a file is missing or bad, or none holds an
            example.
    """
    each = max(1, DATA_TEXTS // len(files))
    texts = []
    for file in files:
        rows = read_rows(file, model.tokenizer, vocabulary=model.vocabulary)
        found = sorted((row.prompt + row.answer for row in rows), key=len)
        enough = [text for text in found if len(text) >= TOKENS // 2] or found[-1:]
        texts += [text[:TOKENS] for text in enough[:each]]
    if not texts:
        raise ValueError(
            f"{', '.join(map(str, files))} hold no example; give other files."
        )
    return texts


class Probe:
    """A dense model, its predictions for some texts, and a way to prune one layer.

    Args:
        model: from :func:`ifp_mlx.load`.
        texts: token ids of each.
        scores: ``[L, F]``, by which a layer's channels are chosen; default: the
            statistic of ``texts``.
    """

    def __init__(
        self,
        model: IFPModel,
        texts: Sequence[Sequence[int]],
        scores: mx.array | None = None,
    ) -> None:
        self.dense = model.dense()
        self.masked = mask_model(self.dense, model.plan)
        self.ones = mx.ones((model.layers, model.channels))
        self.granularity = model.granularity
        if scores is None:
            examples = [(text,) for text in texts]
            scores = reading.scores(self.dense, model.plan, examples)
        self.scores = scores
        self.texts = texts
        # All texts begin with the chat template's part, which is easy to predict.
        self.start = next(
            (
                n
                for n, column in enumerate(zip(*texts, strict=False))
                if len({*column}) > 1
            ),
            0,
        )
        runs = [_record(self.dense, text) for text in texts]
        self.outputs = [outputs for outputs, _ in runs]
        self.reference = [self._log_probabilities(logits) for _, logits in runs]

    def costs(
        self, layer: int, shares: Sequence[float] = MEASURED_SHARES
    ) -> np.ndarray:
        """Return the KL of each of ``N`` texts where one layer keeps each of ``S``
        shares, nats per token, ``[N, S]``.
        """
        set_masks(self.masked, self.ones)
        self.replay = layer - 1 if self._can_replay(layer - 1) else -1
        return np.array([self._cost(layer, share) for share in shares]).T

    def _cost(self, layer: int, share: float) -> list[float]:
        if share == 1:
            return [0.0] * len(self.texts)
        F = self.ones.shape[1]
        mask = mx.zeros(F)
        if k := round(share * F / self.granularity) * self.granularity:
            row = self.scores[layer : layer + 1]
            mask = top_k.select(row, [k], granularity=self.granularity).mask()[0]
        set_masks(self.masked, self.ones)
        set_masks([self.masked[layer]], mask[None])
        found = []
        for text, outputs, p in zip(
            self.texts, self.outputs, self.reference, strict=True
        ):
            with _replayed(self.dense, self.replay, outputs):
                q = self._log_probabilities(self.dense(mx.array([text])))
            found.append(float((mx.exp(p) * (p - q)).sum(axis=-1).mean()))
        return found

    def _can_replay(self, layer: int) -> bool:
        """Whether later blocks use only the output of earlier ones; some model types
        share keys and values between blocks.
        """
        try:
            with _replayed(self.dense, layer, self.outputs[0]):
                found = self._log_probabilities(self.dense(mx.array([self.texts[0]])))
        except (AttributeError, TypeError, ValueError):
            return False
        return bool(mx.allclose(found, self.reference[0], rtol=1e-3, atol=1e-3))

    def _log_probabilities(self, logits: mx.array) -> mx.array:
        """Return ``[T, V]`` of the text after the template's part."""
        return log_softmax(logits[0, self.start :])


def _record(model: nn.Module, text: Sequence[int]) -> tuple[list[Any], mx.array]:
    """Return the output of every block, and the logits, ``[1, T, V]``."""
    outputs: list[Any] = []

    def record(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        outputs.append(block(*args, **kwargs))
        return outputs[-1]

    blocks = {n: partial(record, block) for n, block in enumerate(model.layers)}
    with _replaced(model, blocks):
        logits = model(mx.array([text]))
    mx.eval(outputs, logits)
    return outputs, logits


def _replayed(model: nn.Module, layer: int, outputs: list[Any]) -> Any:
    """Let a block return its earlier output: as MLX is lazy, nothing before it is
    computed again.
    """
    if layer < 0:
        return _replaced(model, {})
    return _replaced(model, {layer: lambda *args, **kwargs: outputs[layer]})


@contextmanager
def _replaced(model: nn.Module, calls: dict[int, Any]) -> Iterator[None]:
    # `model.layers` may be a copy of the lists that the forward pass goes through.
    blocks = {id(block): number for number, block in enumerate(model.layers)}
    lists = [
        (value, list(value))
        for module in model.modules()
        for value in module.values()
        if isinstance(value, list) and any(id(entry) in blocks for entry in value)
    ]
    try:
        for layers, stock in lists:
            layers[:] = [
                StandIn(block, calls[blocks[id(block)]])
                if blocks.get(id(block)) in calls
                else block
                for block in stock
            ]
        yield
    finally:
        for layers, stock in lists:
            layers[:] = stock


def hash_of(texts: Sequence[Sequence[int]]) -> str:
    """Return a hash of some texts."""
    tokens = json.dumps([list(text) for text in texts])
    return hashlib.sha256(tokens.encode()).hexdigest()[:16]


def _read_partial(path: Path, about: dict[str, str]) -> list[list[float]]:
    if not path.exists() or _about(path) != about:
        return []
    return np.array(cast(dict[str, mx.array], mx.load(str(path)))["kl"]).tolist()


def _about(path: Path) -> dict[str, str]:
    """Return what a file says of itself."""
    _, metadata = cast(Any, mx.load(str(path), return_metadata=True))
    return metadata


def _save(path: Path, rows: list[list[float]], about: dict[str, str]) -> None:
    with new_file(path) as scratch:
        mx.save_safetensors(str(scratch), {"kl": mx.array(rows)}, metadata=about)
