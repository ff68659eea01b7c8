"""Makes a channel store from a model folder, and from it the folder, bit for bit."""

import math
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx
import numpy as np
from zlib_ng.zlib_ng import crc32

from ..files.atomic import new_folder, refuse_existing
from ..files.companions import LICENCES
from ..files.tensors import (
    Tensor,
    copy_bytes,
    digest_of,
    header_of,
    tensors_of,
    weights_of,
    write_without,
)
from ..slicing.shapes import LayerPlan, at
from ..slicing.sliced import group_size, tensors_along
from .folder import DOCUMENTS, ChannelStore, Folder, source_of
from .layout import CHANNEL_FILE, DTYPES, Layout, Part
from .order import order_units
from .reader import ChannelReader

Progress = Callable[[Iterable], Iterable]

PIECE_BYTES = 64 << 20  # of records, made at a time

# Files that a store takes over, beside the weights.
CARRIED = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]


CARRIED += [*LICENCES, *DOCUMENTS, "prior.safetensors", "sensitivity.safetensors"]


CARRIED += ["mask.safetensors"]


CARRIED_FOLDERS = ["predictor", "tasks"]


def write_store(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    granularity: int = 1,
    uses: np.ndarray | None = None,
    progress: Progress = iter,
) -> Path:
    """Write a model folder's content with its FFN channel by channel.

    A few records are in memory at a time; the folder's files are mapped.

    Args:
        folder: an ordinary model folder.
        out: the folder to make, which is returned.
        granularity: channels that lie together and are selected together.
        uses: ``[n, L, F]``, which channels tasks use, for :func:`order_units`;
            default: the order stays.
        progress: wraps the iteration over layers.

    Raises:
        FileExistsError: if ``out`` is there.
        ValueError: if the folder is a store, damaged, or cannot be stored like this.
    """
    refuse_existing(Path(out))
    with new_folder(out) as scratch:
        fill_store(
            Path(folder),
            scratch,
            granularity=granularity,
            uses=uses,
            progress=progress,
        )
    return Path(out)


def fill_store(
    folder: Path,
    target: Path,
    *,
    granularity: int = 1,
    uses: np.ndarray | None = None,
    progress: Progress = iter,
) -> None:
    """Write a channel store into an existing folder; see :func:`write_store`."""
    source = source_of(folder)
    if isinstance(source, ChannelStore):
        raise ValueError(f"{folder} is a channel store already; give a plain folder.")
    layout, tensors = _plan(source, granularity, uses)
    _copy_companions(folder, target)
    stored = [part.name for layer in layout.parts for part in layer]
    for name in layout.files:
        write_without(folder / name, target / name, stored)
    layout = replace(layout, core=digest_of(weights_of(target)))
    with (target / CHANNEL_FILE).open("wb") as file:
        _write_records(file, layout, tensors, progress)
        os.fsync(file.fileno())


def write_folder(
    store: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    progress: Progress = iter,
) -> Path:
    """Write the ordinary model folder that a channel store was made from.

    Its safetensors files are those of the original, byte for byte. About one layer's
    FFN is in memory at a time.

    Args:
        store: a channel store.
        out: the folder to make, which is returned.
        progress: wraps the iteration over tensors.

    Raises:
        FileExistsError: if ``out`` is there.
        ValueError: if ``store`` is no channel store, or damaged.
    """
    store, out = Path(store), Path(out)
    refuse_existing(out)
    source = source_of(store)
    if not isinstance(source, ChannelStore):
        raise ValueError(
            f"{store} has no {CHANNEL_FILE}: it is a plain folder already."
        )
    with new_folder(out) as scratch:
        _copy_companions(store, scratch)
        restored = _Restored(source.reader)
        core = weights_of(store)
        for name, header in source.reader.layout.files.items():
            with (scratch / name).open("wb") as file:
                text = header.encode()
                file.write(len(text).to_bytes(8, "little") + text)
                tensors = tensors_of(scratch / name, header)
                for tensor in progress(tensors):
                    if tensor in core:
                        copy_bytes(core[tensor], file)
                    else:
                        file.write(restored.tensor(tensor))
    return out


def _copy_companions(source: Path, target: Path) -> None:
    for pattern in CARRIED:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
    for name in CARRIED_FOLDERS:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)


def _plan(
    source: Folder, granularity: int, uses: np.ndarray | None
) -> tuple[Layout, dict[str, Tensor]]:
    """Return the store's layout, still without checksums, and the folder's tensors."""
    model, plan = source.skeleton, source.plan
    files = sorted(source.path.glob("model*.safetensors"))
    tensors = {name: t for file in files for name, t in tensors_of(file).items()}
    channels, group = plan.units, group_size(model, plan)
    unit = math.lcm(granularity, group)
    if granularity < 1 or channels % unit:
        raise ValueError(
            f"granularity={granularity} does not divide the {channels} {plan.unit}s in "
            f"groups of {group}; choose another."
        )
    parts = tuple(_parts(source, layer, tensors) for layer in plan.layers)
    order = np.tile(np.arange(channels // unit), (len(plan.layers), 1))
    if uses is not None:
        order = order_units(uses, unit)
    layout = Layout(
        channels=channels,
        unit=unit,
        parts=parts,
        files={file.name: header_of(file) for file in files},
        core="",
        order=order.astype(np.uint32),
        checksums=np.zeros(order.shape, np.uint32),
    )
    return layout, tensors


def _parts(
    source: Folder, layer: LayerPlan, tensors: dict[str, Tensor]
) -> tuple[Part, ...]:
    """Return what the records of a layer are made of."""
    parts = []
    for piece in layer.slices:
        home = at(at(source.skeleton, layer.path), piece.module)
        path = ".".join(filter(None, (layer.path, piece.module)))
        for tensor in tensors_along(home, piece):
            name, used = f"{path}.{tensor}", home[tensor]
            found = tensors.get(name)
            if found is None or (DTYPES.get(found.dtype, ("",))[0], found.shape) != (
                str(used.dtype).removeprefix("mlx.core."),
                used.shape,
            ):
                raise ValueError(
                    f"{source.path} does not hold {name} as mlx-lm uses it; convert it "
                    "and make the store with ifp_mlx convert --hf-path "
                    f"{source.path} --mlx-path OUT --channel-store."
                )
            repeat = 1 if piece.interleaved else piece.repeat
            parts.append(Part(name, found.dtype, found.shape, piece.axis, repeat))
    return tuple(parts)


def _write_records(
    file: BinaryIO, layout: Layout, tensors: dict[str, Tensor], progress: Progress
) -> None:
    """Write the channel file; its header comes last, when the checksums are known."""
    file.seek(layout.data_offset)
    for layer in progress(range(layout.layers)):
        sum_, units = 0, layout.units
        fields = [
            (part.split(tensors[part.name].mapped(), units, units), offset)
            for part, offset in layout.fields(layer)
        ]
        step = max(1, PIECE_BYTES // layout.record_bytes[layer])
        for place in range(0, units, step):
            chosen = layout.order[layer, place : place + step]
            records = np.empty((len(chosen), layout.record_bytes[layer]), np.uint8)
            for dense, offset in fields:
                into = records[:, offset : offset + dense[0].nbytes].view(dense.dtype)
                into[...] = dense[chosen].reshape(len(chosen), -1)
            for n, record in enumerate(records, place):
                layout.checksums[layer, n] = sum_ = crc32(record, sum_)
            file.write(records.data)
    file.seek(0)
    file.write(layout.pack())


class _Restored:
    """The tensors of a channel file; those of one layer are in memory at a time."""

    def __init__(self, reader: ChannelReader) -> None:
        self._reader, self._layer = reader, -1
        self._held: dict[str, mx.array] = {}
        layers = enumerate(reader.layout.parts)
        self._parts = {p.name: n for n, layer in layers for p in layer}

    def tensor(self, name: str) -> memoryview:
        """Return a dense tensor's bytes."""
        layer = self._parts[name]
        if layer != self._layer:
            self._held = {}
            self._held = self._reader.read(layer)
            self._layer = layer
        array = self._held[name]
        return np.array(array.view(mx.uint8), copy=False).data
