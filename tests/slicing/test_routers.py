"""A mask on a router: what stays as it was, what it weighs, and what comes back."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import families, randomised, relative_error
from mlx.utils import tree_flatten

from ifp_mlx.slicing.masked import gives_logits, mask_model, set_masks
from ifp_mlx.slicing.plan import plan_of
from ifp_mlx.slicing.stock import build

TOKENS = mx.array([[5, 9, 77, 200, 13, 40], [7, 9, 3, 100, 14, 41]])
# A softmax before the choice and after it, a sigmoid with a ranking bias; tokens in
# rows, and (olmoe) one after the other.
LINEAR = ["qwen3_moe", "mixtral", "gpt_oss", "lfm2_moe", "olmoe"]


def masked(name, **changes):
    config = families()[name] | changes
    model = randomised(build(config))
    plan = plan_of(model, config)
    return model, plan, mask_model(model, plan)


def rows_of_masks(plan, rows, kept):
    rng = np.random.default_rng(0)
    found = np.zeros((plan.shape[0], rows, 1, plan.units), np.float32)
    for place in np.ndindex(found.shape[:3]):
        found[place][rng.permutation(plan.units)[:kept]] = 1
    return mx.array(found)


@pytest.mark.parametrize("name", [*LINEAR, "deepseek_v3"])
def test_a_router_whose_experts_are_all_kept_is_as_it_was_bit_for_bit(name):
    config = families()[name]
    stock = randomised(build(config))(TOKENS)
    model, plan, routers = masked(name)
    assert all(router.channels == plan.units for router in routers)
    for ones in (mx.ones(plan.shape), mx.ones((plan.shape[0], 1))):
        set_masks(routers, ones)
        assert mx.array_equal(model(TOKENS), stock)


@pytest.mark.parametrize("name", LINEAR)
def test_every_row_of_a_batch_has_its_own_experts(name):
    model, plan, routers = masked(name)
    masks, alone = rows_of_masks(plan, 2, plan.units // 2), []
    for row in range(2):
        set_masks(routers, masks[:, row, 0])
        alone.append(model(TOKENS[row : row + 1]))
    assert float(mx.abs(alone[0] - alone[1]).max()) > 0
    set_masks(routers, masks)
    assert relative_error(model(TOKENS), mx.concatenate(alone)) <= 1e-6


def test_a_mask_weighs_the_probabilities_before_they_are_normalised():
    plan, routers = masked("mixtral")[1:]
    router, weight = routers[0], mx.array(np.linspace(0, 1, plan.units))
    x = mx.random.normal((3, router.weight.shape[1]), key=mx.random.key(0))
    before = mx.softmax(router(x), axis=-1) * weight
    router._mask = weight
    found = mx.softmax(router(x), axis=-1)
    assert mx.allclose(found, before / before.sum(axis=-1, keepdims=True), atol=1e-6)


@pytest.mark.parametrize("name", LINEAR)
def test_the_gradient_of_a_mask_is_what_small_steps_show_and_never_nan(name):
    # As many are kept as a token takes, so that no small step changes who is chosen.
    model, plan, routers = masked(name)
    taken = families()[name]["num_experts_per_tok"]
    mask = np.array(rows_of_masks(plan, 1, taken)[:, 0, 0])
    mask *= np.linspace(0.4, 1, mask.size).reshape(mask.shape)
    wanted = mx.random.normal(model(TOKENS).shape, key=mx.random.key(1))

    def parts(mask):
        set_masks(routers, mx.array(mask))
        return nn.log_softmax(model(TOKENS)) * wanted

    found = np.array(mx.grad(lambda mask: parts(mask).sum())(mx.array(mask)))
    assert np.isfinite(found).all() and (found[mask == 0] == 0).all()
    slopes = np.zeros_like(mask)
    for place in map(tuple, np.argwhere(mask > 0)):
        step = np.zeros_like(mask)
        step[place] = 0.01
        slopes[place] = float((parts(mask + step) - parts(mask - step)).sum()) / 0.02
    assert np.abs(slopes).max() > 0.1
    assert relative_error(mx.array(found), mx.array(slopes)) <= 0.01


@pytest.mark.parametrize("name", [*LINEAR, "phimoe", "kimi_linear"])
def test_no_gradient_of_a_weight_is_nan_where_experts_are_dropped(name):
    model, plan, routers = masked(name)

    def loss(weights, masks):
        model.update(weights)
        set_masks(routers, masks)
        return nn.losses.cross_entropy(model(TOKENS), TOKENS).mean()

    weights = model.trainable_parameters()
    found = mx.grad(loss)(weights, rows_of_masks(plan, 2, plan.units // 2))
    assert all(mx.isfinite(value).all() for _, value in tree_flatten(found))


@pytest.mark.parametrize(("name", "linear"), [("olmoe", True), ("deepseek_v3", False)])
def test_a_router_says_whether_it_gives_logits(name, linear):
    config = families()[name]
    model = build(config)
    assert {*map(gives_logits, plan_of(model, config).inlets(model))} == {linear}
