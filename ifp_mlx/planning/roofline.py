"""How long a device takes: a model of bytes, operations and kernels started.

A forward pass takes the longer of two times, that of its arithmetic and that of reading
its bytes, plus a little for every layer, however small. Arithmetic limits prefill,
bytes limit decoding at batch 1. No constant belongs to a single model or row.
"""

import math
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..model.footprint import Footprint, Sizes
from ..slicing.routing import slots_of
from ..slicing.shapes import Plan, Shapes, dense_shapes
from .devices import Device


@dataclass(frozen=True)
class Work:
    """The multiplications of a model, counted from its shapes.

    Attributes:
        core: per token, in all layers, without units and attention itself.
        channel: per token, for one unit, a channel or an expert, in one layer.
        head: per token, for the output layer.
        attention: per pair of a token and a token it attends to, for each layer.
        lookup_bytes: of embeddings, of which a token reads only one row.
        slots: ``K``, the experts that a token is sent to in a layer; ``None`` where it
            goes through every unit.
    """

    core: int
    channel: float
    head: int
    attention: tuple[int, ...]
    lookup_bytes: int
    slots: int | None = None

    @staticmethod
    def of(dense: nn.Module, plan: Plan) -> "Work":
        """Count the multiplications of a stock mlx-lm model with all its units; no
        weight is read.
        """
        linears = {
            name: _weights(module)
            for name, module in dense.named_modules()
            if isinstance(module, nn.Linear | nn.QuantizedLinear)
        }
        tables = {
            name: module
            for name, module in dense.named_modules()
            if isinstance(module, nn.Embedding | nn.QuantizedEmbedding)
        }
        head = sum(n for name, n in linears.items() if name.endswith("lm_head"))
        if not head and tables:  # the embedding is the output layer too
            head = _weights(tables.pop(next(iter(tables))))
        weights = _unit_weights(dense_shapes(dense), plan)
        core = sum(
            count
            for name, count in linears.items()
            if f"{name}.weight" not in weights and not name.endswith("lm_head")
        )
        return Work(
            core=core,
            channel=sum(weights.values()) / plan.units / len(plan.layers),
            head=head,
            attention=tuple(_attention_width(layer) for layer in dense.layers),
            lookup_bytes=sum(
                array.nbytes
                for table in tables.values()
                for array in table.parameters().values()
            ),
            slots=slots_of(dense, plan) if plan.unit == "expert" else None,
        )

    def per_token(self, sizes: Sizes) -> int:
        """Return the multiplications with weights that a prompt's token takes."""
        return round(self.core + self.channel * sum(self.used(sizes, 1)))

    def used(self, sizes: Sizes, tokens: int) -> list[float]:
        """Return how many units of each layer some tokens go through together; for
        experts, the expected number if all were equally likely to be chosen.
        """
        if self.slots is None:
            return [float(size) for size in sizes]
        missed = (max(0.0, 1 - self.slots / size) ** tokens for size in sizes)
        return [size * (1 - m) for size, m in zip(sizes, missed, strict=True)]


@dataclass(frozen=True)
class Times:
    """Seconds of each phase; see :func:`predict`.

    Attributes:
        select: from the instruction to the selection.
        load: of the weights, from storage; ``None`` where the device has no figure for
            it.
        load_warm: of the weights, where memory holds them already, as in the system's
            cache.
        prefill: of the prompt.
        decode: of all the tokens asked for.
    """

    select: float
    load: float | None
    load_warm: float
    prefill: float
    decode: float

    def ttft(self, *, warm: bool = False) -> float:
        """Return the seconds to the first token."""
        load = self.load_warm if warm or self.load is None else self.load
        return self.select + load + self.prefill


@dataclass(frozen=True)
class Job:
    """What is to be done.

    Attributes:
        prompt_tokens: tokens of the prompt, which the compact model reads.
        max_tokens: tokens to be decoded.
        instruction_tokens: tokens of the instruction, which selects.
        samples: answers decoded together.
    """

    prompt_tokens: int
    max_tokens: int
    instruction_tokens: int = 0
    samples: int = 1


def forward_seconds(
    device: Device,
    work: Work,
    footprint: Footprint,
    sizes: Sizes,
    tokens: int,
) -> float:
    """Return the seconds of one forward pass over a prompt."""
    multiplications = tokens * work.per_token(sizes) + work.head
    caches = footprint.caches
    for layer, width in enumerate(work.attention):
        window = caches[layer].window if layer < len(caches) else None
        multiplications += width * _looks(tokens, window)
    compute = 2 * multiplications / (device.compute.value * device.runtime.prefill)
    read = _weights_read(work, footprint, sizes, tokens) / _decode_bandwidth(device)
    return max(compute, read) + device.runtime.layer_seconds * len(work.attention)


def decode_seconds(
    device: Device, work: Work, footprint: Footprint, sizes: Sizes, job: Job
) -> float:
    """Return the seconds of decoding: every token reads its cache and all weights,
    except experts that it is not sent to.
    """
    middle = job.prompt_tokens + job.max_tokens // 2
    read = _weights_read(work, footprint, sizes, job.samples)
    read += job.samples * footprint.kv_bytes(middle)
    each = read / _decode_bandwidth(device)
    return job.max_tokens * (each + device.runtime.layer_seconds * len(work.attention))


def load_seconds(device: Device, count: float, *, warm: bool) -> float | None:
    """Return the seconds until ``count`` bytes are where the model has them.

    Args:
        device: to load on.
        count: bytes.
        warm: whether they are in memory already, and only copied; else they are read
            from storage.
    """
    if warm:
        return 2 * count / (device.memory.value * device.runtime.load)
    return None if device.storage is None else count / device.storage.value


def predict(
    device: Device,
    work: Work,
    footprint: Footprint,
    sizes: Sizes,
    job: Job,
    *,
    select: float = 0.0,
    loaded: float | None = None,
) -> Times:
    """Predict the phases of one request.

    Args:
        device: the one that the request runs on.
        work: of the large model.
        footprint: of the large model.
        sizes: units kept in every layer.
        job: what is to be done.
        select: seconds of the selection.
        loaded: bytes that are read; default: those of the compact model.
    """
    count = footprint.compact_bytes(sizes) if loaded is None else loaded
    warm = load_seconds(device, count, warm=True)
    assert warm is not None
    return Times(
        select=select,
        load=load_seconds(device, count, warm=False),
        load_warm=warm,
        prefill=forward_seconds(device, work, footprint, sizes, job.prompt_tokens),
        decode=decode_seconds(device, work, footprint, sizes, job),
    )


def dense_select_seconds(
    device: Device, work: Work, footprint: Footprint, tokens: int
) -> float:
    """Return the seconds of a selection by the dense model's own activations: it is
    loaded whole, and reads the instruction.
    """
    sizes = [footprint.channels] * footprint.layers
    load = load_seconds(device, footprint.dense_bytes, warm=False) or 0.0
    return load + forward_seconds(device, work, footprint, sizes, tokens)


def predictor_seconds(
    device: Device, weights: int, count: int, layers: int, tokens: int
) -> float:
    """Return the seconds that a predictor takes to read an instruction.

    Args:
        device: the one that it runs on.
        weights: of its language model; every token is multiplied with all of them.
        count: its bytes, the head's included.
        layers: of its language model.
        tokens: of the instruction.
    """
    compute = 2 * weights * tokens / (device.compute.value * device.runtime.prefill)
    read = count / _decode_bandwidth(device)
    return max(compute, read) + device.runtime.layer_seconds * layers


def _decode_bandwidth(device: Device) -> float:
    return device.memory.value * device.runtime.decode


def _weights_read(work: Work, footprint: Footprint, sizes: Sizes, tokens: int) -> float:
    """Return the bytes of the weights that some tokens go through together."""
    used = zip(work.used(sizes, tokens), footprint.layer_bytes, strict=True)
    units = sum(count * size for count, size in used)
    return footprint.core_bytes + units - work.lookup_bytes


def _unit_weights(shapes: Shapes, plan: Plan) -> dict[str, int]:
    """Return the sizes of the weights that units consist of. A router does not count:
    every token goes through all of it.
    """
    matrices = 3 if plan.unit == "expert" else 2  # dimensions
    names = {
        ".".join(step for step in (layer.path, s.module, s.tensor) if step)
        for layer in plan.layers
        for s in layer.slices
    }
    return {
        name: math.prod(shapes[name])
        for name in names
        if name.endswith("weight") and len(shapes[name]) == matrices
    }


def _looks(tokens: int, window: int | None) -> int:
    """Return the number of pairs of a token and a token that it attends to."""
    short = min(tokens, window or tokens)
    return short * (short + 1) // 2 + (tokens - short) * short


def _weights(module: nn.Module) -> int:
    """Return the weights of a linear layer or a table, quantised or not."""
    weight: mx.array = module.weight
    return weight.size * 32 // module.bits if "scales" in module else weight.size


def _attention_width(layer: nn.Module) -> int:
    """Return the multiplications for a token and one token that it attends to: a
    product with its key and one with its value, in every head.
    """
    for _, module in layer.named_modules():
        if "q_proj" in module:
            return 2 * module.q_proj.weight.shape[0]
    return 0
