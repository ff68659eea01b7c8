"""How many bytes a model needs, and the most units that fit: nothing is loaded.

MLX's arrays have a shape and a type before they have a value, so a model that was
opened, or one that mlx-lm builds from a config.json alone, can be weighed for free.
"""

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from ..decoding.kv import KVOptions
from ..files.amounts import in_words
from ..files.quantised import leaves_out, noted, packing, quantised_by
from ..selection.masks import Selection
from ..slicing.plan import plan_of
from ..slicing.routing import slots_of
from ..slicing.shapes import Plan, Unit, dense_shapes
from ..slicing.sliced import group_size, sliced_names
from ..slicing.stock import build
from .experts import fewest, groups_of

Sizes = Sequence[int]

# Arrays [T, F] in memory at once while an FFN reads in float32; for a mixture, arrays
# of each chosen expert.
CHANNEL_FLOATS, EXPERT_FLOATS = 5, 2


class Opened(Protocol):
    """What is asked of an :class:`ifp_mlx.model.checkpoint.IFPModel`."""

    path: Path
    config: dict[str, Any]
    ifp: Any
    granularity: int
    source: Any
    plan: Plan


@dataclass(frozen=True)
class LayerCache:
    """What one layer keeps of each token.

    Attributes:
        token_bytes: of a token's key and value.
        window: tokens that are kept at most; ``None`` is all.
        state_bytes: of what is kept however many tokens there are (state spaces).
        item_bytes: of one number in the cache.
        packed_bytes: of a token's key and value once the cache is quantised.
        packed_from: it is quantised from this many tokens on; ``None`` is never.
    """

    token_bytes: int
    window: int | None = None
    state_bytes: int = 0
    item_bytes: int = 2
    packed_bytes: int = 0
    packed_from: int | None = None

    def bytes(self, tokens: int) -> int:
        """Return the most bytes of this layer's cache, up to ``tokens``."""
        plain = self.token_bytes * min(tokens, self.window or tokens)
        if self.packed_from is None or tokens <= self.packed_from:
            return self.state_bytes + plain
        before = self.token_bytes * self.packed_from
        return self.state_bytes + max(before, self.packed_bytes * tokens)

    def keeping(self, kv: KVOptions) -> "LayerCache":
        """Return the same cache, kept in another way, where it can be."""
        if not self.token_bytes or self.window is not None:
            return self
        if kv.max_kv_size is not None:
            return replace(self, window=kv.max_kv_size)
        if kv.kv_bits is None:
            return self
        numbers = self.token_bytes / self.item_bytes
        each = kv.kv_bits / 8 + 2 * self.item_bytes / kv.kv_group_size
        packed = math.ceil(numbers * each)
        return replace(self, packed_bytes=packed, packed_from=kv.quantized_kv_start)


@dataclass(frozen=True)
class Footprint:
    """The bytes of a model's parts; see :meth:`of` and :meth:`of_config`.

    Attributes:
        channels: ``F``; of experts, how many there are.
        hidden_size: ``D``.
        granularity: the units of a layer are a multiple of it.
        shared: channels per layer that every selection keeps.
        core_bytes: everything except the units: attention, embeddings, norms; in a
            mixture also shared experts and the FFNs of dense layers.
        layer_bytes: of one channel (gate, up and down) or expert, in each of the ``L``
            layers; a fraction where quantisation groups lie across channels.
        caches: of the layers that have a KV cache.
        predictor_bytes: of the predictor and its head; 0 without one.
        reading_floats: float32 numbers in memory for each token while a layer reads to
            select; a model in 16 bits needs a little less than half of their bytes.
        passing_bytes: of what else is in memory for a while: the dense layer that a
            sweep reads, and what it computes with it; 0 without a sweep.
        least: the fewest units per layer that the stock class runs with.
        unit: what is kept or dropped.
    """

    channels: int
    hidden_size: int
    granularity: int
    shared: int
    core_bytes: int
    layer_bytes: tuple[float, ...]
    caches: tuple[LayerCache, ...]
    predictor_bytes: int = 0
    reading_floats: int = 0
    passing_bytes: int = 0
    least: int = 1
    unit: Unit = "channel"

    @staticmethod
    def of(model: Opened) -> "Footprint":
        """Weigh an opened model; no weight is read."""
        return Footprint.of_module(
            model.source.skeleton,
            model.plan,
            model.config,
            granularity=model.granularity,
            shared=model.ifp.shared,
            predictor_bytes=folder_bytes(model.path / "predictor"),
        )

    @staticmethod
    def of_config(config: dict[str, Any], **about: int) -> "Footprint":
        """Weigh the model that a config.json describes; there need be no weights.

        Args:
            config: its content; quantisation and dtype as mlx-lm and HF note them.
            about: ``granularity``, ``shared`` and ``predictor_bytes``, unless they are
                the defaults.

        Raises:
            ValueError: if mlx-lm has no such model, or it cannot be sliced.
        """
        dense = model_of_config(config)
        return Footprint.of_module(dense, plan_of(dense, config), config, **about)

    @staticmethod
    def of_module(
        dense: nn.Module,
        plan: Plan,
        config: dict[str, Any] | None = None,
        *,
        granularity: int = 1,
        shared: int = 0,
        predictor_bytes: int = 0,
    ) -> "Footprint":
        """Weigh a stock mlx-lm model, dense in shape, its weights read or not.

        Args:
            dense: the model.
            plan: its plan.
            config: its config.json; default: what the model itself says of it.
            granularity, shared, predictor_bytes: as of the result.
        """
        least = 1
        if plan.unit == "expert":
            config = config or asdict(dense.args)
            granularity = math.lcm(granularity, groups_of(config))
            least = fewest(plan, config, slots_of(dense, plan))
        weights = tree_flatten(dense.parameters(), destination={})
        names = sliced_names(dense, plan)
        sizes = [sum(weights[name].nbytes for name in layer) for layer in names]
        inlet = dense_shapes(plan.inlets(dense)[0])["weight"]
        return Footprint(
            channels=plan.units,
            hidden_size=inlet[0] if plan.unit == "channel" else inlet[1],
            granularity=math.lcm(granularity, group_size(dense, plan)),
            shared=shared,
            core_bytes=model_bytes(dense) - sum(sizes),
            layer_bytes=tuple(size / plan.units for size in sizes),
            caches=tuple(_caches(dense)),
            predictor_bytes=predictor_bytes,
            reading_floats=_reading_floats(dense, plan),
            least=least,
            unit=plan.unit,
        )

    @property
    def layers(self) -> int:
        """``L``."""
        return len(self.layer_bytes)

    @property
    def dense_bytes(self) -> int:
        """Of the whole model's weights."""
        return self.compact_bytes([self.channels] * self.layers)

    @property
    def shared_bytes(self) -> int:
        """Of the channels that every selection keeps."""
        return self.channel_bytes([self.shared] * self.layers)

    @property
    def smallest(self) -> int:
        """The fewest units per layer that a selection can have."""
        blocks = math.ceil(max(self.shared, self.least) / self.granularity)
        return blocks * self.granularity

    def channel_bytes(self, sizes: Selection | Sizes) -> int:
        """Return the bytes of a selection's units, or of this many in each layer."""
        sizes = sizes.sizes if isinstance(sizes, Selection) else sizes
        each = zip(sizes, self.layer_bytes, strict=True)
        return round(sum(size * channel for size, channel in each))

    def compact_bytes(self, sizes: Selection | Sizes) -> int:
        """Return the bytes of a selection's compact model."""
        return self.core_bytes + self.channel_bytes(sizes)

    def kv_bytes(self, tokens: int) -> int:
        """Return the bytes of the KV cache of ``tokens``, prompt and answer.

        mlx-lm lengthens its caches by 256 tokens at a time, so up to 255 more are
        allocated; a sliding window is exceeded while a long prompt is read.
        """
        return sum(cache.bytes(tokens) for cache in self.caches)

    def keeping(self, kv: KVOptions) -> "Footprint":
        """Return the footprint with a KV cache that is kept in another way."""
        return replace(self, caches=tuple(cache.keeping(kv) for cache in self.caches))

    def total_bytes(self, sizes: Selection | Sizes, tokens: int) -> int:
        """Return what must be in memory at once: the compact model, the KV cache of
        ``tokens``, the predictor, and what passes through.
        """
        needed = self.compact_bytes(sizes) + self.kv_bytes(tokens)
        return needed + self.predictor_bytes + self.passing_bytes

    def largest_size(
        self,
        memory_bytes: int,
        context_tokens: int,
        sizes: Callable[[int], Sizes] | None = None,
    ) -> int:
        """Return the largest ``k`` (``--target-size``) whose model fits.

        Args:
            memory_bytes: for the compact model, the KV cache and the predictor.
            context_tokens: tokens that the cache must hold.
            sizes: the units of each layer for a ``k``, as an allocation gives
                them; default: ``k`` in every layer. They must grow with ``k``.

        Raises:
            ValueError: if not even the smallest selection fits, naming the memory
                that would do.
        """
        sizes = sizes or (lambda k: [k] * self.layers)

        def fits(k: int) -> bool:
            return self.total_bytes(sizes(k), context_tokens) <= memory_bytes

        low, high = self.smallest, self.channels
        if not fits(low):
            raise ValueError(self._refusal(memory_bytes, context_tokens, sizes(low)))
        while low < high:
            blocks = (high - low) // self.granularity
            middle = low + math.ceil(blocks / 2) * self.granularity
            low, high = (
                (middle, high) if fits(middle) else (low, middle - self.granularity)
            )
        return low

    def largest_keep(
        self,
        memory_bytes: int,
        context_tokens: int,
        sizes: Callable[[int], Sizes] | None = None,
    ) -> float:
        """Return :meth:`largest_size` as a share of ``F``, for ``--keep``."""
        return self.largest_size(memory_bytes, context_tokens, sizes) / self.channels

    def check_fits(
        self, sizes: Selection | Sizes, memory_bytes: int, context_tokens: int
    ) -> None:
        """Refuse a selection that does not fit, before anything is loaded.

        Raises:
            ValueError: if it does not, naming what it needs and what would fit.
        """
        needed = self.total_bytes(sizes, context_tokens)
        if needed <= memory_bytes:
            return
        try:
            keep = self.largest_keep(memory_bytes, context_tokens)
            # Rounded down: the next larger share would not fit.
            remedy = f"--keep {math.floor(keep * 1000) / 1000:g} fits"
        except ValueError:
            least = self.total_bytes([self.smallest] * self.layers, context_tokens)
            remedy = f"even the smallest selection needs {in_words(least)}"
        raise ValueError(
            f"This needs {in_words(needed)} with a context of {context_tokens} tokens, "
            f"and {in_words(memory_bytes)} are allowed; {remedy}."
        )

    def _refusal(self, memory_bytes: int, tokens: int, sizes: Sizes) -> str:
        few = f"{min(sizes)} {self.unit}{'s' * (min(sizes) > 1)} a layer"
        parts = {
            f"everything but the {self.unit}s": self.core_bytes,
            f"the KV cache of {tokens} tokens": self.kv_bytes(tokens),
            "the predictor": self.predictor_bytes,
            "a dense layer that is being read": self.passing_bytes,
            few: self.channel_bytes(sizes),
        }
        summands = ", ".join(
            f"{in_words(n)} for {what}" for what, n in parts.items() if n
        )
        least = self.total_bytes(sizes, tokens)
        return (
            f"{in_words(memory_bytes)} of memory are too few: the smallest selection "
            f"needs {in_words(least)} ({summands}); allow {in_words(least)}, or take a "
            "shorter context or a smaller or more strongly quantised model."
        )


def model_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's weights, read or not."""
    return sum(weight.nbytes for _, weight in tree_flatten(model.parameters()))


def folder_bytes(folder: Path) -> int:
    """Return the bytes of the tensors in a folder's safetensors files."""
    return sum(map(_tensor_bytes, folder.glob("*.safetensors")))


def _tensor_bytes(file: Path) -> int:
    with file.open("rb") as stream:
        (header,) = struct.unpack("<Q", stream.read(8))
    return file.stat().st_size - 8 - header


def model_of_config(config: dict[str, Any]) -> nn.Module:
    """Return mlx-lm's model of a config.json, its weights random and never computed.

    Raises:
        ValueError: if mlx-lm cannot build it, or does not read how it is quantised.
    """
    from mlx_lm.models.bitlinear_layers import bitnet_quantize

    model = build(config)
    # Gemma 3's class has an output layer until it is given weights without one. Its
    # config.json seldom says that there is none: for Hugging Face that is the default.
    gemma = str(config.get("model_type")).startswith("gemma3")
    tied = config.get("tie_word_embeddings")
    if gemma if tied is None else tied:
        weights = tree_flatten(model.parameters())
        if hasattr(model, "sanitize"):  # as loading does: some classes then tie it
            model.sanitize({n: w for n, w in weights if "lm_head" not in n})
        for module in model.modules():
            module.pop("lm_head", None)
    # A Hugging Face config names the dtype of its files, under an old or a new key.
    name = config.get("torch_dtype") or config.get("dtype") or "float16"
    dtype = getattr(mx, str(name).removeprefix("torch."), mx.float16)
    model.update(tree_map(lambda weight: weight.astype(dtype), model.parameters()))
    if quantised_by(config) == "bitnet":
        return bitnet_quantize(model, noted(config))
    if how := config.get("quantization") or _packed(model, config):
        quantise_as(model, how)
    return model


def _packed(model: nn.Module, config: dict[str, Any]) -> dict[str, Any] | None:
    """Return in MLX's form how another program has quantised a model."""
    how = packing(config)
    left = {
        path: False
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding) or leaves_out(config, path)
    }
    return how and how | left


def quantise_as(model: nn.Module, how: dict[str, Any]) -> None:
    """Quantise a stock model in place, in the way that a config.json notes."""

    def wanted(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if path in how:
            return how[path]
        whole = hasattr(module, "to_quantized")
        return whole and module.weight.shape[-1] % how["group_size"] == 0

    nn.quantize(
        model,
        group_size=how["group_size"],
        bits=how["bits"],
        mode=how.get("mode", "affine"),
        class_predicate=wanted,
    )


def _reading_floats(dense: nn.Module, plan: Plan) -> int:
    """Return how many numbers a layer computes for a token that is read to select."""
    if plan.unit == "channel":
        return CHANNEL_FLOATS * plan.units
    shapes = dense_shapes(plan.modules(dense)[0])
    stacks = [shape for shape in shapes.values() if len(shape) == 3]
    made = sum(shape[1] for shape in stacks)  # by one expert
    return EXPERT_FLOATS * slots_of(dense, plan) * made


def _caches(dense: nn.Module) -> list[LayerCache]:
    """Return what each layer keeps of a token, read off mlx-lm's caches after one
    token: their arrays have a shape before they are computed.
    """
    from mlx_lm.models.cache import make_prompt_cache

    caches = make_prompt_cache(dense)
    dense(mx.array([[0]]), cache=caches)
    return [_layer_cache(cache) for cache in caches]


def _layer_cache(cache: Any) -> LayerCache:
    parts = [_layer_cache(part) for part in getattr(cache, "caches", ())]
    if parts:
        windows = [part.window for part in parts if part.token_bytes]
        known = [window for window in windows if window is not None]
        window = max(known) if known and len(known) == len(windows) else None
        token_bytes = sum(part.token_bytes for part in parts)
        return LayerCache(token_bytes, window, sum(p.state_bytes for p in parts))
    if hasattr(cache, "keys") and isinstance(cache.keys, mx.array):
        # [B, heads, tokens, head size], and room for more tokens than one
        pair = [kv for kv in (cache.keys, cache.values) if isinstance(kv, mx.array)]
        token_bytes = sum(kv.nbytes // kv.shape[2] for kv in pair)
        window, size = getattr(cache, "max_size", None), pair[0].itemsize
        return LayerCache(token_bytes, window, item_bytes=size)
    held = tree_flatten(cache.state)
    return LayerCache(
        0, None, sum(part.nbytes for _, part in held if isinstance(part, mx.array))
    )
