"""Who gets a token in a mixture, and what it contributes, in every mixture of mlx-lm."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import families, family_units, randomised, relative_error

from ifp_mlx.selection.masks import Selection
from ifp_mlx.slicing.masked import become
from ifp_mlx.slicing.plan import plan_of
from ifp_mlx.slicing.reading import scores
from ifp_mlx.slicing.routing import mass_share, slots_of, tally, watched
from ifp_mlx.slicing.shapes import at
from ifp_mlx.slicing.stock import build

TOKENS = [5, 9, 77, 200, 13, 40]
MIXTURES = [name for name, unit in family_units().items() if unit == "expert"]


def built(name):
    model = randomised(build(families()[name]))
    return model, plan_of(model, families()[name])


def observed(model, module, layer):
    """Return what the block of a layer returned, whole and without its experts, what
    the experts returned, and the routing that was seen.
    """
    above, _, name = layer.experts.rpartition(".")
    owner, found, routings = at(module, above), {}, []
    stock = type(owner)

    def call(self, *args):
        experts = getattr(self, name)

        def remember(*inputs):
            found["experts"] = experts(*inputs)
            return found["experts"]

        for key, answer in (
            ("none", lambda *inputs: 0 * experts(*inputs)),
            ("whole", remember),
        ):
            setattr(self, name, answer)
            found[key] = stock.__call__(self, *args)
        setattr(self, name, experts)
        return found["whole"]

    become(owner, "Observed", lambda _: call)
    with watched(module, layer, lambda *routing: routings.append(routing)):
        model(mx.array([TOKENS]))
    owner.__class__ = stock
    return found, routings[-1]


@pytest.mark.parametrize("name", [n for n in MIXTURES if "latent" not in n])
def test_a_block_is_its_experts_times_the_gate_weights_that_were_seen(name):
    model, plan = built(name)
    found, (chosen, gates, lengths) = observed(
        model, plan.modules(model)[-1], plan.layers[-1]
    )
    D = found["whole"].shape[-1]
    outputs = found["experts"].reshape(*chosen.shape, D)
    signs = mx.array([1.0])
    if name == "gemma4_text, experts":  # random scales of experts may be negative
        scale = plan.modules(model)[-1].router.per_expert_scale
        signs = mx.sign(scale)[chosen]
    rebuilt = found["none"].reshape(-1, D) + (outputs * (signs * gates)[..., None]).sum(
        axis=-2
    )
    assert relative_error(rebuilt, found["whole"].reshape(-1, D)) <= 1e-5
    assert mx.allclose(lengths, mx.linalg.norm(outputs, axis=-1), rtol=1e-5)
    assert slots_of(model, plan) == chosen.shape[-1]


def test_gate_weights_before_a_projection_are_known_up_to_one_factor():
    model, plan = built("nemotron_h, latent")
    module, layer = plan.modules(model)[-1], plan.layers[-1]
    seen = {}

    def see(chosen, gates, lengths):
        seen["gates"] = gates

    stock = type(module.gate)

    def gate(self, *args):
        chosen, weights = stock.__call__(self, *args)
        seen["true"] = weights.reshape(-1, weights.shape[-1])
        return chosen, weights

    become(module.gate, "Seen", lambda _: gate)
    with watched(module, layer, see):
        model(mx.array([TOKENS]))
    ratio = np.array(seen["gates"] / seen["true"])
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-4)


@pytest.mark.parametrize("name", MIXTURES)
def test_reading_leaves_a_mixture_as_it_was(name):
    model, plan = built(name)
    classes = {path: type(m) for path, m in model.named_modules()}
    logits = model(mx.array([TOKENS]))
    found = scores(model, plan, [(TOKENS,)])
    assert found.shape == plan.shape and mx.isfinite(found).all()
    assert (found > 0).sum(axis=-1).min() >= slots_of(model, plan)
    assert {path: type(m) for path, m in model.named_modules()} == classes
    assert mx.array_equal(model(mx.array([TOKENS])), logits)


def test_a_tally_adds_up_what_each_expert_did_for_the_tokens_that_count():
    chosen = mx.array([[0, 2], [2, 1]])
    gates, lengths = mx.array([[0.75, 0.25], [0.5, 0.5]]), mx.array([[2.0, 4], [6, 8]])
    weights = mx.array([[1.0, 1.0], [0.0, 1.0]])
    found = tally(weights, 4, chosen, gates, lengths)
    both = [[1.5, 4, 4, 0], [0.75, 0.5, 0.75, 0], [1, 1, 2, 0]]
    second = [[0, 4, 3, 0], [0, 0.5, 0.5, 0], [0, 1, 1, 0]]
    assert found.tolist() == [both, second]
    kept = Selection((mx.array([1, 2]),), None, 4, unit="expert")
    assert mass_share(found[:1], kept) == 0.625


def test_texts_read_together_score_as_texts_read_one_by_one():
    model, plan = built("qwen3_moe")
    texts = [TOKENS, [3, 4], [250, 1, 2, 7]]
    each = [np.array(scores(model, plan, [(text,)])) ** 2 for text in texts]
    together = np.array(scores(model, plan, [(text,) for text in texts])) ** 2
    np.testing.assert_allclose(together, sum(each), rtol=1e-4, atol=1e-6)
