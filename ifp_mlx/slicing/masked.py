"""Masking: every unit is computed, then the dropped ones are removed.

Equal to the sliced model for the same selection, by test. Only one module of a layer is
touched: the one whose input carries the channels, or the router of the experts. It
keeps its parameters, and its class becomes a subclass of the stock class that applies
the mask first, so that names, adapters and quantisation stay as they were.

Source: Hou et al. 2025 (arXiv:2501.02086) sec. 2, ``F(X, m)``.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .shapes import LayerPlan, Plan, at

Tap = Callable[[mx.array], mx.array]
# Added to a logit to make its probability exactly 0. Not −∞: a block may divide by its
# logits (phimoe), and then all gradients would be NaN.
DROPPED = -1e9


def mask_model(model: nn.Module, plan: Plan) -> list[nn.Module]:
    """Let every layer of a model apply a mask, in place; at first all ones.

    Args:
        model: a stock model of this plan; once masked, it stays so.
        plan: its plan.

    Returns:
        The ``L`` inlets, or routers, for :func:`set_masks`; ``channels`` of each is
        ``F``.
    """
    if plan.unit == "expert":
        return _mask_routers(model, plan)
    inlets = plan.inlets(model)
    for inlet in inlets:
        if not is_masked(inlet):
            become(inlet, "Masked", _masked_call)
            inlet._mask = mx.array(1.0)  # no parameter, for its underscore
            inlet.channels = plan.units
    return inlets


def masked_inlets(model: nn.Module) -> list[nn.Module]:
    """Return what :func:`mask_model` returned for a model, which may have been adapted
    since; an empty list for a model that is not masked.
    """
    found = {path: m for path, m in model.named_modules() if is_masked(m)}
    names = [name for name, _ in tree_flatten(model.parameters())] if found else []
    order = {
        path: next(n for n, name in enumerate(names) if name.startswith(f"{path}."))
        for path in found
    }
    return [found[path] for path in sorted(found, key=order.__getitem__)]


def is_masked(module: nn.Module) -> bool:
    """Whether :func:`mask_model` has changed this module."""
    return "_mask" in module


def set_masks(masked: Sequence[nn.Module], masks: mx.array) -> None:
    """Give every layer its mask.

    Args:
        masked: ``L`` modules, from :func:`mask_model`.
        masks: ``[L, F]``, the same for all rows of a batch, or ``[L, B, 1 or T, F]``;
            ``[L, 1]`` of ones keeps all. A router that gives no logits
            (:func:`gives_logits`) takes one mask for all rows; with others the model's
            call raises ``ValueError``.
    """
    for module, mask in zip(masked, masks, strict=True):
        module._mask = mask


@contextmanager
def tapped(inlets: Sequence[nn.Module], taps: Sequence[Tap]) -> Iterator[None]:
    """Let functions see, and change, what comes into some modules.

    Args:
        inlets: of the layers, from :meth:`Plan.inlets`.
        taps: for each inlet, maps its channels ``[..., F]`` to what it gets instead.
    """
    with becoming(inlets, "Tapped", [partial(_tapped_call, tap) for tap in taps]):
        yield


@contextmanager
def becoming(
    modules: Sequence[nn.Module], how: str, calls: Sequence[Callable[[type], Any]]
) -> Iterator[None]:
    """Give modules another call inside the ``with`` block; see :func:`become`."""
    stocks = [type(module) for module in modules]
    try:
        for module, call in zip(modules, calls, strict=True):
            become(module, how, call)
        yield
    finally:
        for module, stock in zip(modules, stocks, strict=True):
            module.__class__ = stock


def become(module: nn.Module, how: str, call: Callable[[type], Any]) -> None:
    """Give a module another call, in place, by a subclass of its stock class.

    Args:
        module: keeps its parameters and its name.
        how: begins the name of the new class.
        call: makes the new ``__call__`` from the stock class.
    """
    stock = type(module)
    body = {"__call__": call(stock), "__module__": stock.__module__}
    module.__class__ = type(f"{how}{stock.__name__}", (stock,), body)


def _masked_call(stock: type) -> Any:
    def call(self: Any, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        return stock.__call__(self, x * self._mask.astype(x.dtype), *args, **kwargs)

    return call


def _tapped_call(tap: Tap, stock: type) -> Any:
    def call(self: Any, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        return stock.__call__(self, tap(x), *args, **kwargs)

    return call


def gives_logits(router: nn.Module) -> bool:
    """Whether a router is a linear layer, adapted or not, whose output is logits; other
    routers choose experts themselves, and take one mask for all rows of a batch.
    """
    stock = router.get("linear", router)  # the layer inside an adapter
    return isinstance(stock, nn.Linear | nn.QuantizedLinear)


def _mask_routers(model: nn.Module, plan: Plan) -> list[nn.Module]:
    routers = plan.inlets(model)
    for layer, router in zip(plan.layers, routers, strict=True):
        if is_masked(router):
            continue
        router._mask = mx.array(1.0)
        router.channels = plan.units
        if gives_logits(router):
            become(router, "Masked", _blinded_call)
            _blind_rankings(at(model, layer.path), layer, router)
        else:
            become(router, "Masked", _choosing_call)
            router._rows = tuple(s for s in layer.slices if s.module == layer.inlet)
    return routers


def _blinded_call(stock: type) -> Any:
    """A router that is a linear layer gives logits. The logarithm of the mask is added
    to them: 0 where the mask is 1, as good as −∞ where an expert is dropped. A value in
    between multiplies the expert's probability before the chosen ones are normalised
    (its odds, where a block takes the sigmoid of every logit).
    """

    def call(self: Any, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        logits = stock.__call__(self, x, *args, **kwargs)
        mask = self._mask
        if mask.ndim > logits.ndim:  # the block lays its rows one after the other
            rows, units = len(mask), mask.shape[-1]
            mask = mx.broadcast_to(mask, (rows, len(logits) // rows, units))
            mask = mask.reshape(logits.shape)
        return logits + _log(mask).astype(logits.dtype)

    return call


def _log(mask: mx.array) -> mx.array:
    """Return the logarithm of a mask. Its gradient is 0 for a dropped expert: that is
    never chosen, so what it would add is unknown.
    """
    kept = mask > 0
    return mx.where(kept, mx.log(mx.where(kept, mask, 1.0)), DROPPED)


def _blind_rankings(home: nn.Module, layer: LayerPlan, router: nn.Module) -> None:
    """Some blocks add a bias of each expert before they rank them: there a probability
    of 0 would not keep a dropped expert out.
    """
    for piece in layer.slices:
        module = at(home, piece.module)
        bias = module.get(piece.tensor) if "bias" in piece.tensor else None
        if bias is not None and bias.ndim == 1 and module is not router:
            become(module, "Ranking", _ranking_call(piece.tensor, home, layer.inlet))


def _ranking_call(tensor: str, home: nn.Module, inlet: str) -> Callable[[type], Any]:
    def made(stock: type) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            bias, router = self[tensor], at(home, inlet)
            self[tensor] = mx.where(router["_mask"] > 0, bias, -mx.inf)
            try:
                return stock.__call__(self, *args, **kwargs)
            finally:
                self[tensor] = bias

        return call

    return made


def _choosing_call(stock: type) -> Any:
    """A router that multiplies a bare weight chooses experts itself: it is given the
    rows of the kept ones, and its choice gets the old numbers back.
    """

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._mask.size == 1:  # all are kept
            return stock.__call__(self, *args, **kwargs)
        kept = _kept(self._mask)
        whole = {piece.tensor: self[piece.tensor] for piece in self._rows}
        for name, tensor in whole.items():
            self[name] = tensor[kept]
        try:
            chosen = stock.__call__(self, *args, **kwargs)
        finally:
            for name, tensor in whole.items():
                self[name] = tensor
        return tuple(
            kept[part] if mx.issubdtype(part.dtype, mx.integer) else part
            for part in chosen
        )

    return call


def _kept(mask: mx.array) -> mx.array:
    if mask.ndim != 1:
        raise ValueError(
            f"This router takes one mask for all rows of a batch, not masks of the shape "
            f"{mask.shape}: it multiplies a bare weight and chooses by itself."
        )
    count = int((mask > 0).sum())
    return mx.sort(mx.argsort(-mask)[:count]).astype(mx.uint32)
