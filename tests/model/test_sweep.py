import gc
from dataclasses import replace
from functools import partial

import mlx.core as mx
import pytest
from conftest import (
    FAMILIES,
    add_prior,
    families,
    family_units,
    randomised,
    swept,
    thinned,
    write_folder,
    write_quantised,
)
from mlx.utils import tree_flatten

from ifp_mlx import load
from ifp_mlx.model import sweep
from ifp_mlx.model.experts import groups_of
from ifp_mlx.selection import top_k
from ifp_mlx.selection.scores import blend_scores
from ifp_mlx.slicing import reading, stock
from ifp_mlx.slicing.plan import plan_of
from ifp_mlx.slicing.sliced import cut, slice_model
from ifp_mlx.slicing.stock import build
from ifp_mlx.storage.folder import Folder


def assert_same(found, expected):
    """Two models have the same parameters, bit for bit."""
    found, expected = (
        dict(tree_flatten(model.parameters())) for model in (found, expected)
    )
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert weight.dtype == expected[name].dtype
        assert mx.array_equal(weight, expected[name]), name


class Built:
    """A source whose models are built anew, for families that have no folder here."""

    def __init__(self, config):
        self.config = config
        self.skeleton = self.open()
        self.plan = plan_of(self.skeleton, config)
        self.order = reading.order_of(self.skeleton, self.plan)

    def open(self):
        return randomised(build(self.config))

    def fill(self, module, layer, index=None):
        if index is not None:
            cut(module, self.plan.layers[layer], index, self.plan.units)


@pytest.mark.parametrize("family", thinned(family_units(), 3))
def test_a_sweep_equals_everything_in_memory_in_every_family(family):
    source, tokens = Built(families()[family]), [5, 9, 77, 200, 13, 40]
    dense = source.open()
    scores = reading.scores(dense, source.plan, [(tokens,)])
    assert mx.array_equal(sweep.scores(source, [(tokens,)]), scores)
    sizes = [24 + 4 * (layer % 3) for layer in range(len(scores))]
    how = {}
    if source.plan.unit == "expert":
        sizes, how = [6] * len(scores), {"groups": groups_of(source.config)}
    selection = top_k.select(scores, sizes, **how)

    def choose(layer, row, known):
        assert known is None  # of what is compensated alone
        assert mx.array_equal(row, scores[layer])
        return selection.indices[layer]

    compact, cache, *_ = sweep.compact_model(source, tokens, choose)
    slice_model(dense, source.plan, selection)
    assert_same(compact, dense)
    logits = compact(mx.array([tokens]))
    assert mx.array_equal(logits, dense(mx.array([tokens])))
    assert mx.array_equal(logits, compact(mx.array([tokens])))  # no state is left


def in_memory(model, instruction, **options):
    """Select and slice the long way: the whole dense model in memory, not compared."""
    selector = options["selector"]
    tokens = model.instruction_tokens(instruction)
    scores = reading.scores(model.dense(), plan_of(model.dense()), [(tokens,)])
    if selector == "blend":
        scores = blend_scores(scores, model.prior)
    selection = model.select(instruction, **options, scores=scores)
    dense = model.dense()
    slice_model(dense, plan_of(dense), selection)
    return selection, dense


def uncompared(origin):
    return replace(origin, agreement=None, kl=None)


@pytest.mark.parametrize("selector", ["activation", "blend"])
@pytest.mark.parametrize("allocation", ["uniform", "first-layer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_is_selected_and_compacted_in_one_pass(
    family, allocation, selector, tmp_path
):
    model, _ = load(write_folder(tmp_path / "model", family))
    add_prior(model)
    options = {"keep": 0.5, "allocation": allocation, "selector": selector}
    selection, compact, _ = swept(model, "Say hello.", **options)
    expected, dense = in_memory(model, "Say hello.", **options)
    assert selection.mask_id == expected.mask_id
    assert {selection.origin.agreement, selection.origin.kl}.isdisjoint({None})
    assert uncompared(selection.origin) == expected.origin
    assert_same(compact, dense)
    assert compact.args.intermediate_size == (32 if allocation == "uniform" else 64)
    selected = model.select("Say hello.", **options)
    assert selected.mask_id == expected.mask_id
    assert selected.origin == selection.origin
    assert_same(model.compact(selected), compact)


@pytest.mark.parametrize("granularity", [None, 128])
@pytest.mark.parametrize("mode", ["affine", "mixed", "mxfp4"])
def test_a_quantised_folder_is_swept_too(mode, granularity, tmp_path):
    how = {"affine": {}, "mixed": {"mixed": True}}
    source = write_quantised(
        tmp_path / "q", **how.get(mode, {"mode": "mxfp4", "group": 32})
    )
    model, _ = load(source)
    options = {"keep": 0.5, "selector": "activation", "granularity": granularity}
    selection, compact, _ = swept(model, "Say hello.", **options)
    expected, dense = in_memory(model, "Say hello.", **options)
    assert selection.mask_id == expected.mask_id
    assert_same(compact, dense)
    slicing = "requantised" if granularity is None else "whole groups"
    assert model.slicing(selection) == slicing


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_text_of_several_steps_is_read_in_as_many_passes(
    family, tmp_path, monkeypatch
):
    monkeypatch.setattr(stock, "PREFILL_STEP", 20)
    monkeypatch.setattr(reading, "FFN_STEP", 8)
    model, _ = load(write_folder(tmp_path / "model", family))
    text = "A text that is longer than the sliding window, and than a step."
    assert len(reading.steps_of(model.instruction_tokens(text))) > 3
    options = {"keep": 0.5, "selector": "activation"}
    selection, compact, _ = swept(model, text, **options)
    expected, dense = in_memory(model, text, **options)
    assert (
        selection.mask_id == expected.mask_id == model.select(text, **options).mask_id
    )
    assert_same(compact, dense)


def test_steps_change_the_scores_by_no_more_than_rounding(tmp_path, monkeypatch):
    model, _ = load(write_folder(tmp_path / "model", "gemma3_text"))
    tokens = model.instruction_tokens("A text that is longer than the sliding window.")
    whole = sweep.scores(model.source, [(tokens,)])
    monkeypatch.setattr(stock, "PREFILL_STEP", 20)
    monkeypatch.setattr(reading, "FFN_STEP", 8)
    steps = sweep.scores(model.source, [(tokens,)])
    assert not mx.array_equal(steps, whole)  # or it was not tried
    assert mx.allclose(steps, whole, rtol=1e-4)


@pytest.mark.parametrize("selector", ["random", "prior"])
def test_selectors_that_read_no_dense_model_need_no_sweep(
    selector, tmp_path, monkeypatch
):
    model, _ = load(write_folder(tmp_path / "model"))
    add_prior(model)
    monkeypatch.setattr(sweep, "compact_model", None)
    monkeypatch.setattr(sweep, "scores", None)
    options = {"target_size": 24, "selector": selector, "seed": 3}
    selection, compact, _ = swept(model, "Hi", **options)
    assert selection.mask_id == model.select("Hi", **options).mask_id
    assert_same(compact, model.compact(selection))
    everything, whole, _ = swept(model, "Hi", keep=1.0)
    assert everything.origin.selector == "all"
    assert_same(whole, model.dense())


def wide_folder(path, layers=8):
    """Write a model that is nearly all FFN: 8 layers of 3.1 MB beside 1.8 MB."""
    shape = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 2048}
    return write_folder(path, num_hidden_layers=layers, **shape)


def peak_of(action):
    """Return the most bytes that were in use at once above those before, and after."""
    mx.clear_cache()
    gc.collect()  # or what other tests have left goes meanwhile
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    result = action()
    after = mx.get_active_memory() - before
    return mx.get_peak_memory() - before, after, result


def ffn_bytes(model):
    return [
        sum(w.nbytes for _, w in tree_flatten(ffn.parameters()))
        for ffn in plan_of(model).modules(model)
    ]


def test_one_dense_layer_is_in_memory_above_the_compact_model(tmp_path):
    model, _ = load(wide_folder(tmp_path / "wide"))
    layer = max(ffn_bytes(model.dense()))
    options = {"keep": 0.25, "allocation": "uniform", "selector": "activation"}
    swept(model, "Hi", **options)  # what is only made once is not counted
    peak, left, (_, compact) = peak_of(lambda: swept(model, "Hi", **options)[:2])
    size = sum(w.nbytes for _, w in tree_flatten(compact.parameters()))
    # Beside the dense layer: its kept part, and its [T, F] activations.
    tokens = len(model.instruction_tokens("Hi"))
    activations = 8 * tokens * model.channels * 4
    assert left <= 1.05 * size
    assert peak <= size + layer + activations
    assert size + layer + activations < 0.6 * sum(ffn_bytes(model.dense()))


def test_selecting_never_holds_the_dense_model(tmp_path):
    model, _ = load(wide_folder(tmp_path / "wide"))
    total = sum(ffn_bytes(model.dense()))
    options = {"keep": 0.1, "selector": "activation"}
    model.select("Hi", **options)
    peak, left, _ = peak_of(lambda: model.select("Hi", **options))
    assert peak < 0.4 * total and left < 0.01 * total
    held, _, _ = peak_of(lambda: mx.eval(model.dense().parameters()))
    assert held > 0.9 * total  # or nothing was measured


def test_a_bar_sees_every_layer_and_can_stop_the_sweep(tmp_path):
    model, _ = load(write_folder(tmp_path / "model"))
    seen = []

    def progress(layers):
        for layer in layers:
            seen.append(layer)
            yield layer
        seen.append("end")

    swept(model, "Hi", selector="activation", progress=progress)
    assert seen == [0, 1, 2, "end"]
    seen.clear()
    model.select("Hi", selector="activation", progress=progress)
    assert seen == [0, 1, 2, "end"]

    def stopping(layers):
        yield from range(1)
        raise KeyboardInterrupt

    for act in (partial(swept, model), model.select):
        with pytest.raises(KeyboardInterrupt):
            act("Hi", selector="activation", progress=stopping)


def test_an_instruction_without_tokens_is_refused(tmp_path):
    source = Folder(write_folder(tmp_path / "model"))
    with pytest.raises(ValueError, match="has no tokens"):
        sweep.scores(source, [([],)])
