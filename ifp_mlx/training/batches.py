"""How examples become batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

PAD = 32  # lengths are padded to multiples of it, so that few shapes are compiled


@dataclass(frozen=True)
class Record:
    """One example: what selects, what is read, and what is learned from it.

    Attributes:
        instruction: token ids for the predictor; or several such lists: ``selectors``
            then says for every token which of them selects when it is predicted.
        tokens: token ids for the model.
        loss: bool of each token, whether it is a target that counts.
        task: the number of its task, -1 if it names none.
        place: where it was read, for messages.
        selectors: int32 of each token, or ``None`` with one instruction.
    """

    instruction: Any
    tokens: np.ndarray
    loss: np.ndarray
    task: int = -1
    place: str = ""
    selectors: np.ndarray | None = None


class Batch(NamedTuple):
    """Examples of one training step, padded on the right.

    Attributes:
        instruction: what selects, int32 ``[B, Ti]``.
        lengths: real tokens of each instruction, int32 ``[B]``.
        tokens: what the model reads, int32 ``[B, T]``.
        loss_mask: 1 where a token is a target that counts, float32 ``[B, T]``. The
            first token of a row has nothing before it and never counts.
        tasks: the number of each row's task, int32 ``[B]``, or ``None``.
        selectors: where a row has several instructions, ``[B, K, Ti]`` with lengths
            ``[B, K]``: which of them selects when a token is predicted, int32
            ``[B, T]``; else ``None``.
    """

    instruction: mx.array
    lengths: mx.array
    tokens: mx.array
    loss_mask: mx.array
    tasks: mx.array | None = None
    selectors: mx.array | None = None

    @property
    def real(self) -> mx.array:
        """1 for every row's tokens up to its last target, float32 ``[B, T - 1]``."""
        later = mx.cumsum(self.loss_mask, axis=1, reverse=True)
        return (later > 0).astype(mx.float32)[:, :-1]

    def share(self, rank: int, size: int) -> "Batch":
        """Return every ``size``-th row from ``rank`` on: one machine's part."""
        if size == 1:
            return self
        rows: Any = (None if a is None else a[rank::size] for a in self)
        return Batch(*rows)


class Batches:
    """Training batches in an order that depends only on the seed and the epoch, so that
    a resumed run need know no more than a batch's number.

    Args:
        records: at least ``batch_size``.
        batch_size: rows of a batch.
        seed: of the order.
    """

    def __init__(self, records: Sequence[Record], batch_size: int, seed: int) -> None:
        if len(records) < batch_size:
            raise ValueError(
                f"There are {len(records)} training examples, fewer than the batch size "
                f"{batch_size}; lower it."
            )
        self.records, self.batch_size, self.seed = records, batch_size, seed
        self.per_epoch = len(records) // batch_size
        self._epoch, self._order = -1, np.zeros((0, 0), dtype=int)

    def __call__(self, number: int) -> Batch:
        """Return batch ``number``, counted from 0 through all epochs."""
        return collate(self._chosen(number))

    def places(self, number: int) -> list[str]:
        """Return where the rows of batch ``number`` were read."""
        return [record.place for record in self._chosen(number)]

    def _chosen(self, number: int) -> list[Record]:
        epoch, place = divmod(number, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffle(epoch)
        return [self.records[i] for i in self._order[place]]

    def _shuffle(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.records))[: self.per_epoch * self.batch_size]
        # Rows of similar length lie together, so that little padding is computed.
        window = 32 * self.batch_size
        for start in range(0, len(order), window):
            part = order[start : start + window]
            part[:] = sorted(part, key=lambda i: len(self.records[i].tokens))
        return rng.permutation(order.reshape(self.per_epoch, self.batch_size))


def in_order(records: Sequence[Record], batch_size: int) -> list[Batch]:
    """Return batches of all records in their order, the last one perhaps smaller."""
    starts = range(0, len(records), batch_size)
    return [collate(records[start : start + batch_size]) for start in starts]


def collate(records: Sequence[Record]) -> Batch:
    """Put records side by side, padded on the right."""
    tasks = np.array([record.task for record in records], dtype=np.int32)
    return Batch(
        *_instructions(records),
        mx.array(_padded([record.tokens for record in records])),
        mx.array(_padded([record.loss for record in records]).astype(np.float32)),
        None if (tasks < 0).all() else mx.array(tasks),
        None
        if records[0].selectors is None
        else mx.array(
            _padded([r.selectors for r in records if r.selectors is not None])
        ),
    )


def _instructions(records: Sequence[Record]) -> tuple[mx.array, mx.array]:
    """Return the instructions of records, one or several each, and their lengths."""
    if records[0].selectors is None:
        rows = [record.instruction for record in records]
        return mx.array(_padded(rows)), mx.array([len(r) for r in rows], dtype=mx.int32)
    # Missing ones, which select nothing, are filled with a copy of the first.
    most = max(len(record.instruction) for record in records)
    parts = [(*r.instruction, *[r.instruction[0]] * most)[:most] for r in records]
    flat = [part for row in parts for part in row]
    table, shape = _padded(flat), (len(records), most)
    lengths = mx.array([len(part) for part in flat], dtype=mx.int32)
    return mx.array(table.reshape(*shape, -1)), lengths.reshape(shape)


def _padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    longest = max(len(row) for row in rows)
    table = np.zeros((len(rows), -(-longest // PAD) * PAD), dtype=rows[0].dtype)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    return table
