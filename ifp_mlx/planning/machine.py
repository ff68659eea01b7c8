"""Measure this machine in a few seconds, once, as a device profile."""

import json
import os
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..files.atomic import new_file
from ..files.caches import cache_place
from .devices import Device, Figure, Runtime, profile

TURNS = 5
MEMORY_BYTES, STORAGE_BYTES = 128 << 20, 256 << 20
SIDE = 1024  # of the matrices that are multiplied
LAYERS = 16  # of a model so small that starting its kernels is all that takes time


def here(folder: Path | None = None, *, again: bool = False) -> Device:
    """Return this machine's profile, measured now or taken from the cache.

    Args:
        folder: whose safetensors files tell how fast storage is read; without one
            storage is not measured.
        again: measure even if there is a cached result.

    Raises:
        ValueError: if the cached file is damaged.
    """
    path = cache_file(folder)
    if again or not path.exists():
        found = measure(folder)
        with (
            suppress(OSError),
            new_file(path) as scratch,
        ):  # if that fails, it is measured again next time
            scratch.write_text(json.dumps(asdict(found), indent=2) + "\n")
        return found
    try:
        return profile(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is no device profile ({error}); delete it, and it is measured again."
        ) from error


def cache_file(folder: Path | None) -> Path:
    """Return where this machine's profile is kept, for the disk that ``folder`` is on
    and the MLX that is installed.
    """
    disk = "memory" if folder is None else f"disk-{folder.stat().st_dev}"
    kind = str(mx.default_device()).split(",")[0].removeprefix("Device(")
    name = f"{os.uname().nodename}-{kind}-{version('mlx')}-{disk}.json"
    return cache_place("devices") / name


def measure(folder: Path | None = None) -> Device:
    """Measure this machine; see :func:`here`. Best of several turns, since whatever
    else runs makes it slower and never faster.
    """
    on_gpu = mx.default_device() == mx.Device(mx.DeviceType.gpu)
    dtype = mx.float16 if on_gpu else mx.float32  # half precision is slow on a CPU
    source = f"here, best of {TURNS} turns, {str(dtype).removeprefix('mlx.core.')}"
    speed = None if folder is None else _storage_speed(folder)
    file = "here, its largest file in sequence, not from the cache"
    return Device(
        name="here",
        about=f"this machine, {os.uname().sysname} {os.uname().machine}, "
        f"{mx.default_device()}, MLX {version('mlx')}",
        memory=Figure(_memory_speed(dtype), "measured", source),
        storage=None if speed is None else Figure(speed, "measured", file),
        compute=Figure(_compute_speed(dtype), "measured", source),
        runtime=Runtime(
            prefill=1.0,
            decode=1.0,
            load=1.0,
            layer_seconds=_layer_seconds(dtype),
            source="speeds that MLX reaches here are measured, not peaks",
        ),
    )


def _best(action: Callable[[], Any]) -> float:
    """Return the seconds of the quickest turn, after one that is not counted."""
    seconds = []
    for _ in range(TURNS + 1):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _memory_speed(dtype: mx.Dtype) -> float:
    """Return bytes per second of a matrix times a vector: what decoding does."""
    rows = MEMORY_BYTES // (SIDE * dtype.size)
    matrix, vector = mx.ones((rows, SIDE), dtype), mx.ones((SIDE,), dtype)
    mx.eval(matrix, vector)
    return MEMORY_BYTES / _best(lambda: mx.eval(matrix @ vector))


def _compute_speed(dtype: mx.Dtype) -> float:
    """Return operations per second of a matrix product: what prefill does."""
    left, right = mx.ones((SIDE, SIDE), dtype), mx.ones((SIDE, SIDE), dtype)
    mx.eval(left, right)
    return 2 * SIDE**3 / _best(lambda: mx.eval(left @ right.T))


def _layer_seconds(dtype: mx.Dtype) -> float:
    """Return the seconds of one token in one layer of a model with tiny weights."""
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.models.llama import Model, ModelArgs

    arguments = ModelArgs(
        model_type="llama",
        hidden_size=64,
        num_hidden_layers=LAYERS,
        intermediate_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        rms_norm_eps=1e-6,
        vocab_size=64,
        tie_word_embeddings=True,
    )
    model: nn.Module = Model(arguments)
    model.set_dtype(dtype)
    cache = make_prompt_cache(model)
    token = mx.zeros((1, 1), mx.int32)
    mx.eval(model.parameters())
    return _best(lambda: mx.eval(model(token, cache=cache))) / LAYERS


def _storage_speed(folder: Path) -> float | None:
    """Return bytes per second of reading a folder's weights in sequence, around the
    system's cache; ``None`` if there are none or the cache cannot be avoided.
    """
    files = sorted(folder.glob("*.safetensors"), key=lambda file: -file.stat().st_size)
    if not files or not hasattr(os, "posix_fadvise"):
        return _uncached_speed(files[0]) if files else None
    speeds = []
    for _ in range(2):  # reading itself may fill the cache
        with files[0].open("rb", buffering=0) as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            speeds.append(_read_speed(stream))
    return statistics.median(speeds)


def _uncached_speed(file: Path) -> float | None:
    """The same on macOS, which can read around its cache."""
    import fcntl

    if not hasattr(fcntl, "F_NOCACHE"):
        return None
    with file.open("rb", buffering=0) as stream:
        fcntl.fcntl(stream.fileno(), fcntl.F_NOCACHE, 1)
        return _read_speed(stream)


def _read_speed(stream: Any) -> float:
    buffer = bytearray(8 << 20)
    read, start = 0, time.perf_counter()
    while read < STORAGE_BYTES and (count := stream.readinto(buffer)):
        read += count
    return read / (time.perf_counter() - start)
