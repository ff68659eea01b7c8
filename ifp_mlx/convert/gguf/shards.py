"""Write a model's tensors shard by shard, holding no more than one in memory."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mlx.core as mx

SHARD_BYTES = 1 << 30


def write_shards(
    folder: Path, tensors: Iterable[tuple[str, "mx.array"]], *, count: int
) -> None:
    """Write ``model*.safetensors`` and their index.

    Args:
        folder: where to.
        tensors: names and arrays, evaluated one at a time as they come. The iterable
            should not keep arrays that it has yielded.
        count: how many there are, for the progress bar.
    """
    import mlx.core as mx
    from tqdm import tqdm

    shards: list[list[str]] = []
    shard: dict[str, mx.array] = {}
    total = size = 0

    def flush() -> None:
        file = folder / f"shard-{len(shards)}.safetensors"
        mx.save_safetensors(str(file), shard, metadata={"format": "mlx"})
        shards.append(list(shard))
        shard.clear()
        mx.clear_cache()

    for name, tensor in tqdm(tensors, total=count, unit=" tensors", disable=None):
        if shard and size + tensor.nbytes > SHARD_BYTES:
            flush()  # before the next tensor takes memory
            size = 0
        mx.eval(tensor)
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()

    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        # The usual names contain the count, which is known only now.
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        file = "model.safetensors" if len(shards) == 1 else file
        (folder / f"shard-{i}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {
        "metadata": {"total_size": total},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
