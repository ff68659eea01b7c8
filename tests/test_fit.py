"""A memory limit chooses the keep, and a task that comes again is not swept again."""

import json

import mlx.core as mx
import pytest
from conftest import run_command
from mlx.utils import tree_flatten

from ifp_mlx import load
from ifp_mlx.channel_store.writer import write_store
from ifp_mlx.compact_cache import CompactCache
from ifp_mlx.fit import fit, sweep_once
from ifp_mlx.footprint import Footprint
from ifp_mlx.generate import main

NOTHING = {"keep": None, "target_size": None, "selector": "activation"}
NOTHING |= {"allocation": None, "granularity": None, "seed": 0}


@pytest.fixture
def model(tiny_folder):
    return load(tiny_folder)[0]


def weights(model):
    return dict(tree_flatten(model.parameters()))


def assert_same(found, expected):
    found, expected = weights(found), weights(expected)
    assert found.keys() == expected.keys()
    assert all(mx.array_equal(w, expected[name]) for name, w in found.items())


@pytest.mark.parametrize("megabytes", [0.16, 0.18, 0.2])
def test_the_largest_selection_that_fits_is_chosen(model, megabytes):
    memory, options = round(megabytes * 1e6), dict(NOTHING)
    fit(model, options, None, memory, context=32)
    selection = model.select("Hello", **options)
    footprint = Footprint.of(model)
    layer = round(max(footprint.layer_bytes) * model.channels)

    def needed(chosen):
        return footprint.total_bytes(chosen, 32) + layer

    assert needed(selection) <= memory
    larger = model.select("Hello", target_size=options["target_size"] + 1)
    assert needed(larger) > memory


def test_what_does_not_fit_is_refused_with_what_would(model):
    with pytest.raises(
        ValueError, match=r"10.0 kB of memory are too few.*a dense layer"
    ):
        fit(model, dict(NOTHING), None, 10_000, context=32)
    with pytest.raises(ValueError, match=r"170 kB are allowed; --keep 0\.\d+ fits"):
        fit(model, NOTHING | {"keep": 0.9}, None, 170_000, context=32)
    with pytest.raises(ValueError, match="are allowed"):
        fit(model, dict(NOTHING), model.select("Hi", keep=0.9), 150_000, context=32)


def test_what_the_machine_cannot_hold_is_refused_before_loading(
    tiny_folder, capsys, monkeypatch
):
    monkeypatch.setattr("ifp_mlx.fit.physical_memory", lambda: 150_000)
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
    selection, compact, hit = sweep_once(model, "Hello", options, cache, iter)
    again, same, hit_again = sweep_once(model, "Hello", options, cache, iter)
    assert (hit, hit_again) == (False, True)
    assert again.mask_id == selection.mask_id
    assert_same(same, compact)
    tokens = mx.array([[1, 2, 3]])
    assert mx.array_equal(same(tokens), compact(tokens))
    other = sweep_once(model, "Something else", options, cache, iter)
    assert not other[2]


@pytest.mark.parametrize("damage", ["cut", "gone", "nonsense"])
def test_a_damaged_entry_is_made_again(model, tmp_path, damage):
    cache, options = CompactCache(tmp_path / "cache"), NOTHING | {"keep": 0.5}
    _, compact, _ = sweep_once(model, "Hello", options, cache, iter)
    (file,) = (tmp_path / "cache").glob("*/channels.safetensors")
    if damage == "gone":
        file.unlink()
    else:
        whole = file.read_bytes()
        file.write_bytes(whole[:1000] if damage == "cut" else bytes(len(whole)))
    _, again, hit = sweep_once(model, "Hello", options, cache, iter)
    assert not hit
    assert_same(again, compact)


def test_what_was_not_used_for_longest_goes_first(model, tmp_path):
    size = 40_000  # an entry has about 25 kB
    cache = CompactCache(tmp_path / "cache", limit_bytes=size)
    options = NOTHING | {"keep": 0.5}
    for text in ("one", "two", "three"):
        sweep_once(model, text, options, cache, iter)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert sweep_once(model, "three", options, cache, iter)[2]


def test_generate_fits_into_memory_and_says_where_it_had_the_model_from(
    tiny_folder, tmp_path, capsys
):
    said = []
    for _ in range(2):
        status, out, err = run_command(
            main, capsys, "--model", tiny_folder, "--prompt", "Hello", "--memory-gb",
            0.00018, "--cache-folder", tmp_path / "cache", "--max-tokens", 5, "--json",
        )  # fmt: skip
        assert status == 0, err
        said.append(json.loads(out.splitlines()[-1]))
    assert [s["cache"] for s in said] == ["miss", "hit"]
    assert said[0]["text"] == said[1]["text"]
    kept = said[0]["selection"]
    assert kept == said[1]["selection"]
    assert 0 < kept["kept_channels"] < kept["total_channels"]
    status, _, err = run_command(
        main, capsys, "--model", tiny_folder, "--prompt", "Hello", "--memory-gb", 1e-5
    )
    assert status == 2 and "of memory are too few" in err and "allow" in err
    for wrong in ("-1", "0"):
        status, _, err = run_command(
            main, capsys, "--model", tiny_folder, "--prompt", "Hi", "--memory-gb", wrong
        )
        assert status == 2 and f"--memory-gb {wrong}" in err
