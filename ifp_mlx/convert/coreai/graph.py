"""A stock mlx-lm decoder of the llama kind as a Core AI program. Experimental."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

FAMILIES = ("llama", "qwen2", "qwen3")
STATES = ("keyCache", "valueCache")


class Decoder:
    """A stock mlx-lm model of the llama kind as a Core AI graph.

    Inputs ``input_ids`` and ``position_ids``, int32 ``[1, T]``; states ``keyCache`` and
    ``valueCache``, float32 ``[L, 1, KV, context, H]``; output ``logits`` ``[1, T, V]``:
    the interface of Apple's own exports.

    Args:
        model: float32, or affinely quantised to 4 or 8 bits with float32 scales.
        context: positions in the cache.
    """

    def __init__(self, model: nn.Module, context: int) -> None:
        import coreai.authoring as ca
        from coreai._compiler.dialects import coreai as raw  # states are not public yet

        self.ca, self.raw, self.model = ca, raw, model
        self.context = context
        attention = model.layers[0].self_attn
        self.heads, self.kv_heads = attention.n_heads, attention.n_kv_heads
        self.size = attention.k_proj.weight.shape[0] // self.kv_heads
        # The model's own rope turns a unit vector into cosine and sine.
        unit = mx.repeat(mx.array([1.0, 0.0]), self.size // 2)
        turned = attention.rope(mx.broadcast_to(unit, (1, 1, context, self.size)))
        self.cos, self.sin = np.split(np.array(turned[0, 0]), 2, axis=-1)

    def program(self) -> Any:
        """Return the program, verified."""
        from coreai._compiler.ir import ShapedType
        from coreai.authoring.graph_builder import GraphOp
        from coreai.authoring.operation import Value

        ca, raw = self.ca, self.raw
        module = ca.Module.create()
        with module:
            free = ShapedType.get_dynamic_size()
            vocabulary = self.model.model.embed_tokens.weight.shape[0]
            layers = len(self.model.layers)
            cache = (layers, 1, self.kv_heads, self.context, self.size)
            ids = ca.TensorType((1, free), np.int32)._to_mlir()
            state = ca.HandleType(ca.TensorType(cache, np.float32))._to_mlir()
            logits = ca.TensorType((1, free, vocabulary), np.float32)._to_mlir()
            token = ca.TokenType()._to_mlir()
            graph = GraphOp(
                "main",
                input_types=[ids, ids, state, state],
                input_names=["input_ids", "position_ids", *STATES],
                # A graph is rejected unless it gives a token for every state.
                result_types=[logits, token, token],
                result_names=["logits", *STATES],
            )
            with graph.block:
                ids, positions, *handles = graph.arguments
                reads = [raw.read_handle(h, raw.create_token()) for h in handles]
                value = Value._from_mlir
                caches = [value(read) for read, _ in reads]
                result = self.forward(value(ids), value(positions), caches)
                written = [
                    raw.write_handle(handle, cache._to_mlir(), token)
                    for handle, cache, (_, token) in zip(
                        handles, caches, reads, strict=True
                    )
                ]
                raw.OutputOp([result._to_mlir(), *written])
        module.verify()
        return ca.AIProgram(module)

    def forward(self, ids: Any, positions: Any, caches: list[Any]) -> Any:
        """Return logits; ``caches`` are replaced by the updated ones."""
        ca, stock = self.ca, self.model.model
        where = ca.expand_dims(positions, ints(2))  # [1, T, 1]
        cos, sin = (ca.gather_nd(table, where) for table in (self.cos, self.sin))
        columns = np.arange(self.context, dtype=np.int32)[None, None]
        later = ca.cast(ca.broadcasting_greater(columns, where), np.float32)
        hidden = ca.broadcasting_mul(later, np.full((1, 1, 1), -1e9, np.float32))
        first = ca.reshape(
            ca.slice_(positions, ints(0, 0), ints(1, 1), ints(1, 1)), ints(1)
        )
        count = ca.slice_(ca.get_shape(positions), ints(1), ints(2), ints(1))
        span = first, ca.broadcasting_add(first, ca.cast(count, np.int32))
        x = ca.gather_nd(self.weight(stock.embed_tokens), ca.expand_dims(ids, ints(2)))
        for number, layer in enumerate(stock.layers):
            h = self.norm(x, layer.input_layernorm)
            h = self.attention(
                h, layer.self_attn, number, caches, span, cos, sin, hidden
            )
            x = ca.broadcasting_add(x, h)
            h = self.norm(x, layer.post_attention_layernorm)
            ffn = layer.mlp
            gate = ca.silu(self.linear(h, ffn.gate_proj))
            h = ca.broadcasting_mul(gate, self.linear(h, ffn.up_proj))
            x = ca.broadcasting_add(x, self.linear(h, ffn.down_proj))
        tied = "lm_head" not in self.model
        head = stock.embed_tokens if tied else self.model.lm_head
        return self.linear(self.norm(x, stock.norm), head)

    def attention(
        self,
        x: Any,
        module: nn.Module,
        layer: int,
        caches: list[Any],
        span: tuple[Any, Any],
        cos: Any,
        sin: Any,
        hidden: Any,
    ) -> Any:
        """Return the attention's output ``[1, T, D]``; ``caches`` get keys and values."""
        ca, KV, H = self.ca, self.kv_heads, self.size
        q, k, v = (
            self.split(self.linear(x, module[f"{name}_proj"]), heads)
            for name, heads in (("q", self.heads), ("k", KV), ("v", KV))
        )
        if "q_norm" in module:
            q, k = self.norm(q, module.q_norm), self.norm(k, module.k_norm)
        q, k = (self.turn(part, cos, sin) for part in (q, k))
        kept = []
        for number, new in enumerate((k, v)):
            begin = ca.concat(0, [ints(layer, 0, 0), span[0], ints(0)])
            end = ca.concat(0, [ints(layer + 1, 1, KV), span[1], ints(H)])
            new = ca.expand_dims(new, ints(0, 1))
            ones = ints(1, 1, 1, 1, 1)
            caches[number] = ca.slice_update(caches[number], begin, end, ones, new)
            begin, end = (
                ints(layer, 0, 0, 0, 0),
                ints(layer + 1, 1, KV, self.context, H),
            )
            one = ca.slice_(caches[number], begin, end, ones)
            kept.append(ca.reshape(one, ints(KV, 1, self.context, H)))
        q = ca.reshape(q, ints(KV, self.heads // KV, -1, H))
        scores = ca.broadcasting_batch_matmul(
            q, ca.transpose(kept[0], axes(0, 1, 3, 2))
        )
        scale = np.full((1, 1, 1, 1), module.scale, np.float32)
        scores = ca.broadcasting_mul(scores, scale)
        scores = ca.broadcasting_add(scores, ca.expand_dims(hidden, ints(0)))
        out = ca.broadcasting_batch_matmul(ca.softmax(scores, 3), kept[1])
        out = ca.transpose(ca.reshape(out, ints(self.heads, -1, H)), axes(1, 0, 2))
        return self.linear(ca.reshape(out, ints(1, -1, self.heads * H)), module.o_proj)

    def split(self, x: Any, heads: int) -> Any:
        """Return ``[1, T, heads * H]`` as ``[heads, T, H]``."""
        x = self.ca.reshape(x, ints(-1, heads, self.size))
        return self.ca.transpose(x, axes(1, 0, 2))

    def turn(self, x: Any, cos: Any, sin: Any) -> Any:
        """Return ``x``, ``[heads, T, H]``, rotated by its positions."""
        ca, half = self.ca, self.size // 2
        a, b = ca.split(x, axes(half, half), 2)
        mul = ca.broadcasting_mul
        first = ca.broadcasting_sub(mul(a, cos), mul(b, sin))
        return ca.concat(2, [first, ca.broadcasting_add(mul(b, cos), mul(a, sin))])

    def norm(self, x: Any, module: nn.Module) -> Any:
        """Return the RMS norm of ``x``, ``[*, T, D]``."""
        ca = self.ca
        mean = ca.reduce_mean(ca.broadcasting_mul(x, x), ints(2))
        epsilon = np.full((1, 1, 1), module.eps, np.float32)
        scale = ca.rsqrt(ca.broadcasting_add(mean, epsilon))
        weight = np.array(module.weight)[None, None]
        return ca.broadcasting_mul(ca.broadcasting_mul(x, scale), weight)

    def linear(self, x: Any, module: nn.Module) -> Any:
        """Return ``x @ weight.T + bias``."""
        ca = self.ca
        weight = ca.transpose(self.weight(module), axes(1, 0))
        x = ca.broadcasting_batch_matmul(x, ca.expand_dims(weight, ints(0)))
        if "bias" not in module:
            return x
        return ca.broadcasting_add(x, np.array(module.bias)[None, None])

    def weight(self, module: nn.Module) -> Any:
        """Return ``[N, K]``: unchanged, or as MLX's scale * (data - 0) + bias."""
        if not isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            return np.array(module.weight)
        import ml_dtypes

        scales, biases = module.scales, module.biases
        ones, zeros = mx.ones_like(scales), mx.zeros_like(scales)
        data = mx.dequantize(module.weight, ones, zeros, module.group_size, module.bits)
        packed: Any = np.array(data).astype(np.uint8)
        kind = np.uint8 if module.bits == 8 else ml_dtypes.uint4
        if module.bits == 4:
            packed = self.uint4(packed)
        return self.ca.blockwise_shift_scale(
            packed, np.array(scales), np.zeros(scales.shape, kind), np.array(biases)
        )

    def uint4(self, data: np.ndarray) -> Any:
        """Return a constant of 4-bit values, two in a byte, the first one low.

        ``coreai.authoring`` 1.0.0b3 itself writes one in a byte, and its runtime then
        reads every second value as 0, or past the end of the constant.
        """
        from coreai._compiler.ir import DenseResourceElementsAttr
        from coreai.authoring.operation import Value
        from ml_dtypes import uint4

        low, high = data.reshape(-1, 2).T
        kind = self.ca.TensorType(data.shape, uint4)._to_mlir()
        packed = np.ascontiguousarray(low | high << 4)
        attribute = DenseResourceElementsAttr.get_from_buffer(packed, "packed", kind)
        return Value._from_mlir(self.raw.ConstantOp(value=attribute).result)


def ints(*values: int) -> np.ndarray:
    """Return sizes or indices as Core AI takes them."""
    return np.array(values, np.int32)


def axes(*values: int) -> np.ndarray:
    """Return axes, or sizes of a split, as Core AI takes them."""
    return np.array(values, np.uint32)
