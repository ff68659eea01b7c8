import json
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from conftest import FAMILIES, relative_error, tiny_config, tiny_model, write_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ifp_mlx import Selection, load
from ifp_mlx.files.atomic import new_folder
from ifp_mlx.model import checkpoint
from ifp_mlx.selection.config import IFPConfig
from ifp_mlx.selection.predictor import SparsityPredictor
from ifp_mlx.selection.top_k import select
from ifp_mlx.slicing.masked import mask_model, set_masks
from ifp_mlx.slicing.plan import plan_of

TOKENS = mx.array([[5, 9, 77, 200, 13]])
SELECTORS = ["activation", "prior", "blend", "random", "predictor", "mask file"]


def add_predictor(folder, layers=3, channels=64, **ifp):
    mx.random.seed(0)
    config = tiny_config("llama")
    backbone = tiny_model("llama", 7)
    predictor = SparsityPredictor(backbone, layers, channels, 4, config=config)
    predictor.save(folder / "predictor")
    IFPConfig(**ifp).save(folder)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Return an opened checkpoint with a predictor for every family."""
    opened = {}
    for family in FAMILIES:
        folder = write_folder(tmp_path_factory.mktemp("checkpoints") / family, family)
        add_predictor(folder, gates="soft")
        opened[family] = load(folder)[0]
    return opened


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_selector_slices_what_it_masks(
    checkpoints, tmp_path, family, selector, data
):
    model = checkpoints[family]
    allocation = data.draw(st.sampled_from(["uniform", "first-layer"]))
    selection = model.select(
        data.draw(st.text(min_size=1, max_size=20).filter(str.strip)),
        target_size=data.draw(st.integers(32, 63)),
        selector="activation" if selector == "mask file" else selector,
        allocation=allocation,
    )
    assert (selection.gates is not None) == (selector == "predictor")
    if selector == "mask file":
        selection.save(tmp_path / "mask.safetensors")
        selection = Selection.load(tmp_path / "mask.safetensors")
    masked = model.dense()
    set_masks(mask_model(masked, plan_of(masked)), selection.mask())
    error = relative_error(model.compact(selection)(TOKENS), masked(TOKENS))
    assert error <= 1e-5


def test_opening_a_folder_tells_its_shape(tiny_folder):
    model, tokenizer = load(tiny_folder)
    assert (model.layers, model.channels, model.granularity) == (3, 64, 1)
    assert model.name == "tiny" and tokenizer.has_chat_template


def test_layer_0_is_whole_by_default_and_the_calibration_text_has_a_say(tiny_folder):
    selection = load(tiny_folder)[0].select("Say hello.", keep=0.5)
    assert selection.sizes == [64, 16, 16]
    assert selection.origin.selector == "blend"
    assert selection.origin.allocation == "first-layer"
    assert selection.origin.instruction == "Say hello."


def test_a_budget_too_small_for_a_whole_layer_is_spread_evenly(tiny_folder):
    model = load(tiny_folder)[0]
    assert model.select("Hi", target_size=8).sizes == [8, 8, 8]
    with pytest.raises(ValueError, match="are too few for a whole first layer"):
        model.select("Hi", target_size=8, allocation="first-layer")


def test_the_same_instruction_gives_the_same_mask_id_in_another_process(tiny_folder):
    code = (
        "import sys; from ifp_mlx import load; "
        "print(load(sys.argv[1])[0].select('Translate to French.').mask_id)"
    )
    here = load(tiny_folder)[0].select("Translate to French.").mask_id
    run = subprocess.run(
        [sys.executable, "-c", code, tiny_folder], capture_output=True, text=True
    )
    assert run.stdout.strip() == here, run.stderr


def test_other_instructions_give_other_masks(tiny_folder):
    model = load(tiny_folder)[0]
    assert model.select("abc").mask_id != model.select("xyz").mask_id


def test_an_instruction_can_be_text_messages_or_tokens(tiny_folder):
    model, _ = load(tiny_folder)
    user = {"role": "user", "content": "Hello"}
    later = [user, {"role": "assistant", "content": "Hi"}, user]
    masks = {
        model.select("Hello").mask_id,
        model.select([user]).mask_id,
        model.select(later).mask_id,
        model.select(model.instruction_tokens("Hello")).mask_id,
    }
    assert len(masks) == 1


def test_keeping_everything_needs_no_scores_and_changes_nothing(
    tiny_folder, monkeypatch
):
    model, _ = load(tiny_folder)
    monkeypatch.setattr(model, "scores", None)
    selection = model.select("Hello", keep=1.0)
    assert selection.sizes == [64] * 3 and selection.gates is None
    assert selection.origin.selector == "all"
    assert mx.array_equal(model.compact(selection)(TOKENS), model.dense()(TOKENS))


def test_auto_blends_with_the_prior_and_takes_the_predictor_when_there_is_one(
    tiny_folder,
):
    model, _ = load(tiny_folder)
    blended = model.select("Hello")
    assert blended.origin.selector == "blend"
    assert (tiny_folder / "prior.safetensors").exists()  # made, and kept
    again = load(tiny_folder)[0].select("Hello")
    assert again.origin.selector == "blend" and again.mask_id == blended.mask_id
    add_predictor(tiny_folder, target_size=24)
    trained = load(tiny_folder)[0].select("Hello")
    assert trained.origin.selector == "predictor"
    assert trained.sizes == [24] * 3 and trained.gates is None


def test_a_prior_that_cannot_be_kept_still_works(tiny_folder, monkeypatch):

    def read_only(path):
        raise PermissionError(path)

    monkeypatch.setattr(checkpoint, "new_file", read_only)
    model, _ = load(tiny_folder)
    chosen = model.select("Hello", keep=0.5, selector="prior")
    assert chosen.sizes == [64, 16, 16]
    sketch = model.sketch()
    assert [rows.shape[1] for rows in sketch] == [64] * 3
    assert all(a is b for a, b in zip(sketch, model.sketch(), strict=True))
    assert not (tiny_folder / "prior.safetensors").exists()


def test_a_predictor_with_its_own_tokenizer_reads_the_text(tiny_folder):
    from mlx_lm.utils import load_tokenizer

    config = tiny_config("llama", vocab_size=300)
    predictor = SparsityPredictor(
        tiny_model("llama", 7, vocab_size=300), 3, 64, 4, config=config
    )
    with new_folder(tiny_folder / "predictor") as scratch:
        predictor.write(scratch)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            content = (tiny_folder / name).read_text()
            (scratch / name).write_text(content)
    model, _ = load(tiny_folder)
    tokens = model.instruction_tokens("Hello")
    own = load_tokenizer(tiny_folder / "predictor").encode(
        model.tokenizer.decode(tokens)
    )
    scores = predictor(mx.array([own]))[0]
    expected = select(scores, [32] * 3).mask_id
    assert model.select("Hello", target_size=32).mask_id == expected


def test_mistaken_choices_are_named(tiny_folder):
    model, _ = load(tiny_folder)
    for keep in (0, 1.5):
        with pytest.raises(ValueError, match=f"keep={keep} is not a share"):
            model.select("Hi", keep=keep)
    with pytest.raises(ValueError, match="keep=0.5 and target_size=8 say the same"):
        model.select("Hi", keep=0.5, target_size=8)
    with pytest.raises(
        ValueError, match="selector='best' is unknown; choose one of auto"
    ):
        model.select("Hi", selector="best")
    with pytest.raises(ValueError, match="tiny carries no trained predictor"):
        model.select("Hi", selector="predictor")
    with pytest.raises(ValueError, match="is empty; give some text"):
        model.select("  ")


def test_a_quantised_folder_has_whole_groups_and_is_selected_by_them_if_asked(tmp_path):
    import mlx.nn as nn
    from mlx.utils import tree_flatten

    folder = write_folder(
        tmp_path / "q", intermediate_size=128, hidden_size=64, head_dim=16
    )
    quantised = tiny_model("llama", intermediate_size=128, hidden_size=64, head_dim=16)
    nn.quantize(quantised, 32, 4)
    mx.save_safetensors(
        str(folder / "model.safetensors"), dict(tree_flatten(quantised.parameters()))
    )
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] = {"group_size": 32, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    model, _ = load(folder)
    assert model.granularity == 32
    assert model.select("Hi", keep=0.6, allocation="uniform").sizes == [64] * 3
    with pytest.raises(
        ValueError, match="target_size=100 .* 32 channels; use 96 or 128"
    ):
        model.select("Hi", target_size=100)
    assert model.slicing(model.select("Hi", keep=0.75)) == "requantised"
    selection = model.select("Hi", keep=0.75, granularity=32)
    assert model.slicing(selection) == "whole groups"
    masked = model.dense()
    set_masks(mask_model(masked, plan_of(masked)), selection.mask())
    assert relative_error(model.compact(selection)(TOKENS), masked(TOKENS)) <= 1e-5


def test_damaged_parts_of_a_checkpoint_are_named(tiny_folder):
    (tiny_folder / "prior.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="prior.safetensors does not hold scores"):
        load(tiny_folder)[0].select("Hi")
    (tiny_folder / "prior.safetensors").unlink()
    add_predictor(tiny_folder, layers=2)
    with pytest.raises(ValueError, match="scores 2 layers of 64 channels.*has 3 of 64"):
        load(tiny_folder)[0].select("Hi")
    IFPConfig(granularity=5).save(tiny_folder)
    with pytest.raises(ValueError, match="granularity 5, .* divide the 64 channels"):
        load(tiny_folder)
    (tiny_folder / "ifp_config.json").write_text('{"version": 2}')
    with pytest.raises(ValueError, match="version 2 .* update ifp_mlx"):
        load(tiny_folder)
    (tiny_folder / "ifp_config.json").write_text('{"gate": "soft"}')
    with pytest.raises(
        ValueError, match="ifp_config.json is not a valid ifp_mlx config"
    ):
        load(tiny_folder)


def test_a_mask_of_another_model_is_refused(tiny_folder, tmp_path):
    other, _ = load(write_folder(tmp_path / "other", seed=9))
    mask = other.select("Hi")
    with pytest.raises(ValueError, match="another model of the same shape"):
        load(tiny_folder)[0].compact(mask)
    half, _ = load(write_folder(tmp_path / "half", intermediate_size=32))
    with pytest.raises(ValueError, match="is for a model with 3 layers of 32 channels"):
        load(tiny_folder)[0].compact(half.select("Hi"))


def test_a_mask_survives_a_change_of_dtype(tiny_folder, tmp_path):
    mask = load(tiny_folder)[0].select("Hi", keep=0.5)
    weights = mx.load(str(tiny_folder / "model.safetensors"))
    half = {name: w.astype(mx.bfloat16) for name, w in weights.items()}
    mx.save_safetensors(str(tiny_folder / "model.safetensors"), half)
    compact = load(tiny_folder)[0].compact(mask)
    assert compact.layers[1].mlp.up_proj.weight.shape == (16, 32)


def test_compact_leaves_nothing_of_the_dense_ffn_in_memory(tmp_path):
    folder = write_folder(tmp_path / "wide", intermediate_size=8192)
    model, _ = load(folder)
    options = {"allocation": "uniform", "selector": "activation"}
    selection = model.select("Hi", target_size=64, **options)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    compact = model.compact(selection)
    dense_layer = 3 * 8192 * 32 * 4
    assert mx.get_active_memory() - before < dense_layer / 2
    assert mx.get_peak_memory() - before < 2.5 * dense_layer  # of three layers
    assert np.isfinite(np.array(compact(TOKENS))).all()
