"""Experts: cut by a mask, written as stock folders, kept in a store, refused in words."""

import json

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from conftest import families, randomised, relative_error, run_command, write_family
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear

from ifp_mlx import Selection, generate, load
from ifp_mlx.compact import main as compact
from ifp_mlx.generate import main as answer
from ifp_mlx.model.decide import decide
from ifp_mlx.model.fit import Limits
from ifp_mlx.selection.request import Request
from ifp_mlx.sensitivity import main as sensitivity
from ifp_mlx.slicing.masked import mask_model, set_masks
from ifp_mlx.slicing.plan import plan_of
from ifp_mlx.slicing.sliced import slice_model
from ifp_mlx.slicing.stock import build
from ifp_mlx.storage.writer import write_folder, write_store

TOKENS = mx.array([[5, 9, 77, 200, 13, 40]])


def masked_logits(model, selection):
    masked = model.dense()
    set_masks(mask_model(masked, model.plan), selection.mask())
    return masked(TOKENS)


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss", "lfm2_moe"])
def test_half_of_the_experts_are_a_stock_folder_of_half_the_bytes(
    name, quantised, tmp_path, capsys
):
    folder = write_family(tmp_path / "model", name, quantised=quantised)
    mask, out = tmp_path / "mask", tmp_path / "out"
    given = ("--model", folder, "--keep", 0.5, "--selector", "random")
    status, said, err = run_command(
        answer, capsys, *given, "--prompt", "Hi", "-m", 3, "--save-mask", mask, "--json"
    )
    assert status == 0, err
    report = json.loads(said.splitlines()[-1])["selection"]
    assert (report["unit"], report["allocation"]) == ("expert", "uniform")
    assert 2 * report["kept_channels"] == report["total_channels"]
    given = ("--model", folder, "--mask-file", mask, "--mlx-path", out)
    status, _, err = run_command(compact, capsys, *given)
    assert status == 0, err
    model, selection = load(folder)[0], Selection.load(mask)
    stock, config = mlx_lm.utils.load_model(out)
    assert relative_error(stock(TOKENS), masked_logits(model, selection)) <= 1e-5
    assert relative_error(stock(TOKENS), model.compact(selection)(TOKENS)) == 0
    said = {key: value for key, value in config.items() if model.config[key] != value}
    assert list(said.values()) == [selection.target_size]
    size = model.footprint.compact_bytes(selection)
    assert size == sum(w.nbytes for _, w in tree_flatten(stock.parameters()))


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("name", ["qwen3_moe", "glm4_moe", "phi3"])
def test_a_store_holds_any_plans_units_and_gives_the_folder_back(
    name, quantised, tmp_path
):
    folder = write_family(tmp_path / "model", name, quantised=quantised)
    plain, _ = load(folder)
    store, _ = load(write_store(folder, tmp_path / "store"))
    tokens, options = [5, 9, 77], {"selector": "random", "allocation": "uniform"}
    first, other = (plain.select(tokens, seed=seed, **options) for seed in (1, 2))
    compact = store.compact(first)
    for selection, model in (
        (first, compact),
        (other, store.compact(other)),
        (other, store.compact(other, beside=(compact, first))),
    ):
        expected = plain.compact(selection)(TOKENS)
        assert mx.array_equal(model(TOKENS), expected)
    assert mx.array_equal(store.dense()(TOKENS), plain.dense()(TOKENS))
    back = write_folder(tmp_path / "store", tmp_path / "back")
    for file in folder.glob("*.safetensors"):
        assert (back / file.name).read_bytes() == file.read_bytes()


def test_groups_of_experts_keep_equally_many(tmp_path):
    model, tokenizer = load(write_family(tmp_path / "m", "deepseek_v3, groups"))
    kept = model.select([5, 9], keep=0.5, selector="random")
    for index in kept.indices:
        assert np.bincount(np.array(index) // 4).tolist() == [2, 2]
    assert (
        relative_error(model.compact(kept)(TOKENS), masked_logits(model, kept)) <= 1e-5
    )
    assert generate(model, tokenizer, "Hi", selection=kept, max_tokens=2) is not None
    index = (mx.arange(4, dtype=mx.int32),) * model.layers
    uneven = Selection(index, None, 8, unit="expert")
    with pytest.raises(ValueError, match=r"keeps \[4, 0\] experts of the 2 groups"):
        model.compact(uneven)
    with pytest.raises(ValueError, match="3 experts a layer are no multiple of the 2"):
        model.select([5, 9], target_size=3, selector="random")


def test_what_cannot_be_had_of_experts_is_refused_with_what_can(tmp_path):
    model, _ = load(write_family(tmp_path / "model", "mixtral"))
    with pytest.raises(ValueError, match="cannot make up for dropped ones"):
        decide(Request(instruction=[5, 9], compensate=True), model)
    with pytest.raises(ValueError, match="with 1 of its 8 experts has too few"):
        model.select([5, 9], target_size=1, selector="random")
    with pytest.raises(
        ValueError, match="'first-layer' gives layers different numbers"
    ):
        model.select([5, 9], selector="random", allocation="first-layer")
    ragged = Selection(
        (mx.arange(4), *(mx.arange(6),) * (model.layers - 1)), None, 8, unit="expert"
    )
    with pytest.raises(ValueError, match="different numbers of experts in its layers"):
        model.compact(ragged)
    channels = Selection((mx.arange(4),) * model.layers, None, 8)
    with pytest.raises(
        ValueError, match="keeps channels, and this model's experts are"
    ):
        model.compact(channels)


@pytest.mark.parametrize("share", [0.6, 0.8, 1.2])
def test_a_memory_limit_keeps_as_many_experts_as_the_router_can_sort(share, tmp_path):
    model, _ = load(write_family(tmp_path / "m", "deepseek_v3, groups"))
    core, dense = model.footprint.core_bytes, model.footprint.dense_bytes
    memory = int(core + share * (dense - core)) + model.footprint.kv_bytes(100)
    request = Request(instruction=[5, 9], selector="random", memory_bytes=memory)
    decision = decide(request, model, limits=Limits(100, memory))
    made = model.prepare(decision)
    assert made.selection.sizes == decision.sizes
    assert decision.size % 2 == 0 and (decision.size == 8) == (share > 1)
    assert mx.isfinite(made.model(TOKENS)).all()


def test_all_experts_are_kept_without_choosing(tmp_path):
    model, _ = load(write_family(tmp_path / "model", "qwen3_moe"))
    kept = model.select([5, 9], keep=1.0)
    assert kept.origin.selector == "all"
    assert mx.array_equal(model.compact(kept)(TOKENS), model.dense()(TOKENS))


def test_a_model_switched_from_another_says_its_own_number_of_units(tmp_path):
    for name, key in (("qwen3_moe", "num_experts"), ("llama", "intermediate_size")):
        folder = write_family(tmp_path / name, name)
        store, _ = load(write_store(folder, tmp_path / f"{name}_store"))
        options = {"selector": "random", "allocation": "uniform"}
        small, large = (store.select([5], keep=k, **options) for k in (0.5, 0.75))
        first = store.compact(small)
        second = store.compact(large, beside=(first, small))
        assert getattr(first.args, key) == small.target_size
        assert getattr(second.args, key) == large.target_size


def test_there_is_nothing_to_allocate_among_layers_of_experts(tmp_path, capsys):
    folder = write_family(tmp_path / "model", "qwen3_moe")
    status, _, err = run_command(sensitivity, capsys, "--model", folder)
    assert status == 2 and "keep equally many experts" in err, err


def test_dense_layers_beside_experts_stay_whole(tmp_path):
    config = families()["qwen3_moe"]
    model, _ = load(write_family(tmp_path / "model", "qwen3_moe"))
    assert model.layers < config["num_hidden_layers"]
    compact = model.compact(model.select([5, 9], keep=0.5, selector="random"))
    before, after = (
        {n: w.shape for n, w in tree_flatten(m.parameters())}
        for m in (model.dense(), compact)
    )
    changed = {name for name in before if before[name] != after[name]}
    assert changed and all(
        name.startswith(tuple(f"{layer.path}." for layer in model.plan.layers))
        for name in changed
    )


def test_a_scale_of_each_expert_goes_with_its_expert():
    """The arrays alone: products with such a scale run on a GPU only."""
    config = families()["qwen3_moe"]
    model = randomised(build(config))
    for module in model.modules():
        for name, part in module.children().items():
            if isinstance(part, SwitchLinear):
                how = {"group_size": 16, "bits": 4, "mode": "nvfp4"}
                module[name] = part.to_quantized(**how, global_scale=True)
    plan, kept = plan_of(build(config), config), mx.array([0, 3, 5, 7], dtype=mx.int32)
    before = dict(tree_flatten(model.parameters()))
    slice_model(
        model, plan, Selection((kept,) * len(plan.layers), None, 8, unit="expert")
    )
    after = dict(tree_flatten(model.parameters()))
    scales = [name for name in after if name.endswith("global_scale")]
    assert len(scales) == 3 * len(plan.layers)
    for name in scales:
        assert mx.array_equal(after[name], before[name][kept]), name


def test_a_memory_limit_leaves_no_fewer_experts_than_the_router_needs(tmp_path):
    model, _ = load(write_family(tmp_path / "m", "deepseek_v3, groups"))
    request = Request(selector="random", instruction="Hi")
    room = Limits(100, model.footprint.total_bytes([5] * model.layers, 100))
    assert decide(request, model, limits=room).sizes == [4] * model.layers
    tight = Limits(100, model.footprint.total_bytes([3] * model.layers, 100))
    with pytest.raises(ValueError, match="are too few.* for 4 experts a layer"):
        decide(request, model, limits=tight)
