"""A stock mlx-lm decoder as a Core ML program: modules in, operations out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import coremltools as ct
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Program, Var, get_new_symbol, types

from .weights import array, constant

TARGET = ct.target.iOS18  # also macOS 15: the first with states and 4-bit blocks
FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text")  # mlx-lm runs mistral as llama
# Gemma's residual stream reaches 10^5, and float16 ends at 65504. Every reader of the
# stream is a norm, and so is every writer except the embedding; so it can be scaled
# down.
GEMMA_STREAM = 2.0**-5
MASKED = 3e4  # subtracted from a score; float16 still holds the sum


@dataclass(frozen=True)
class Interface:
    """The inputs that a host sends, and their largest sizes.

    Inputs are ``inputIds``, int32 ``[1, q]``, and ``causalMask``, float16
    ``[1, 1, q, end]`` (``[1, 1, 1, end]`` will do), which is added to the scores on
    top of causality; the output is ``logits``, float16 ``[1, q, V]``; the states
    ``keyCache`` and ``valueCache`` are float16 ``[L, 1, KV, context, D]``. The tokens
    take the positions ``end - q`` to ``end - 1``.

    Attributes:
        context_length: positions in the cache.
        query_length: the largest ``q``.
        consumer: ``hf`` for swift-transformers, whose mask is one position longer
            than the tokens so far, and all zero.
    """

    context_length: int
    query_length: int
    consumer: Literal["default", "hf"] = "default"

    @property
    def surplus(self) -> int:
        """Positions at the end of the mask that stand for no token."""
        return 1 if self.consumer == "hf" else 0

    def inputs(self) -> list[ct.TensorType]:
        """Return the flexible input types for :func:`coremltools.convert`."""
        tokens = ct.RangeDim(1, self.query_length, default=1)
        rows = ct.RangeDim(1, self.query_length, default=1)
        end = self.context_length + self.surplus
        columns = ct.RangeDim(1 + self.surplus, end, default=1 + self.surplus)
        return [
            ct.TensorType("inputIds", (1, tokens), np.int32),
            ct.TensorType("causalMask", (1, 1, rows, columns), np.float16),
        ]


def build_program(
    model: nn.Module, interface: Interface, *, lut: bool = False
) -> Program:
    """Write the model's forward pass, with its cache as state.

    Args:
        model: a stock mlx-lm model; widths may differ from layer to layer.
        interface: what the host sends.
        lut: store quantised weights as lookup tables.

    Raises:
        ValueError: if the architecture is not one of :data:`FAMILIES`, or has a
            part that has no counterpart here.
    """
    check_family(model)
    first = model.layers[0].self_attn
    heads, size = first.n_kv_heads, _head_size(first)
    cache = (len(model.layers), 1, heads, interface.context_length, size)
    keys, values = (mb.StateTensorSpec(cache, dtype=types.fp16) for _ in range(2))
    tokens = mb.TensorSpec((1, get_new_symbol()), dtype=types.int32)
    shape = (1, 1, get_new_symbol(), get_new_symbol())
    mask = mb.TensorSpec(shape, dtype=types.fp16)

    @mb.program(input_specs=[tokens, mask, keys, values], opset_version=TARGET)
    def program(inputIds: Var, causalMask: Var, keyCache: Var, valueCache: Var) -> Var:
        inputs = (inputIds, causalMask, keyCache, valueCache)
        return _Decoder(model, interface, lut, *inputs).logits()

    return program


def check_family(model: nn.Module) -> None:
    """Raise ``ValueError`` unless the model's class is one that can be exported."""
    package, _, family = type(model).__module__.rpartition(".")
    if package != "mlx_lm.models" or family not in FAMILIES:
        raise ValueError(
            f"{type(model).__module__}.{type(model).__name__} cannot be exported to "
            f"Core ML; what can: {', '.join(FAMILIES)}, and mistral."
        )


class _Cache(NamedTuple):
    """A state and its latest value."""

    state: Var
    value: Var


class _Decoder:
    """The program while it is written; every method adds operations to it."""

    def __init__(
        self,
        model: nn.Module,
        interface: Interface,
        lut: bool,
        tokens: Var,
        mask: Var,
        *states: Var,
    ) -> None:
        self.model, self.lut, self.tokens = model, lut, tokens
        self.gemma = type(model).__module__.endswith("gemma3_text")
        self.stream = GEMMA_STREAM if self.gemma else 1.0
        self.context = interface.context_length
        self.names = {id(module): name for name, module in model.named_modules()}

        length = mb.gather(x=mb.shape(x=tokens), indices=np.int32(1), axis=0)
        columns = mb.gather(x=mb.shape(x=mask), indices=np.int32(3), axis=0)
        self.end = mb.sub(x=columns, y=np.int32(interface.surplus))
        self.past = mb.sub(x=self.end, y=length)
        one = np.int32(1)
        self.positions = mb.range_1d(start=self.past, end=self.end, step=one)
        # A mask that is too long is cut at the end; only hf sends such masks.
        self.host_mask = mb.slice_by_index(
            x=mask,
            begin=[0, 0, 0, 0],
            end=mb.concat(values=[_ints([0, 0, 0]), _vector(self.end)], axis=0),
            end_mask=[True, True, True, False],
        )
        self.masks: dict[int | None, Var] = {}
        self.ropes: dict[bytes, tuple[Var, Var]] = {}
        # Core ML's passes merge two reads of a state, and the second would then be
        # stale: read once, then hand every update on to the next layer.
        self.keys, self.values = (_Cache(s, mb.read_state(input=s)) for s in states)

    def logits(self) -> Var:
        """Write everything; return the output."""
        backbone = self.model.model
        embedding = constant(backbone.embed_tokens, "embed_tokens", lut=self.lut)
        x = mb.gather(x=embedding, indices=self.tokens, axis=0)
        if self.gemma:
            root = float(mx.array(self.model.args.hidden_size**0.5, mx.bfloat16))
            x = mb.mul(x=x, y=np.float16(root * self.stream))
        for number, layer in enumerate(backbone.layers):
            x = self.layer(layer, number, x)
        x = self.norm(backbone.norm, x, stream=True)
        if "lm_head" in self.model:
            return self.linear(self.model.lm_head, x, name="logits")
        return mb.linear(x=x, weight=embedding, name="logits")

    def layer(self, layer: nn.Module, number: int, x: Var) -> Var:
        """Write a block, ``[1, q, hidden]`` to the same."""
        h = self.norm(layer.input_layernorm, x, stream=True)
        r = self.attention(layer.self_attn, number, h, self.mask(layer))
        if self.gemma:
            r = self.norm(layer.post_attention_layernorm, r, gain=self.stream)
        x = mb.add(x=x, y=r)
        if not self.gemma:
            h = self.norm(layer.post_attention_layernorm, x)
            return mb.add(x=x, y=self.ffn(layer.mlp, h))
        h = self.norm(layer.pre_feedforward_layernorm, x, stream=True)
        r = self.ffn(layer.mlp, h)
        r = self.norm(layer.post_feedforward_layernorm, r, gain=self.stream)
        return mb.add(x=x, y=r)

    def ffn(self, ffn: nn.Module, x: Var) -> Var:
        """Return the FFN's output; the families here use the same names of matrices."""
        gate = self.linear(ffn.gate_proj, x)
        gate = (
            mb.gelu(x=gate, mode="TANH_APPROXIMATION")
            if self.gemma
            else mb.silu(x=gate)
        )
        return self.linear(ffn.down_proj, mb.mul(x=gate, y=self.linear(ffn.up_proj, x)))

    def attention(self, attn: nn.Module, number: int, x: Var, mask: Var) -> Var:
        H, KV, D = attn.n_heads, attn.n_kv_heads, _head_size(attn)
        # The operation divides by sqrt(D) itself.
        factor = attn.scale * D**0.5
        q = self.heads(attn, "q", x, H, factor)
        k = self.heads(attn, "k", x, KV)
        v = self.split_heads(self.linear(attn.v_proj, x), KV, D)
        self.keys, k = self.append(self.keys, number, k)
        self.values, v = self.append(self.values, number, v)
        # Heads that share keys become more rows of queries: nothing is copied.
        q = mb.reshape(x=q, shape=[1, KV, -1, D])
        out = mb.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=mask)
        out = mb.reshape(x=out, shape=[1, H, -1, D])
        out = mb.transpose(x=out, perm=[0, 2, 1, 3])
        return self.linear(attn.o_proj, mb.reshape(x=out, shape=[1, -1, H * D]))

    def heads(
        self, attn: nn.Module, which: str, x: Var, count: int, factor: float = 1.0
    ) -> Var:
        """Write queries or keys, normed and rotated, ``[1, count, q, D]``."""
        D = _head_size(attn)
        x = self.split_heads(self.linear(attn[f"{which}_proj"], x), count, D)
        if f"{which}_norm" in attn:
            x = self.norm(attn[f"{which}_norm"], x, gain=factor)
        elif abs(factor - 1) > 1e-6:
            x = mb.mul(x=x, y=np.float16(factor))
        cos, sin = self.rope(attn.rope, D)
        a, b = mb.split(x=x, num_splits=2, axis=-1)
        first = mb.sub(x=mb.mul(x=a, y=cos), y=mb.mul(x=b, y=sin))
        second = mb.add(x=mb.mul(x=b, y=cos), y=mb.mul(x=a, y=sin))
        return mb.concat(values=[first, second], axis=-1)

    def split_heads(self, x: Var, count: int, size: int) -> Var:
        x = mb.reshape(x=x, shape=[1, -1, count, size])
        return mb.transpose(x=x, perm=[0, 2, 1, 3])

    def append(self, cache: _Cache, number: int, new: Var) -> tuple[_Cache, Var]:
        """Write ``new``, ``[1, KV, q, D]``, after a layer's cache; return all of the
        cache.
        """
        begin = [_ints([number, 0, 0]), _vector(self.past), _ints([0])]
        end = [_ints([number + 1, 0, 0]), _vector(self.end), _ints([0])]
        to = mb.concat(values=end, axis=0)
        whole = [False, True, True, False, True]
        value = mb.slice_update(
            x=cache.value,
            update=mb.expand_dims(x=new, axes=[0]),
            begin=mb.concat(values=begin, axis=0),
            end=to,
            end_mask=whole,
        )
        value = mb.coreml_update_state(state=cache.state, value=value)
        row = mb.slice_by_index(
            x=value,
            begin=[number, 0, 0, 0, 0],
            end=to,
            end_mask=whole,
            squeeze_mask=[True, False, False, False, False],
        )
        return _Cache(cache.state, value), row

    def mask(self, layer: nn.Module) -> Var:
        """Return what is added to a layer's scores, ``[1, 1, G * q, end]``.

        Causality, and the layer's window if it has one, are added here, since some
        hosts send a mask of zeros.
        """
        window = _window(self.model, layer)
        if window in self.masks:
            return self.masks[window]
        zero, one = np.int32(0), np.int32(1)
        keys = mb.range_1d(start=zero, end=self.end, step=one)
        rows = mb.expand_dims(x=self.positions, axes=[1])
        seen = mb.less_equal(x=keys, y=rows)
        if window is not None:
            oldest = mb.sub(x=rows, y=np.int32(window))
            seen = mb.logical_and(x=seen, y=mb.greater(x=keys, y=oldest))
        # Not mb.select, which infers a scalar from scalar choices.
        seen = mb.cast(x=seen, dtype="fp16")
        hidden = mb.mul(x=mb.sub(x=seen, y=np.float16(1)), y=np.float16(MASKED))
        mask = mb.add(x=self.host_mask, y=mb.expand_dims(x=hidden, axes=[0, 1]))
        attn = layer.self_attn
        mask = mb.tile(x=mask, reps=[1, 1, attn.n_heads // attn.n_kv_heads, 1])
        return self.masks.setdefault(window, mask)

    def rope(self, rope: nn.Module, size: int) -> tuple[Var, Var]:
        """Return cosines and sines at this call's positions, ``[q, D / 2]``."""
        tables = rope_tables(rope, size, self.context)
        key = b"".join(table.tobytes() for table in tables)
        if key not in self.ropes:
            cos, sin = (
                mb.gather(x=table, indices=self.positions, axis=0) for table in tables
            )
            self.ropes[key] = cos, sin
        return self.ropes[key]

    def norm(
        self, norm: nn.Module, x: Var, *, gain: float = 1.0, stream: bool = False
    ) -> Var:
        """Write an RMS norm that no finite input makes overflow, even summed in float16.

        With m = max |x|, or sqrt(d eps) if that is more, and y = x / m:
        x / sqrt(mean(x^2) + eps) = y sqrt(d) / sqrt(sum(y^2) + d eps / m^2).

        Args:
            norm: nn.RMSNorm, or Gemma's, which stores its weight minus one.
            x: normed along the last axis.
            gain: multiplies the result.
            stream: ``x`` is the residual stream, which may be scaled.
        """
        weight = norm.weight.astype(mx.float32) + (not isinstance(norm, nn.RMSNorm))
        root = norm.weight.size**0.5
        floor = np.float16(root * norm.eps**0.5 * (self.stream if stream else 1))
        m = mb.reduce_max(x=mb.abs(x=x), axes=[-1], keep_dims=True)
        m = mb.maximum(x=m, y=floor)
        y = mb.real_div(x=x, y=m)
        extra = mb.real_div(x=floor, y=m)
        total = mb.reduce_sum_square(x=y, axes=[-1], keep_dims=True)
        total = mb.add(x=total, y=mb.mul(x=extra, y=extra))
        y = mb.mul(x=y, y=mb.rsqrt(x=total))
        return mb.mul(x=y, y=array(weight * (root * gain), self.names[id(norm)]))

    def linear(self, module: nn.Module, x: Var, name: str | None = None) -> Var:
        where = self.names[id(module)]
        options: dict[str, Any] = {"name": name} if name else {}
        weight = constant(module, where.replace(".", "_"), lut=self.lut)
        if "bias" in module:
            options["bias"] = array(module.bias, where)
        return mb.linear(x=x, weight=weight, **options)


def rope_tables(
    rope: Callable[[mx.array], mx.array], size: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rotations of a model's own rope, whatever its scaling.

    Args:
        rope: rotates ``[1, 1, T, D]`` by the positions 0 to T - 1.
        size: ``D``.
        length: positions wanted.

    Returns:
        Cosines and sines, float16 ``[length, D / 2]``.

    Raises:
        ValueError: if it does not rotate the first half of a head with the second.
    """
    half = size // 2
    unit = mx.broadcast_to(mx.arange(size) < half, (1, 1, length, size))
    unit = unit.astype(mx.float32)
    turned, other = (np.array(rope(x)[0, 0]) for x in (unit, 1 - unit))
    cos, sin = turned[:, :half], turned[:, half:]
    again = np.concatenate([-sin, cos], axis=1)
    if not np.allclose(other, again, atol=1e-4) or not np.any(sin[-1]):
        raise ValueError(
            f"{type(rope).__name__} of this model turns its heads in another way than "
            "by halves; it cannot be exported to Core ML."
        )
    return cos.astype(np.float16), sin.astype(np.float16)


def _window(model: nn.Module, layer: nn.Module) -> int | None:
    """Return how many positions a layer sees, ``None`` for all."""
    if getattr(layer, "use_sliding", False):  # llama
        return int(model.model.sliding_window)
    if getattr(layer.self_attn, "is_sliding", False):  # gemma
        return int(model.model.window_size)
    return None


def _head_size(attn: nn.Module) -> int:
    return int(attn.q_proj.weight.shape[0]) // int(attn.n_heads)


def _ints(values: list[int]) -> np.ndarray:
    return np.array(values, np.int32)


def _vector(scalar: Var) -> Any:
    return mb.expand_dims(x=scalar, axes=[0])
