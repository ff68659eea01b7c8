"""The loss that spreads tokens over experts: its value, its gradient, what it brings."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import families, randomised, relative_error, write_family
from mlx.utils import tree_flatten
from test_mixtures import ROWS, batch, mixture, run, write_rows

from ifp_mlx import load
from ifp_mlx.slicing.masked import DROPPED
from ifp_mlx.slicing.plan import plan_of
from ifp_mlx.slicing.routing import overheard
from ifp_mlx.slicing.stock import build
from ifp_mlx.training.balance import balance_of
from ifp_mlx.training.batches import Batch
from ifp_mlx.training.maskers import Budget, FixedMask, checkpoint_layers
from ifp_mlx.training.recipe import TrainConfig
from ifp_mlx.training.run import train as descend
from ifp_mlx.training.step import Pair, Step

ALL = Budget(8, 0.3, "binary")
DENSE = FixedMask(None)
LENGTHS = (11, 9, 5, 10)
ROUTER = "block_sparse_moe.gate.weight"


def made(name="mixtral"):
    model = randomised(build(families()[name]))
    return model, plan_of(model, families()[name])


def padded(filler=0, more=0):
    """Return rows of different lengths, and what stands after their ends."""
    real = np.arange(12) < np.array(LENGTHS)[:, None]
    tokens = np.where(real, np.array(batch().tokens), filler).astype(np.int32)
    tokens = np.pad(tokens, [(0, 0), (0, more)], constant_values=filler)
    counts = np.pad(real, [(0, 0), (0, more)]).astype(np.float32)
    return batch()._replace(tokens=mx.array(tokens), loss_mask=mx.array(counts))


def settings(weight, **more):
    return TrainConfig(balance_weight=weight, lr=0.01, compile=False, **more)


def report(model, plan, *batches, masker=DENSE, budget=ALL, **more):
    more.setdefault("weight", 0.5)
    step = Step(Pair(model, masker), settings(**more), compiled=False, plan=plan)
    found = step(batches, budget)
    return {name: float(value) for name, value in found.items()}


def by_hand(model, one):
    """Return the balance of a mixtral, from its hidden states, in numpy."""
    h, found = model.model.embed_tokens(one.tokens[:, :-1]), []
    for layer in model.layers:
        h = h + layer.self_attn(layer.input_layernorm(h), "causal")
        x = layer.post_attention_layernorm(h)
        h = h + layer.block_sparse_moe(x)
        router = np.array(layer.block_sparse_moe.gate.weight, np.float64)
        logits = np.array(x, np.float64) @ router.T
        E, K = logits.shape[-1], layer.block_sparse_moe.num_experts_per_tok
        rows = zip(logits, LENGTHS, strict=True)
        logits = np.concatenate([row[:n] for row, n in rows])
        odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
        P = (odds / odds.sum(axis=-1, keepdims=True)).mean(axis=0)
        chosen = np.argsort(-logits, axis=-1)[:, :K]
        f = np.bincount(chosen.ravel(), minlength=E) / chosen.size
        found.append(E * (f * P).sum())
    return np.mean(found)


def test_it_is_what_numpy_finds_by_hand_and_the_loss_has_it_by_its_weight():
    model, plan = made()
    expected = by_hand(model, padded())
    found = report(model, plan, padded())
    assert expected > 1.01
    assert found["balance"] == pytest.approx(expected, rel=1e-5)
    assert found["loss"] == pytest.approx(found["ce"] + 0.5 * expected, rel=1e-5)


def test_padding_does_not_count():
    wanted = report(*made(), padded())["balance"]
    for one in (padded(filler=7), padded(filler=7, more=20)):
        assert report(*made(), one)["balance"] == pytest.approx(wanted, rel=1e-5)


def test_micro_batches_count_by_their_targets():
    one = padded()
    parts = [Batch(*(a if a is None else a[rows] for a in one)) for rows in
             (slice(1), slice(1, 4))]  # fmt: skip
    alone = [report(*made(), part)["balance"] for part in parts]
    counts = [LENGTHS[0] - 1, sum(LENGTHS[1:]) - 3]
    found = report(*made(), *parts)
    assert found["balance"] == pytest.approx(np.average(alone, weights=counts), 1e-5)
    assert found["loss"] == pytest.approx(found["ce"] + 0.5 * found["balance"], 1e-5)


def test_without_a_weight_nothing_is_said_of_it():
    model, _ = made()
    assert "balance" not in report(model, None, padded(), weight=0.0)


def test_only_kept_experts_count():
    logits = np.full((6, 8), DROPPED, np.float32)
    logits[:3, :4] = logits[3:, 4:] = 0  # half of the tokens keep the other half
    real = mx.ones((2, 3))
    even = mx.array([[0, 1], [2, 3], [0, 2], [4, 5], [6, 7], [4, 6]])
    found = balance_of([mx.array(logits)], [even], real)
    assert float(found) == pytest.approx(1)
    logits[:3, :2] = logits[3:, 4:6] = 20  # two of the four get all
    few = mx.array([[0, 1]] * 3 + [[4, 5]] * 3)
    found = balance_of([mx.array(logits)], [few], real)
    assert float(found) == pytest.approx(2)


def test_under_a_mask_it_is_that_of_the_compact_model(tmp_path):
    source, _ = load(write_family(tmp_path / "model", "mixtral"))
    kept = source.select([5, 9], keep=0.5, selector="random")
    masker = FixedMask(kept.mask())
    found = report(source.dense(), source.plan, padded(), masker=masker)
    compact = report(source.compact(kept), source.plan, padded())
    assert found["balance"] == pytest.approx(compact["balance"], rel=1e-5)


def gradients(model, plan, masker=DENSE, budget=ALL, compiled=False, **more):
    config = settings(1.0, ce_weight=0.0, **more)
    step = Step(Pair(model, masker), config, compiled=compiled, plan=plan)
    about = (budget.k, mx.array(0.3), budget.gates, 1)
    return dict(tree_flatten(step._backward(list(padded()), None, None, *about)[1]))


def test_its_gradient_reaches_every_router_and_not_the_last_experts():
    model, plan = made()
    found = gradients(model, plan)
    assert all(mx.isfinite(value).all() for value in found.values())
    routers = [value for name, value in found.items() if name.endswith(ROUTER)]
    assert len(routers) == len(plan.layers)
    assert all(float(mx.abs(value).max()) > 0 for value in routers)
    last = f"llm.{plan.layers[-1].path}.switch_mlp.down_proj.weight"
    assert float(mx.abs(found[last]).max()) == 0


def test_its_gradient_is_the_same_where_activations_are_computed_again(tmp_path):
    folder = write_family(tmp_path / "model", "qwen3_moe")
    found = []
    for again in (False, True):
        model, masker = mixture(folder)
        if again:
            checkpoint_layers(model)
        plan, half = plan_of(build(families()["qwen3_moe"])), Budget(4, 0.3, "binary")
        found.append(gradients(model, plan, masker, half))
    name = "llm.model.layers.2.mlp.gate.weight"
    assert float(mx.abs(found[0][name]).max()) > 0
    assert relative_error(found[1][name], found[0][name]) < 1e-5


@pytest.mark.long  # a C++ compiler at work
def test_its_gradient_is_the_same_compiled():
    plain = gradients(*made())
    mx.enable_compile()
    try:
        again = gradients(*made(), compiled=True)
    finally:
        mx.disable_compile()
    name = f"llm.model.layers.0.{ROUTER}"
    assert relative_error(again[name], plain[name]) < 1e-5


@pytest.mark.parametrize("name", ["gpt_oss", "lfm2_moe", "olmoe"])
def test_other_blocks_say_how_evenly_they_choose(name):
    model, plan = made(name)
    real = mx.ones((4, 11))
    with overheard(model, plan) as routing:
        model(batch().tokens[:, :-1])
    assert [len(part) for part in routing] == [len(plan.layers)] * 2
    assert 1 <= float(balance_of(*routing, real)) <= plan.units


def test_training_with_it_ends_more_balanced_than_without():
    ends = []
    for weight in (0.0, 1.0):
        model, plan = made()
        for inlet in plan.inlets(model):  # a few experts get nearly all
            inlet.weight = inlet.weight.at[:3].multiply(6)
        config = settings(weight, steps=20, log_every=100, weight_decay=0.0)
        descend(model, DENSE, lambda number: padded(), config, plan=plan)
        ends.append(by_hand(model, padded()))
    assert ends[1] - 1 < 0.5 * (ends[0] - 1)


def test_the_command_says_it_of_experts_that_a_predictor_chooses(tmp_path, capsys):
    folder = write_family(tmp_path / "model", "qwen3_moe")
    data = write_rows(tmp_path, ROWS)
    options = ("--balance-weight", 0.1, "--steps", 1, "--warm-steps", 2)
    found, err = run(folder, data, tmp_path / "run", capsys, *options)
    assert found["sliced_error"] < 1e-5
    assert f"balance {found['balance']:.3f}" in err
    assert 0.9 < found["balance"] < 4
