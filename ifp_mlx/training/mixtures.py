"""What a mixture of experts asks of a training run, and what freezing its router means."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..model.experts import check_number, groups_of
from ..selection.widths import target_size
from ..slicing.masked import gives_logits, mask_model, set_masks
from ..slicing.shapes import Plan, at, put_at
from ..slicing.stock import build
from .recipe import TrainConfig

INSTEAD = (
    "use masker: dense, and choose its experts by a text or a mask file, or the stage "
    "recover for one mask"
)


def check_mixture(plan: Plan, about: dict[str, Any], config: TrainConfig) -> None:
    """Check the settings that mean something else, or nothing, for experts; no weight
    is read.

    Args:
        plan: of the model to be trained.
        about: its config.json.
        config: the settings.

    Raises:
        ValueError: naming the first setting that is not possible.
    """
    if config.balance_weight:
        _check_balance(plan, about, config)
    if plan.unit == "channel":
        if config.freeze_router:
            raise ValueError(
                "freeze_router is for mixtures of experts, and this model has no "
                "router; leave it out."
            )
        return
    if config.train == "dora":
        raise ValueError("train: dora does not know stacked experts; use train: lora.")
    if config.masker == "dense" or config.stage == "recover":
        return
    if config.gates == "soft":
        raise ValueError(
            "gates: soft would weigh experts in the router's choice, which a compact "
            "model's router has no place for; experts have gates: binary."
        )
    if (config.granularity or 1) > 1:
        raise ValueError(
            f"granularity={config.granularity} is for channels, and experts are chosen "
            "one by one; leave it out."
        )
    _check_budget(plan, about, config)
    _check_router(plan, about, config)


def _check_balance(plan: Plan, about: dict[str, Any], config: TrainConfig) -> None:
    asked = f"balance_weight={config.balance_weight}"
    if plan.unit == "channel":
        raise ValueError(
            f"{asked} is for mixtures of experts, and this model has no router; leave it "
            "out."
        )
    if config.freeze_router or config.train == "frozen":
        raise ValueError(
            f"{asked} teaches the routers, which this run leaves as they are; leave it "
            "out, or train them."
        )
    router = plan.inlets(build(about))[0]
    if not gives_logits(router):
        raise ValueError(
            f"{asked} needs the logits of the routers, and {type(router).__name__} "
            "multiplies a bare weight and chooses by itself; leave it out."
        )


def _check_budget(plan: Plan, about: dict[str, Any], config: TrainConfig) -> None:
    shared = config.shared or 0
    k = config.target_size or target_size(plan.units, config.keep or 1)
    if not 0 < k <= plan.units:
        raise ValueError(
            f"target_size={k} must be between 1 and the {plan.units} experts of a layer."
        )
    if shared > k:
        raise ValueError(
            f"shared={shared} must be between 0 and the {k} experts that are kept."
        )
    check_number(plan, about, k)
    if (groups := groups_of(about)) > 1:
        raise ValueError(
            f"This model's router chooses among {groups} groups of experts, of which "
            f"equally many must be kept, and a predictor knows no groups; {INSTEAD}."
        )


def _check_router(plan: Plan, about: dict[str, Any], config: TrainConfig) -> None:
    """Try masks of two instructions at once: shapes are enough, nothing is computed."""
    model = build(about)
    block = type(plan.modules(model)[0])
    name = f"{block.__module__}.{block.__name__}"
    routers = plan.inlets(model)
    if not all(map(gives_logits, routers)):
        raise ValueError(
            f"The router {type(routers[0]).__name__} of {name} multiplies a bare weight "
            "and chooses by itself, so no mask of an instruction's own can be trained "
            f"with it; {INSTEAD}."
        )
    if config.masker != "predictor":
        return
    set_masks(mask_model(model, plan), mx.ones((len(routers), 2, 1, plan.units)))
    try:
        model(mx.zeros((2, 3), mx.int32))
    except (ValueError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"{name} does not take masks of several instructions in one batch ({error}); "
            f"{INSTEAD}."
        ) from error


def freeze_routers(model: nn.Module, plan: Plan) -> None:
    """Freeze, in place, what decides which expert gets a token: the routers, and biases
    and scales for each expert that are stored outside the experts' own weights.

    Args:
        model: a stock model of this plan, not masked yet. It may have LoRA layers;
            those of its routers are removed.
        plan: its plan, of experts.
    """
    for layer in plan.layers:
        home = at(model, layer.path)
        router = at(home, layer.inlet)
        put_at(home, layer.inlet, router.get("linear", router))
        at(home, layer.inlet).freeze()
        for piece in layer.slices:
            owner = at(home, piece.module)
            if not _is_stack(owner):
                owner.freeze(recurse=False, keys=piece.tensor)


def _is_stack(module: nn.Module) -> bool:
    """Whether a module holds the weights of all experts, adapted or not."""
    weight = module.get("linear", module).get("weight")
    return weight is not None and weight.ndim == 3
