"""A memory limit chooses the keep, and a task that comes again is not swept again."""

import gc
import json

import mlx.core as mx
import pytest
from conftest import add_prior, run_command, swept, write_folder
from damage import change_weights
from mlx.utils import tree_flatten

from ifp_mlx import load
from ifp_mlx.generate import main
from ifp_mlx.model import checkpoint
from ifp_mlx.model.card import Card, Point
from ifp_mlx.model.compact_cache import CompactCache, prepare_once
from ifp_mlx.model.decide import decide
from ifp_mlx.model.fit import Limits
from ifp_mlx.model.footprint import Footprint
from ifp_mlx.selection.request import Request
from ifp_mlx.storage.writer import write_store

NOTHING = {"selector": "activation", "compensate": False}


def fit(model, memory, context=32, **options):
    """Decide on a request that has to fit."""
    request = Request(**NOTHING | options, memory_bytes=memory)
    return decide(request, model, limits=Limits(context, memory))


def sweep_once(model, instruction, options, cache):
    """Return selection, compact model, and whether the cache had them."""
    request = Request(instruction=instruction, **options)
    made = prepare_once(model, decide(request, model), cache, iter)
    return made.selection, made.model, made.cache == "hit"


@pytest.fixture
def model(tiny_folder):
    return load(tiny_folder)[0]


@pytest.fixture
def fills(monkeypatch):
    """Every model's first card promises everything of the most that fits."""

    def promised(model, progress, most):
        points = (Point("any", most / model.channels, 1, 1.0, 0.0),)
        return Card("any", "channel", "blend", "", 1, 1.0, "0", points, {})

    monkeypatch.setattr("ifp_mlx.model.decide.first_card", promised)


def weights(model):
    return dict(tree_flatten(model.parameters()))


def assert_same(found, expected):
    found, expected = weights(found), weights(expected)
    assert found.keys() == expected.keys()
    assert all(mx.array_equal(w, expected[name]) for name, w in found.items())


@pytest.mark.parametrize("megabytes", [0.25, 0.27, 0.29])
def test_the_largest_selection_that_fits_is_chosen(model, megabytes, fills):
    memory = round(megabytes * 1e6)
    size = fit(model, memory).size
    selection = model.select("Hello", target_size=size)
    footprint = Footprint.of(model)
    layer = round(max(footprint.layer_bytes) * model.channels)

    def needed(chosen):
        return footprint.total_bytes(chosen, 256) + layer  # caches grow by 256

    assert needed(selection) <= memory
    larger = model.select("Hello", target_size=size + 1)
    assert needed(larger) > memory


def test_what_does_not_fit_is_refused_with_what_would(model):
    with pytest.raises(
        ValueError,
        match=r"10.0 kB of memory are too few.*a dense layer.* 1 channel a layer",
    ):
        fit(model, 10_000)
    with pytest.raises(ValueError, match=r"260 kB are allowed; --keep 0\.\d+ fits"):
        fit(model, 260_000, keep=0.9)
    with pytest.raises(ValueError, match="are allowed"):
        fit(model, 150_000, selector="auto", selection=model.select("Hi", keep=0.9))


def test_what_the_machine_cannot_hold_is_refused_before_loading(
    tiny_folder, capsys, monkeypatch
):
    monkeypatch.setattr("ifp_mlx.model.fit.physical_memory", lambda: 150_000)
    command = ("--model", tiny_folder, "--prompt", "Hello", "--max-tokens", 2)
    status, _, err = run_command(main, capsys, *command, "--keep", 0.9)
    assert status == 2
    assert "150 kB are allowed; --keep 0." in err and "fits" in err
    assert run_command(main, capsys, *command, "--keep", 0.3)[0] == 0


@pytest.mark.parametrize("stored", [False, True])
def test_the_second_time_comes_from_the_cache_with_the_same_bits(
    tiny_folder, tmp_path, stored
):
    folder = write_store(tiny_folder, tmp_path / "store") if stored else tiny_folder
    model, _ = load(folder)
    cache, options = CompactCache(tmp_path / "cache"), NOTHING | {"keep": 0.5}
    selection, compact, hit = sweep_once(model, "Hello", options, cache)
    again, same, hit_again = sweep_once(model, "Hello", options, cache)
    assert (hit, hit_again) == (False, True)
    assert again.mask_id == selection.mask_id
    assert_same(same, compact)
    tokens = mx.array([[1, 2, 3]])
    assert mx.array_equal(same(tokens), compact(tokens))
    other = sweep_once(model, "Something else", options, cache)
    assert not other[2]


@pytest.mark.parametrize("damage", ["cut", "gone", "nonsense"])
def test_a_damaged_entry_is_made_again(model, tmp_path, damage):
    cache, options = CompactCache(tmp_path / "cache"), NOTHING | {"keep": 0.5}
    _, compact, _ = sweep_once(model, "Hello", options, cache)
    (file,) = (tmp_path / "cache").glob("*/channels.safetensors")
    if damage == "gone":
        file.unlink()
    else:
        whole = file.read_bytes()
        file.write_bytes(whole[:1000] if damage == "cut" else bytes(len(whole)))
    _, again, hit = sweep_once(model, "Hello", options, cache)
    assert not hit
    assert_same(again, compact)


def test_what_was_not_used_for_longest_goes_first(model, tmp_path):
    size = 40_000  # an entry has about 25 kB
    cache = CompactCache(tmp_path / "cache", limit_bytes=size)
    options = NOTHING | {"keep": 0.5}
    for text in ("one", "two", "three"):
        sweep_once(model, text, options, cache)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert sweep_once(model, "three", options, cache)[2]


def test_only_what_the_cache_wrote_is_ever_deleted(model, tmp_path):
    folder = tmp_path / "mine"
    for name in ("photos", "0" * 32, "1" * 32):
        (folder / name).mkdir(parents=True)
        (folder / name / "large").write_bytes(bytes(50_000))
    (folder / "notes.txt").write_text("mine")
    (folder / ("1" * 32) / "mask.safetensors").write_text("also mine")
    cache, options = CompactCache(folder, limit_bytes=1), NOTHING | {"keep": 0.5}
    for text in ("one", "two"):
        sweep_once(model, text, options, cache)
    names = {entry.name for entry in folder.iterdir()}
    assert {"photos", "0" * 32, "1" * 32, "notes.txt"} < names and len(names) == 5


def double(folder, tensor):
    """Change one tensor of a folder, and neither its shape nor its final norm."""
    change_weights(folder, lambda weights: weights | {tensor: weights[tensor] * 2})


def test_other_weights_under_the_same_final_norm_are_another_model(
    tiny_folder, tmp_path
):
    cache, options = CompactCache(tmp_path / "cache"), NOTHING | {"keep": 0.5}
    sweep_once(load(tiny_folder)[0], "Hello", options, cache)
    before = load(tiny_folder)[0].fingerprint
    double(tiny_folder, "model.layers.1.mlp.up_proj.weight")
    model, _ = load(tiny_folder)
    assert mx.array_equal(model.fingerprint, before)
    selection, compact, hit = sweep_once(model, "Hello", options, cache)
    assert not hit
    assert_same(compact, model.compact(selection))


def test_another_prior_is_not_answered_from_before(model, tmp_path):
    cache = CompactCache(tmp_path / "cache")
    options = NOTHING | {"keep": 0.5, "selector": "auto"}
    first, _, _ = sweep_once(model, "Hello", options, cache)
    assert first.origin.selector == "blend"
    assert sweep_once(model, "Hello", options, cache)[2]
    for seed in (1, 2):
        add_prior(model, seed)
        opened, _ = load(model.path)
        found, _, hit = sweep_once(opened, "Hello", options, cache)
        assert not hit and found.origin.selector == "blend"
        assert sweep_once(opened, "Hello", options, cache)[2]


def test_spelling_out_what_is_decided_anyway_finds_the_same_entry(model, tmp_path):
    cache = CompactCache(tmp_path / "cache")
    options = NOTHING | {"keep": 0.5}
    sweep_once(model, "Hello", options, cache)
    k = NOTHING | {"target_size": 32, "granularity": 1, "seed": 7}
    assert sweep_once(model, "Hello", k, cache)[2]


def test_a_prior_that_is_not_there_yet_needs_room_to_be_computed_in(tmp_path, fills):
    shape = {"num_hidden_layers": 12, "intermediate_size": 256}
    model, _ = load(write_folder(tmp_path / "deep", **shape))
    # The calibration text in one layer, [512, F] five times, and to be condensed.
    passing = 5 * 512 * 256 * 4 + 41 * 400 * 256 * 2
    asking = [{"selector": "blend"}, {"selector": "random", "compensate": True}]
    for options in asking:
        with pytest.raises(ValueError, match="for a dense layer that is being read"):
            fit(model, passing, **options)
    memory = 15_000_000  # less than that and the model beside it
    smaller = fit(model, memory, selector="prior").size
    add_prior(model)
    opened, _ = load(model.path)
    assert 0 < smaller < fit(opened, memory, selector="prior").size
    for options in asking:
        assert fit(opened, memory, **options).size == 256


def test_a_prior_is_computed_with_one_dense_layer_in_memory(tmp_path, monkeypatch):
    chats = [[{"role": "user", "content": text}] for text in ("Hello.", "How are you?")]
    monkeypatch.setattr(checkpoint, "calibration_chats", lambda: chats)
    shape = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 2048}
    model, _ = load(write_folder(tmp_path / "wide", num_hidden_layers=12, **shape))
    footprint = Footprint.of(model)
    mx.clear_cache()
    gc.collect()  # or what other tests have left goes meanwhile
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model.compute_prior()
    peak = mx.get_peak_memory() - before
    layer = max(footprint.layer_bytes) * model.channels
    assert layer < peak < 0.5 * footprint.dense_bytes


@pytest.mark.parametrize(
    ("tokens", "megabytes", "compensate"),
    [(100, 24, False), (300, 30, False), (100, 40, True), (600, 74, True)],
)
def test_a_sweep_stays_within_the_memory_it_was_given(
    tmp_path, tokens, megabytes, compensate, fills
):
    shape = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 2048}
    shape |= {"num_hidden_layers": 8, "max_position_embeddings": 1024}
    model, _ = load(write_folder(tmp_path / "wide", **shape))
    add_prior(model, sketch=256)
    model, _ = load(model.path)
    instruction, context = [5, 9, 77, 200] * (tokens // 4), tokens + 8
    memory, options = megabytes * 10**6, NOTHING | {"compensate": compensate}
    decision = fit(model, memory, context, instruction=instruction, **options)
    size = decision.size
    assert 0 < size < model.channels
    options["target_size"] = size
    swept(model, instruction, **options)  # what is only made once is not counted
    mx.clear_cache()
    gc.collect()  # or what other tests have left goes meanwhile
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    swept(model, instruction, **options)
    peak = mx.get_peak_memory() - before
    # Far less would mean that channels were left out needlessly.
    assert 0.7 * memory < peak <= memory


def test_generate_fits_into_memory_and_says_where_it_had_the_model_from(
    tiny_folder, tmp_path, capsys
):
    load(tiny_folder)[0].compute_prior()  # for which there would be no room
    said = []
    for _ in range(2):
        status, out, err = run_command(
            main, capsys, "--model", tiny_folder, "--prompt", "Hello", "--memory-gb",
            0.0019, "--cache-folder", tmp_path / "cache", "--max-tokens", 5, "--json",
            "--min-agreement", 0.1,
        )  # fmt: skip
        assert status == 0, err
        said.append(json.loads(out.splitlines()[-1]))
    assert [s["cache"] for s in said] == ["miss", "hit"]
    assert said[0]["text"] == said[1]["text"]
    kept, again = (s["selection"] for s in said)
    assert again.pop("kl") == pytest.approx(kept.pop("kl"), rel=1e-3)
    assert kept == again
    assert 0 < kept["kept_channels"] < 0.75 * kept["total_channels"], (
        "what fits, not auto"
    )
    status, _, err = run_command(
        main, capsys, "--model", tiny_folder, "--prompt", "Hello", "--memory-gb", 1e-5
    )
    assert status == 2 and "of memory are too few" in err and "allow" in err
    for wrong in ("-1", "0"):
        status, _, err = run_command(
            main, capsys, "--model", tiny_folder, "--prompt", "Hi", "--memory-gb", wrong
        )
        assert status == 2 and f"--memory-gb {wrong}" in err
