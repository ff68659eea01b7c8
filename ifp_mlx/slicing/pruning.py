"""Masking and slicing, side by side: the same channels, the same result."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..selection.masks import Selection
from ..selection.widths import check_multiple

TESTED = ("llama", "mistral", "ministral3", "qwen2", "qwen3", "gemma2", "gemma3_text")


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class FFN(NamedTuple):
    """Where a layer's gated FFN sits: ``getattr(block, name)`` is ``module``."""

    block: nn.Module
    name: str
    module: nn.Module


class Donor(NamedTuple):
    """An FFN whose channels may be copied instead of read.

    Attributes:
        ffn: as :meth:`ifp_mlx.store.Folder.fill_all` left it, no gates folded in.
        channels: int32 ``[k]``, the channels it holds.
    """

    ffn: nn.Module
    channels: mx.array


class TappedFFN(nn.Module):
    """A stock gated FFN with a function applied to its channels before ``down_proj``.

    The forward pass stays mlx-lm's own: its class is called with another
    ``down_proj``, so no activation function is known or repeated here. Parameters
    keep their stock names.

    Args:
        ffn: the stock module, which shares its weights with this one.
        tap: maps the channels ``act(gate) * up``, ``[B, T, F]``, to their stand-in.
    """

    def __init__(self, ffn: nn.Module, tap: Callable[[mx.array], mx.array]) -> None:
        super().__init__()
        for name in PROJECTIONS:
            self[name] = ffn[name]
        self._forward = partial(stock_forward, ffn)
        self._tap = tap

    def __call__(self, x: mx.array) -> mx.array:
        """Return the FFN's output, ``[B, T, D]``, for ``x``, ``[B, T, D]``."""
        return self._forward(
            x,
            gate_proj=self.gate_proj,
            up_proj=self.up_proj,
            down_proj=lambda h: self.down_proj(self._tap(h)),
        )


class MaskedFFN(TappedFFN):
    """The FFN as training sees it: every channel computed, then masked.

    Equal to the sliced FFN for the same selection, by test. It starts with a mask
    of ones.

    Attributes:
        channels: ``F``.

    Source: Hou et al. 2025 (arXiv:2501.02086) sec. 2, ``F(X, m)``.
    """

    def __init__(self, ffn: nn.Module) -> None:
        super().__init__(ffn, self._masked)
        self.channels = ffn.gate_proj.weight.shape[0]  # LoRA hides the weight later
        self._mask = mx.array(1.0)  # the underscore keeps it out of the parameters

    @property
    def mask(self) -> mx.array:
        """The mask in use."""
        return self._mask

    def set_mask(self, mask: mx.array) -> None:
        """Use ``mask``, ``[F]``, ``[B, 1, F]`` or ``[B, T, F]``, from now on."""
        self._mask = mask

    def _masked(self, h: mx.array) -> mx.array:
        return h * self._mask.astype(h.dtype)


def stock_forward(
    ffn: nn.Module, x: mx.array, **projections: Callable[[mx.array], mx.array]
) -> mx.array:
    """Run the forward pass of an FFN's own class with other projections put in.

    Args:
        ffn: the stock module; it is not changed.
        x: ``[B, T, D]``.
        projections: what stands in for ``gate_proj``, ``up_proj``, ``down_proj``.
    """
    stand_in = copy.copy(ffn)
    for name, projection in projections.items():
        setattr(stand_in, name, projection)
    return type(ffn).__call__(stand_in, x)


def ffn_layers(model: nn.Module) -> list[FFN]:
    """Return the gated FFN of every layer of a stock mlx-lm model.

    Found by structure (``gate_proj``, ``up_proj`` and ``down_proj``), then tried: a
    class is taken only if each channel's value depends on that channel alone, since
    anything else could not be sliced exactly.

    Raises:
        ValueError: if a layer has no such FFN, naming the classes found and the
            model types that are tested.
    """
    found = []
    for number, block in enumerate(getattr(model, "layers", ())):
        ffn = next(_gated_children(block), None)
        if ffn is None:
            kinds = {type(child).__name__ for child in block.children().values()}
            raise _unsupported(model, f"layer {number} has only {sorted(kinds)}")
        found.append(ffn)
    if not found:
        raise _unsupported(model, "it has no layers")
    for module in {_settings(ffn.module): ffn.module for ffn in found}.values():
        if not _channels_are_independent(module):
            raise _unsupported(model, f"{type(module).__name__} mixes its channels")
    return found


def dense_shape(model: nn.Module) -> tuple[int, int]:
    """Return ``(L, F)`` of a dense model.

    Raises:
        ValueError: if the layers are not equally wide.
    """
    widths = [ffn.module.gate_proj.weight.shape[0] for ffn in ffn_layers(model)]
    if len(set(widths)) > 1:
        raise _unsupported(model, f"its layers have the widths {sorted(set(widths))}")
    return len(widths), widths[0]


def mask_model(model: nn.Module) -> list[MaskedFFN]:
    """Put a :class:`MaskedFFN` in place of every FFN of ``model``; return them."""
    masked = []
    for block, name, module in ffn_layers(model):
        masked.append(MaskedFFN(module))
        setattr(block, name, masked[-1])
    return masked


def set_masks(masked: list[MaskedFFN], masks: mx.array) -> None:
    """Give every layer its mask.

    Args:
        masked: ``L`` modules, from :func:`mask_model`.
        masks: ``[L, F]`` for all rows of a batch alike, or ``[L, B, 1 or T, F]``.
    """
    for module, mask in zip(masked, masks, strict=True):
        module.set_mask(mask)


def slice_model(model: nn.Module, selection: Selection) -> None:
    """Cut ``model`` down to the selected channels, in place, gates folded in.

    Weights that are still lazy are read one layer at a time, so about one dense
    layer is in memory above the compact model.

    Args:
        model: a stock mlx-lm model; stays one.
        selection: made for this model.

    Raises:
        ValueError: as :func:`slice_ffn`.
    """

    def fills() -> Iterator[int]:
        layers = zip(ffn_layers(model), selection.indices, strict=True)
        for layer, (ffn, index) in enumerate(layers):
            slice_ffn(ffn.module, index)
            yield layer

    fill_model(model, fills(), selection)


def fill_model(
    model: nn.Module,
    fills: Iterable[int],
    selection: Selection,
    *,
    progress: Callable[[Iterable], Iterable] = iter,
) -> None:
    """Give every layer of ``model`` its selected channels, in place, gates folded in.

    Args:
        model: a stock mlx-lm model, dense in shape; stays one.
        fills: by giving its next item, puts the channels of the next layer into its
            FFN; see :meth:`ifp_mlx.store.Folder.fill_all`.
        selection: made for this model.
        progress: wraps the iteration over layers, for a progress bar.
    """
    layers = ffn_layers(model)
    gates = selection.gates or (None,) * len(layers)
    fills = iter(fills)
    for ffn, gate in progress(list(zip(layers, gates, strict=True))):
        next(fills)
        if gate is not None:
            scale_channels(ffn.module, gate)
        mx.eval(ffn.module.parameters())
    note_width(model)


def note_width(model: nn.Module) -> None:
    """Let a sliced model's own arguments say how wide its FFNs are, if they are
    equally wide.
    """
    widths = {ffn.module.gate_proj.weight.shape[0] for ffn in ffn_layers(model)}
    if len(widths) == 1 and hasattr(model, "args"):
        model.args.intermediate_size = widths.pop()


def share_core(model: nn.Module, other: nn.Module) -> None:
    """Let ``model`` use the very weights of ``other`` for all but its FFNs, in place.

    Args:
        model: a stock mlx-lm model.
        other: the same one, apart from the FFNs.
    """
    ffns = [ffn.module.parameters() for ffn in ffn_layers(model)]
    own = {id(weight) for _, weight in tree_flatten(ffns)}
    theirs = tree_flatten(other.parameters(), destination={})
    names = [
        n for n, weight in tree_flatten(model.parameters()) if id(weight) not in own
    ]
    model.update(tree_unflatten([(name, theirs[name]) for name in names]))


def twin(model: nn.Module) -> nn.Module:
    """Return a model of the same structure that has the very arrays of this one; what
    is set in one of them does not reach the other.
    """
    return copy.deepcopy(model, {id(leaf): leaf for _, leaf in tree_flatten(model)})


def slice_ffn(ffn: nn.Module, index: mx.array, *, requantise: bool = True) -> None:
    """Keep the channels ``index`` of one FFN, in place.

    Quantised or not, this loses nothing as long as whole groups of ``down_proj`` are
    kept. Where the selection cuts its groups, ``down_proj`` is dequantised, sliced
    and quantised again, which does lose (:func:`cuts_groups` tells beforehand).

    Args:
        ffn: has ``gate_proj`` and ``up_proj`` ``[F, D]`` and ``down_proj`` ``[D, F]``.
        index: int32 ``[k]``, sorted.
        requantise: ``False`` leaves a ``down_proj`` whose groups are cut dequantised.

    Raises:
        ValueError: if ``k`` channels do not make whole quantisation groups.
    """
    if index.size < ffn.gate_proj.weight.shape[0]:
        _keep_columns(ffn, index, requantise)
        slice_rows(ffn, index)


def slice_rows(ffn: nn.Module, index: mx.array) -> None:
    """Do the half of :func:`slice_ffn` that never loses anything: gate and up."""
    for linear in (ffn.gate_proj, ffn.up_proj):
        # Every row carries its own scales, so quantised rows move as they are.
        for name in ("weight", "scales", "biases", "bias"):
            if name in linear:
                linear[name] = linear[name][index]


def dequantised(linear: nn.Module) -> mx.array:
    """Return a linear's weight, ``[O, I]``, whether it is quantised or not."""
    if not isinstance(linear, nn.QuantizedLinear):
        return linear.weight
    return mx.dequantize(
        linear.weight, linear.scales, linear.get("biases"), **_quantisation(linear)
    )


def put_down(linear: nn.Module, weight: mx.array) -> None:
    """Give a ``down_proj`` other weights, in place, quantised as it is.

    Args:
        linear: any stock linear, dense in shape.
        weight: ``[D, k]``.

    Raises:
        ValueError: if ``k`` channels do not make whole quantisation groups.
    """
    if not isinstance(linear, nn.QuantizedLinear):
        linear.weight = weight
        return
    channels = linear.scales.shape[1] * linear.group_size
    check_multiple(weight.shape[1], linear.group_size, channels)
    linear.weight, linear.scales, *biases = mx.quantize(weight, **_quantisation(linear))
    if biases:
        linear.biases = biases[0]


def scale_channels(ffn: nn.Module, gate: mx.array) -> None:
    """Fold gates into the rows of ``up_proj``, in place.

    Args:
        ffn: sliced already.
        gate: float32 ``[k]``, what each channel is multiplied with.
    """
    _scale_rows(ffn.up_proj, gate)


def group_size(model: nn.Module) -> int:
    """Return how many channels must be selected together: the quantisation group
    along ``F`` of ``down_proj``, or 1 when it is not quantised.
    """
    return math.lcm(*group_sizes(model))


def group_sizes(model: nn.Module) -> list[int]:
    """Return every layer's quantisation group along ``F``; 1 is not quantised."""
    return [getattr(ffn.module.down_proj, "group_size", 1) for ffn in ffn_layers(model)]


def cuts_groups(index: mx.array, group: int, channels: int) -> bool:
    """Whether keeping ``index``, int32 ``[k]``, of ``channels`` takes a quantisation
    group of ``down_proj`` apart, so that it must be quantised again.
    """
    return index.size < channels and not _is_whole_blocks(index, group)


def _quantisation(linear: nn.QuantizedLinear) -> dict[str, Any]:
    return {"group_size": linear.group_size, "bits": linear.bits, "mode": linear.mode}


def _keep_columns(ffn: nn.Module, index: mx.array, requantise: bool) -> None:
    linear = ffn.down_proj
    if not isinstance(linear, nn.QuantizedLinear):
        linear.weight = linear.weight[:, index]
        return
    group = linear.group_size
    if not _is_whole_blocks(index, group):
        ffn.down_proj = _cut_groups(linear, index, requantise)
        return
    blocks = index[::group] // group
    rows, groups = linear.scales.shape
    for name in ("weight", "scales", "biases"):
        if name in linear:
            grouped = linear[name].reshape(rows, groups, -1)
            linear[name] = grouped[:, blocks].reshape(rows, -1)


def _cut_groups(
    linear: nn.QuantizedLinear, index: mx.array, requantise: bool
) -> nn.Module:
    """Return the columns ``index`` of a quantised ``down_proj`` as another linear."""
    columns = dequantised(linear)[:, index]
    if requantise:
        put_down(linear, columns)
        return linear
    cut = nn.Linear(1, 1, bias=False)
    cut.weight = columns
    if "bias" in linear:
        cut.bias = linear.bias
    return cut


def _is_whole_blocks(index: mx.array, group: int) -> bool:
    if index.size % group:
        return False
    starts = index[::group] // group * group
    blocks = starts[:, None] + mx.arange(group)
    return bool(mx.array_equal(index.reshape(-1, group), blocks))


def _scale_rows(linear: nn.Module, gate: mx.array) -> None:
    # A row's scale multiplies its quantisation scales and biases, which is exact
    # for the affine mode; the other modes store scales as powers of two.
    names: tuple[str, ...] = ("weight", "bias")
    if isinstance(linear, nn.QuantizedLinear):
        if linear.mode != "affine":
            raise ValueError(
                f"Soft gates cannot be folded into {linear.mode} weights; use binary "
                "gates or affine quantisation."
            )
        names = ("scales", "biases", "bias")
    for name in names:
        if name in linear:
            array = linear[name]
            scale = gate.reshape(-1, *[1] * (array.ndim - 1))
            linear[name] = (array.astype(mx.float32) * scale).astype(array.dtype)


def _gated_children(block: nn.Module) -> Iterator[FFN]:
    for name, child in block.children().items():
        if isinstance(child, nn.Module) and all(
            isinstance(child.get(p), nn.Linear | nn.QuantizedLinear)
            for p in PROJECTIONS
        ):
            yield FFN(block, name, child)


def _settings(ffn: nn.Module) -> tuple:
    """Return what decides how an FFN computes, beside its weights: gemma3n's class
    keeps only the largest channels in some layers, and all in others.
    """
    plain = (bool, int, float, str)
    return type(ffn), *((k, v) for k, v in vars(ffn).items() if isinstance(v, plain))


def _channels_are_independent(ffn: nn.Module) -> bool:
    """Try the forward pass on made-up channels; no projection is read."""
    if isinstance(ffn, TappedFFN):
        return True
    # A few channels far above the rest: some FFNs keep only such ones, and which
    # those are depends on all.
    gate, up = mx.linspace(-2, 2, 64)[None] ** 5, mx.linspace(2, -1, 64)[None]

    def channels(kept: mx.array) -> mx.array:
        return stock_forward(
            ffn,
            mx.zeros((1, ffn.down_proj.weight.shape[0])),
            gate_proj=lambda x: gate[:, kept],
            up_proj=lambda x: up[:, kept],
            down_proj=lambda h: h,
        )

    some = mx.arange(16, 64, 3)
    whole, part = channels(mx.arange(64)), channels(some)
    return part.shape == (1, 16) and bool(mx.allclose(whole[:, some], part, atol=1e-6))


def _unsupported(model: nn.Module, why: str) -> ValueError:
    kind = f"{type(model).__module__}.{type(model).__name__}"
    return ValueError(
        f"{kind} has no plain gated FFN in every layer: {why}; tested model types are "
        f"{', '.join(TESTED)}."
    )
