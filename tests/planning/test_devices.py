import json
import math
from dataclasses import asdict
from typing import get_args

import mlx.core as mx
import pytest
from conftest import full_disk, write_folder

from ifp_mlx.planning import devices, machine
from ifp_mlx.planning.devices import DEVICES


@pytest.mark.parametrize("device", DEVICES.values(), ids=list(DEVICES))
def test_every_figure_says_where_it_comes_from(device):
    for figure in (device.memory, device.storage, device.compute):
        if figure is None:
            continue
        assert figure.source and figure.kind in get_args(devices.Kind)
        assert figure.kind != "measured"
        if figure.kind == "assumed":  # names a profile that knows better
            relative = DEVICES[figure.source.removeprefix("as ")]
            assert relative.storage.kind != "assumed"
            assert figure.value == relative.storage.value
    assert device.storage is None or 1e9 < device.storage.value < 20e9
    assert 50e9 < device.memory.value < 1e12
    assert 2e12 < device.compute.value < 200e12


@pytest.mark.parametrize("chip", ["m1", "m2", "m3", "m4", "m5"])
def test_larger_chips_of_a_generation_are_faster(chip):
    family = [DEVICES[n] for n in (chip, f"{chip}-pro", f"{chip}-max")]
    for slower, faster in zip(family, family[1:], strict=False):
        assert slower.memory.value < faster.memory.value
        assert slower.compute.value < faster.compute.value


def test_names_are_found_however_they_are_written():
    assert devices.find("M4 Max") is DEVICES["m4-max"]
    assert devices.find("iphone_17_pro").name == "iphone-17-pro"


def test_an_unknown_name_is_told_the_near_ones():
    with pytest.raises(ValueError, match=r"'m4-mux'; use m4-max, .* or here"):
        devices.find("m4-mux")
    with pytest.raises(ValueError, match="'zx81'; use m1, m1-pro"):
        devices.find("zx81")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (', source = "x"', ""),
        ('about = "a"', ""),
        ('about = "a"', "about = 'a'\nname = 'b'"),
        ('kind = "vendor"', 'kind = "vendor", unit = "GB/s"'),
        ('runtime = "r"', ""),  # there is no mlx
        ("load = 1, ", ""),
    ],
)
def test_a_mistake_in_the_table_names_the_device(old, new):
    table = """
        runtimes.r = { prefill = 1, decode = 1, load = 1, layer_seconds = 0, source = "" }
        [devices.zx81]
        about = "a"
        memory = { value = 1e6, kind = "vendor", source = "x" }
        compute = { value = 1e6, kind = "vendor", source = "x" }
        runtime = "r"
    """
    assert devices.read_table(table)["zx81"].storage is None
    with pytest.raises(ValueError, match="Device 'zx81' of the table"):
        devices.read_table(table.replace(old, new))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "TURNS", 1)
    monkeypatch.setattr(machine, "SIDE", 64)
    monkeypatch.setattr(machine, "MEMORY_BYTES", 1 << 20)
    return tmp_path / "cache"


def test_this_machine_is_measured_once_and_remembered(tmp_path, cache, monkeypatch):
    folder = write_folder(tmp_path / "tiny")
    first = machine.here(folder)
    assert first.name == "here" and first.memory.kind == "measured"
    speeds = [first.memory.value, first.compute.value, first.runtime.layer_seconds]
    assert all(0 < speed < math.inf for speed in speeds)
    assert first.storage is None or first.storage.value > 0

    calls = []
    monkeypatch.setattr(
        machine, "measure", lambda folder: calls.append(folder) or first
    )
    assert machine.here(folder) == first and not calls
    assert machine.here(folder, again=True) == first and calls == [folder]
    assert machine.here(None) == first and calls == [folder, None]  # another disk


def test_what_was_measured_counts_where_it_cannot_be_kept(cache):
    with full_disk():
        assert machine.here().memory.value > 0
    assert not any(cache.rglob("*.json"))


def test_no_storage_is_measured_without_weights(tmp_path, cache):
    assert machine.measure(tmp_path).storage is None
    assert machine.measure(None).storage is None


def test_a_damaged_cache_is_named(tmp_path, cache):
    folder = write_folder(tmp_path / "tiny")
    machine.here(folder)
    file = machine.cache_file(folder)
    for text in ("{", "{}", json.dumps({"memory": 1})):
        file.write_text(text)
        with pytest.raises(ValueError, match="is no device profile") as refusal:
            machine.here(folder)
        assert str(file) in str(refusal.value)


def test_a_profile_survives_its_file(tmp_path, cache):
    for device in DEVICES.values():
        assert devices.profile(json.loads(json.dumps(asdict(device)))) == device


def test_the_memory_measurement_leaves_nothing_behind(cache):
    before = mx.get_active_memory()
    machine.measure(None)
    assert mx.get_active_memory() <= before + (1 << 20)
