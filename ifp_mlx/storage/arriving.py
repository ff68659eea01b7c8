"""A layer's tensors while its records arrive, in any order, from several threads."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .layout import DTYPES, Layout, Part, units_of

STRIP = 64  # channels whose columns are written at a time
PAD = 64  # bytes between rows: rows a power of two apart would evict each other from the cache


@dataclass(frozen=True)
class _Tensor:
    """One tensor.

    Attributes:
        part: what it is.
        offset: where it begins in a record.
        array: the tensor itself.
        units: ``[n, a, b]``, a view of it unit by unit.
        rows: ``[m, a, b]``, receives what is read: ``units`` itself, or where a unit is
            not in one piece, a buffer that is written there at the end.
        old: ``[h, a, b]``, the donor's tensor unit by unit.
    """

    part: Part
    offset: int
    array: mx.array
    units: np.ndarray
    rows: np.ndarray
    old: np.ndarray | None


class ArrivingLayer:
    """The tensors of some units of a layer, those read and those a donor gives.

    Args:
        layout: of the channel file.
        layer: its number.
        units: int ``[n]``, sorted: which units the tensors hold.
        donor: the tensors of the same layer of another model, part by part, and the
            channels it holds, int ``[h]``.
        scratch: uint8, memory to use until the layer is complete, or ``None``.

    Attributes:
        missing: int ``[m]``, sorted: the units that the donor cannot give.
        scratch: for the next layer.
    """

    def __init__(
        self,
        layout: Layout,
        layer: int,
        units: np.ndarray,
        donor: tuple[list[mx.array], np.ndarray] | None = None,
        scratch: np.ndarray | None = None,
    ) -> None:
        given_tensors, held = _held(layout, donor)
        given = np.isin(units, held) if len(held) else np.zeros(len(units), bool)
        self.missing = units[~given]
        self._read, self._copied = np.flatnonzero(~given), np.flatnonzero(given)
        self._from = np.searchsorted(held, units[given])
        columns = [part for part in layout.parts[layer] if part.axis == 1]
        row_bytes = sum(part.unit_bytes(layout.units) + PAD for part in columns)
        needed = row_bytes * len(self.missing)
        if scratch is None or scratch.size < needed:
            scratch = np.empty(needed, np.uint8)
        self.scratch = scratch
        arrays = _zeros(layout, layer, len(units))
        views = bytes_of(arrays)
        olds = None if given_tensors is None else bytes_of(given_tensors)
        self._tensors = []
        for number, (part, offset) in enumerate(layout.fields(layer)):
            view = rows = part.split(views[number], len(units), layout.units)
            if part.axis == 1:
                rows, scratch = _rows(scratch, len(self.missing), view)
            old = None
            if olds is not None:
                old = part.split(olds[number], len(held), layout.units)
            self._tensors.append(_Tensor(part, offset, arrays[number], view, rows, old))

    def put(self, numbers: np.ndarray, records: np.ndarray) -> None:
        """Take in the records, uint8 ``[p, record]``, of ``missing[numbers]``."""
        for tensor in self._tensors:
            nbytes = tensor.rows[0].nbytes
            words = records[:, tensor.offset : tensor.offset + nbytes]
            words = words.view(tensor.rows.dtype)
            whole = tensor.rows is tensor.units
            into = self._read[numbers] if whole else numbers
            tensor.rows[into] = words.reshape(-1, *tensor.rows.shape[1:])

    def complete(self) -> None:
        """Finish the tensors, once every record has been put in."""
        for tensor in self._tensors:
            if tensor.rows is not tensor.units:
                self._write_columns(tensor)
            elif tensor.old is not None:
                tensor.units[self._copied] = tensor.old[self._from]

    def tensors(self) -> dict[str, mx.array]:
        """Return them by name, once complete."""
        return {t.part.name: t.array for t in self._tensors}

    def _write_columns(self, tensor: _Tensor) -> None:
        if tensor.old is None:
            _copy_in_strips(tensor.rows, tensor.units)
            return
        # All columns are gathered from the old ones, which is quick; then those that
        # were read replace theirs.
        source = np.zeros(len(tensor.units), int)
        source[self._copied] = self._from
        old, out = (units.transpose(1, 0, 2) for units in (tensor.old, tensor.units))
        np.take(old, source, axis=1, out=out, mode="clip")  # the mode raise would copy
        for start in range(0, len(tensor.rows), STRIP):
            strip = slice(start, start + STRIP)
            tensor.units[self._read[strip]] = tensor.rows[strip]


def _held(
    layout: Layout, donor: tuple[list[mx.array], np.ndarray] | None
) -> tuple[list[mx.array] | None, np.ndarray]:
    """Return the tensors of a donor and the units it can give: none if it cut one."""
    if donor is not None:
        tensors, channels = donor
        units = units_of(channels, layout.unit)
        if channels.size == units.size * layout.unit:
            return tensors, units
    return None, np.empty(0, int)


def _zeros(layout: Layout, layer: int, units: int) -> list[mx.array]:
    """Return a layer's tensors for this many units, all zero."""
    return [
        mx.zeros(
            part.sliced_shape(units, layout.units), getattr(mx, DTYPES[part.dtype][0])
        )
        for part in layout.parts[layer]
    ]


def bytes_of(arrays: list[mx.array]) -> list[np.ndarray]:
    """View contiguous arrays as uint8; what is written there is written into them."""
    # NumPy has no bfloat16.
    known = [a.view(mx.uint16) if a.dtype == mx.bfloat16 else a for a in arrays]
    mx.eval(arrays, known)  # at once: each call has a price
    return [np.array(a, copy=False).reshape(-1).view(np.uint8) for a in known]


def _rows(
    scratch: np.ndarray, count: int, like: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Cut an array ``[count, a, b]``, with units as those of ``like``, from memory;
    return the rest of it also.
    """
    unit_bytes = like[0].nbytes
    end = count * (unit_bytes + PAD)
    rows = scratch[:end].reshape(count, unit_bytes + PAD)[:, :unit_bytes]
    return rows.view(like.dtype).reshape(count, *like.shape[1:]), scratch[end:]


def _copy_in_strips(rows: np.ndarray, units: np.ndarray) -> None:
    """Copy ``rows`` into ``units``, of the same shape but laid out column by column."""
    for start in range(0, len(rows), STRIP):
        strip = slice(start, start + STRIP)
        units[strip] = rows[strip]
