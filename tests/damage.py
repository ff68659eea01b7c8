"""Ways in which a model folder is changed or damaged, for tests of what is said then."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    file.write_text(json.dumps(config))


def change_weights(folder: Path, change: Callable[[Any], Any]) -> None:
    file = folder / "model.safetensors"
    weights = change(mx.load(str(file)))
    mx.eval(weights)
    mx.save_safetensors(str(file), weights)


def store_as(folder: Path, dtype: str, *names: str) -> None:
    """Store some weights as 8-bit numbers, of a type in the words of safetensors."""
    change_weights(
        folder, lambda w: w | {n: (w[n] * 100).astype(mx.uint8) for n in names}
    )
    file = folder / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    for name in names:
        header[name]["dtype"] = dtype
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def write_index(folder: Path, *files: str) -> None:
    weight_map = {f"tensor{i}": file for i, file in enumerate(files)}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def truncated(data: bytes) -> bytes:
    return data[:-1]


def overlapping(data: bytes) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    name = max(header, key=lambda n: header[n]["data_offsets"][0])
    size = header[name]["data_offsets"][1] - header[name]["data_offsets"][0]
    header[name]["data_offsets"] = [0, size]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]
