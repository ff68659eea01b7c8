"""The dense parent's distribution at every token, computed once and kept on disk.

Of each distribution over the vocabulary the most likely tokens are kept as they are,
and the rest is sampled. A KL over both is an unbiased estimate of the exact one; the
most likely tokens alone would leave out the rest's part. A token takes a few hundred
bytes, and a training step needs neither the parent nor its output layer.

Source: the estimate is that of Anshumann et al. 2025 (arXiv:2503.16870), with the
largest probabilities taken out of the sampling.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..files.atomic import new_file
from ..slicing.stock import log_softmax
from .batches import Batch, Record

INDEX = "index.json"
PART = 32  # records of a file: the most that a killed run has to compute again
BLOCK = 256  # of the vocabulary, for running sums
CHUNK = 64  # tokens whose distributions are in memory at once


@dataclass(frozen=True)
class Form:
    """How a distribution is kept.

    Attributes:
        top: the most likely tokens.
        samples: draws from the rest; each stands for an equal part of it.
    """

    top: int = 48
    samples: int = 16

    def dtype(self, vocabulary: int) -> np.dtype:
        """Return the record of one token: ids and log-probabilities."""
        width = self.top + self.samples
        ids = np.uint16 if vocabulary <= 2**16 else np.uint32
        return np.dtype([("ids", ids, (width,)), ("logp", np.float16, (width,))])


class ParentCache:
    """The parent's distributions for some records, in a folder.

    Args:
        folder: made by :func:`fill_cache`.
        records: in the order they were cached in; ``task`` is each one's number.
        form: how they were kept.
    """

    def __init__(self, folder: Path, records: Sequence[Record], form: Form) -> None:
        self.form = form
        names = sorted(json.loads((folder / INDEX).read_text("utf-8"))["parts"])
        self._parts = [np.load(folder / name, mmap_mode="r") for name in names]
        sizes = [len(record.tokens) - 1 for record in records]
        groups = [sizes[n : n + PART] for n in range(0, len(sizes), PART)]
        self._starts = [np.cumsum([0, *group]) for group in groups]

    @property
    def bytes_per_token(self) -> int:
        """What one token takes on disk."""
        return self._parts[0].dtype.itemsize

    def __call__(self, batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
        """Return ids, weights and log-probabilities, ``[B, T - 1, W]`` each; padding
        has weight 0.

        Args:
            batch: its ``tasks`` are the numbers of its rows' records.
        """
        assert batch.tasks is not None
        B, T = batch.tokens.shape
        width = self.form.top + self.form.samples
        ids = np.zeros((B, T - 1, width), dtype=np.int32)
        logp = np.zeros((B, T - 1, width), dtype=np.float32)
        weights = np.zeros((B, T - 1, width), dtype=np.float32)
        for row, number in enumerate(np.array(batch.tasks)):
            found = self._record(int(number))
            ids[row, : len(found)] = found["ids"]
            logp[row, : len(found)] = found["logp"]
            weights[row, : len(found)] = weights_of(logp[row, : len(found)], self.form)
        return mx.array(ids), mx.array(weights), mx.array(logp)

    def _record(self, number: int) -> np.ndarray:
        part, place = divmod(number, PART)
        start, end = self._starts[part][place : place + 2]
        return self._parts[part][start:end]


def weights_of(logp: np.ndarray, form: Form) -> np.ndarray:
    """Return the probability that each kept token stands for, ``[T, W]``; a row sums to
    1, or to less if the form has no samples.

    Args:
        logp: log-probabilities as they are kept, ``[T, W]``.
        form: how they are kept.
    """
    top = np.exp(logp[:, : form.top])
    if not form.samples:
        return top
    rest = np.maximum(1 - top.sum(axis=1, keepdims=True), 0)
    each = np.repeat(rest / form.samples, form.samples, axis=1)
    return np.concatenate([top, each], axis=1)


def fill_cache(
    folder: Path,
    open_parent: Callable[[], nn.Module],
    records: Sequence[Record],
    form: Form,
    about: dict[str, Any],
    *,
    progress: Callable[[Iterable], Iterable] = iter,
) -> ParentCache:
    """Compute the missing or damaged parts of the cache, and open it.

    Args:
        folder: may hold a cache that was begun with the same records and settings.
        open_parent: returns the dense model; called only if something is missing.
        records: what the parent is to read; ``task`` must number them from 0.
        form: how distributions are kept.
        about: other settings on which the content depends.
        progress: wraps the iteration over the missing parts.

    Raises:
        ValueError: if the folder holds a cache of something else.
    """
    about = about | {"form": [form.top, form.samples], "records": _digest(records)}
    index = _read_index(folder, about)
    names = [f"part-{n:05d}.npy" for n in range(-(-len(records) // PART))]
    missing = [n for n, name in enumerate(names) if not _is_whole(folder, name, index)]
    parent = open_parent() if missing else None
    for number in progress(missing):
        part = records[number * PART : (number + 1) * PART]
        rows = [_compress(parent, record, form) for record in part]
        part_file = io.BytesIO()
        np.save(part_file, np.concatenate(rows), allow_pickle=False)
        content = part_file.getvalue()
        with new_file(folder / names[number]) as scratch:
            scratch.write_bytes(content)
        index["parts"][names[number]] = hashlib.sha256(content).hexdigest()
        with new_file(folder / INDEX) as scratch:
            scratch.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return ParentCache(folder, records, form)


def _read_index(folder: Path, about: dict[str, Any]) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        return {"about": about, "parts": {}}
    index = json.loads(path.read_text(encoding="utf-8"))
    if index["about"] != about:
        raise ValueError(
            f"{folder} holds what the dense model said about other examples, or in "
            "another form; delete it, or choose another output folder."
        )
    return index


def _is_whole(folder: Path, name: str, index: dict[str, Any]) -> bool:
    path = folder / name
    if name not in index["parts"] or not path.is_file():
        return False
    return hashlib.sha256(path.read_bytes()).hexdigest() == index["parts"][name]


def _digest(records: Sequence[Record]) -> str:
    digest = hashlib.sha256()
    for record in records:
        digest.update(np.array([len(record.tokens)], dtype="<i4").tobytes())
        digest.update(record.tokens.astype("<i4").tobytes())
    return digest.hexdigest()


def _compress(parent: Any, record: Record, form: Form) -> np.ndarray:
    """Return what is kept of the distributions after a record's tokens, ``[T - 1]``."""
    logp = log_softmax(parent(mx.array(record.tokens[None, :-1]))[0])
    rng = np.random.default_rng(record.task)  # the same after an interruption
    table = np.array(logp)
    parts = np.split(table, range(CHUNK, len(table), CHUNK))
    return np.concatenate([compress(part, form, rng) for part in parts])


def compress(logp: np.ndarray, form: Form, rng: np.random.Generator) -> np.ndarray:
    """Return what is kept of distributions.

    Args:
        logp: log-probabilities, float32 ``[T, V]``; ``V`` above ``top``.
        form: how much is kept.
        rng: draws the samples.

    Returns:
        ``[T]`` records of the form's dtype.
    """
    T, V = logp.shape
    top = np.argpartition(logp, V - form.top, axis=1)[:, -form.top :]
    rest = np.exp(logp)
    np.put_along_axis(rest, top, 0.0, axis=1)
    # One draw from each of equally large parts of the rest: unbiased, and less noisy
    # than free draws.
    draws = np.arange(form.samples) + rng.random((T, form.samples))
    sampled = [
        _inverse(line, parts / max(form.samples, 1))
        for line, parts in zip(rest, draws, strict=True)
    ]
    sampled_ids = np.array(sampled, dtype=np.int64)
    ids = np.concatenate([top, sampled_ids.reshape(T, form.samples)], axis=1)
    kept = np.zeros(T, dtype=form.dtype(V))
    kept["ids"] = ids
    # Clipped, so that very small probabilities stay finite in float16.
    kept["logp"] = np.maximum(np.take_along_axis(logp, ids, axis=1), -1e4)
    return kept


def _inverse(mass: np.ndarray, shares: np.ndarray) -> list[int]:
    """Return where the running sum of ``mass``, ``[V]``, passes shares of its total.

    It is summed by blocks first, since a running sum over a whole vocabulary would take
    most of the time.
    """
    starts = np.arange(0, len(mass), BLOCK)
    upto = np.cumsum(np.add.reduceat(mass, starts, dtype=np.float64))
    places = []
    for wanted in shares * upto[-1]:
        block = min(int(np.searchsorted(upto, wanted, side="right")), len(starts) - 1)
        before = upto[block - 1] if block else 0.0
        inside = np.cumsum(mass[starts[block] :][:BLOCK], dtype=np.float64)
        place = int(np.searchsorted(inside, wanted - before, side="right"))
        places.append(int(starts[block]) + min(place, len(inside) - 1))
    return places
