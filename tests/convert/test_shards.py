"""Weights are written shard by shard."""

import json

import mlx.core as mx
import pytest

from ifp_mlx.convert.gguf import shards
from ifp_mlx.storage.folder import index_files


def tensors(count):
    for i in range(count):
        yield f"tensor{i}", mx.full((16, 16), i, mx.float32)  # 1 KiB


@pytest.mark.parametrize(
    ("limit", "names"),
    [
        (1 << 20, ["model.safetensors"]),
        (2048, [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]),
        (1, [f"model-0000{i}-of-00005.safetensors" for i in (1, 2, 3, 4, 5)]),
    ],
)
def test_shards_stay_below_the_limit(tmp_path, monkeypatch, limit, names):
    monkeypatch.setattr(shards, "SHARD_BYTES", limit)
    shards.write_shards(tmp_path, tensors(5), count=5)
    index = tmp_path / "model.safetensors.index.json"
    files = index_files(index)
    assert [file.name for file in files] == names
    assert sorted(tmp_path.iterdir()) == sorted([*files, index])
    found = {}
    for file in files:
        found |= mx.load(str(file))
    assert {name: value[0, 0].item() for name, value in found.items()} == {
        f"tensor{i}": i for i in range(5)
    }
    assert json.loads(index.read_text())["metadata"] == {"total_size": 5 * 1024}


def test_one_shard_is_in_memory_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 4096)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    shards.write_shards(tmp_path, tensors(64), count=64)
    # One shard, the tensor that did not fit, and the buffer it is written from.
    assert mx.get_peak_memory() - before < 3 * 4096
