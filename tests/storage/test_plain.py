"""Plain folders of mixtures: the chosen experts are read, and nothing else of them."""

import gc
import os
import shutil

import mlx.core as mx
import numpy as np
import pytest
from conftest import by_turns, family_units, write_family
from damage import change_weights
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from ifp_mlx import Selection
from ifp_mlx.slicing.sliced import Donor, cut, fill_model, slice_model, sliced_names
from ifp_mlx.storage.device import Device
from ifp_mlx.storage.folder import Folder
from ifp_mlx.storage.ranges import OpenFile

EXPERTS = [name for name, unit in family_units().items() if unit == "expert"]
EXACT = Device(latency=1e-12, bandwidth=1.0, sweep=1e-3)  # a gap costs more than a call


@pytest.fixture
def exact(monkeypatch):
    """Read no gap, however small the experts of a test are."""
    monkeypatch.setattr("ifp_mlx.storage.units.CACHED", EXACT)
    monkeypatch.setattr("ifp_mlx.storage.units.device_of", lambda *_: EXACT)


def some(plan, seed, count=None):
    """Return a selection of experts, others in every layer."""
    rng = np.random.default_rng(seed)
    rows = [
        rng.permutation(plan.units)[: count or plan.units // 2] for _ in plan.layers
    ]
    indices = tuple(mx.array(np.sort(row).astype(np.int32)) for row in rows)
    return Selection(indices, None, plan.units, unit="expert")


def compact(folder, selection, beside=None):
    """Return the compact model, and the bytes that were read for its experts."""
    plan, before = folder.plan, folder.reader.bytes_read
    model = folder.open() if beside is None else folder.open_beside(beside[0])
    donors = beside and list(map(Donor, plan.modules(beside[0]), beside[1].indices))
    fills = folder.fill_all(plan.modules(model), selection.indices, donors)
    fill_model(model, plan, fills, selection)
    return model, folder.reader.bytes_read - before


def cut_in_memory(folder, selection):
    model = folder.dense()
    slice_model(model, folder.plan, selection)
    return model


def weights_of(model):
    return tree_flatten(model.parameters(), destination={})


def same_weights(one, other):
    one, other = weights_of(one), weights_of(other)
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert mx.array_equal(one[name].view(mx.uint8), other[name].view(mx.uint8)), (
            name
        )
    return True


def expert_bytes(folder, model):
    found = weights_of(model)
    names = [name for names in sliced_names(model, folder.plan) for name in names]
    return sum(found[name].nbytes for name in names)


def changed(one, other):
    """Return the share of another selection's experts that this one has not."""
    pairs = zip(one.indices, other.indices, strict=True)
    new = sum(np.setdiff1d(np.array(b), np.array(a)).size for a, b in pairs)
    return new / sum(other.sizes)


@pytest.mark.parametrize(("name", "quantised"), by_turns(EXPERTS, 3))
def test_every_type_is_read_expert_by_expert_and_is_as_if_cut_in_memory(
    name, quantised, tmp_path, exact
):
    folder = Folder(write_family(tmp_path / "model", name, quantised=quantised))
    one, other = some(folder.plan, 1), some(folder.plan, 2)
    first, nbytes = compact(folder, one)
    assert same_weights(first, cut_in_memory(folder, one))
    assert nbytes == expert_bytes(folder, first)
    second, nbytes = compact(folder, other, beside=(first, one))
    assert same_weights(second, cut_in_memory(folder, other))
    assert nbytes == round(changed(one, other) * expert_bytes(folder, second))
    assert folder.reader.bytes_wanted == folder.reader.bytes_read


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_family(
        tmp_path_factory.mktemp("m") / "model", "qwen3_moe", quantised=True
    )


@pytest.fixture
def folder(path):
    return Folder(path)


@pytest.mark.parametrize("sizes", [(4, 6), (6, 4), (4, 8), (8, 4), (8, 8)])
def test_a_switch_may_change_how_many_experts_there_are(folder, sizes, exact):
    one, other = (some(folder.plan, n, size) for n, size in enumerate(sizes))
    first, _ = compact(folder, one)
    second, nbytes = compact(folder, other, beside=(first, one))
    assert same_weights(second, cut_in_memory(folder, other))
    assert nbytes == round(changed(one, other) * expert_bytes(folder, second))
    again, nbytes = compact(folder, other, beside=(second, other))
    assert same_weights(again, second) and nbytes == 0


def test_what_lies_between_experts_is_read_over_where_that_costs_less(
    folder, monkeypatch
):
    monkeypatch.setattr("ifp_mlx.storage.units.CACHED", Device(1.0, 1e9, 1e3))
    monkeypatch.setattr("ifp_mlx.storage.units.device_of", lambda *_: Device(1.0, 1e9))
    index = mx.array([0, 3, 4, 7], dtype=mx.int32)
    selection = Selection((index,) * folder.plan.shape[0], None, 8, unit="expert")
    model, nbytes = compact(folder, selection)
    assert same_weights(model, cut_in_memory(folder, selection))
    assert nbytes == 2 * folder.reader.bytes_wanted == 2 * expert_bytes(folder, model)


def test_one_layer_alone_may_be_filled(folder, exact):
    model, expected = folder.open(), folder.dense()
    index = mx.array([1, 2, 6], dtype=mx.int32)
    layer, at = 1, folder.plan.layers[1].path
    folder.fill(folder.plan.modules(model)[layer], layer, index)
    cut(folder.plan.modules(expected)[layer], folder.plan.layers[layer], index, 8)
    found, wanted = weights_of(model), weights_of(expected)
    for name in (name for name in wanted if name.startswith(at)):
        assert mx.array_equal(found[name], wanted[name]), name


def unstacked(folder):
    """Give every expert a tensor of its own, as Hugging Face's files have it."""

    def change(weights):
        for name in [name for name in weights if ".switch_mlp." in name]:
            for number, weight in enumerate(weights.pop(name)):
                weights[name.replace("switch_mlp", f"experts.{number}")] = weight
        return weights

    change_weights(folder, change)
    return folder


def test_experts_that_lie_apart_are_stacked_and_cut_in_memory(tmp_path, exact):
    folder = Folder(unstacked(write_family(tmp_path / "model", "qwen3_moe")))
    one, other = some(folder.plan, 1), some(folder.plan, 2)
    first, nbytes = compact(folder, one)
    assert same_weights(first, cut_in_memory(folder, one))
    found = weights_of(first)
    # Every expert is read for it, and of the router the rows of those that are kept.
    routers = [f"{layer.path}.gate.weight" for layer in folder.plan.layers]
    whole = weights_of(folder.dense())
    stacks = {*sum(sliced_names(folder.skeleton, folder.plan), [])} - {*routers}
    expected = sum(found[name].nbytes for name in routers)
    assert nbytes == expected + sum(whole[name].nbytes for name in stacks)
    second, _ = compact(folder, other, beside=(first, one))
    assert same_weights(second, cut_in_memory(folder, other))


def test_experts_that_mlx_lm_changes_or_renames_while_loading_are_as_it_made_them(
    tmp_path, monkeypatch, exact
):
    path = write_family(tmp_path / "model", "qwen3_moe")
    up, down = "switch_mlp.up_proj", "switch_mlp.down_proj"
    change_weights(path, lambda w: {n.replace(up, "x.up"): v for n, v in w.items()})

    def sanitize(_, weights):
        weights = {name.replace("x.up", up): w for name, w in weights.items()}
        return {n: w * 2 if down in n else w for n, w in weights.items()}

    monkeypatch.setattr("mlx_lm.models.qwen3_moe.Model.sanitize", sanitize)
    folder = Folder(path)
    selection = some(folder.plan, 1)
    model, nbytes = compact(folder, selection)
    assert same_weights(model, cut_in_memory(folder, selection))
    found = weights_of(model)
    doubled = sum(weight.nbytes for name, weight in found.items() if down in name)
    # mlx reads all of them for half of them.
    assert nbytes == expert_bytes(folder, model) + doubled


def test_no_more_of_a_stack_is_in_memory_than_its_chosen_experts(folder):
    selection = some(folder.plan, 1, 2)
    gc.collect()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    model, _ = compact(folder, selection)
    mx.eval(model.parameters())
    held = sum(weight.nbytes for weight in weights_of(model).values())
    assert mx.get_peak_memory() - before <= 1.2 * held


def written_again(file):
    state, content = file.stat(), file.read_bytes()
    file.write_bytes(content)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 1))


def put_in_its_place(file):
    copy = file.with_suffix(".copy")
    shutil.copy2(file, copy)
    copy.replace(file)


def cut_short(file):
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("change", [written_again, put_in_its_place, cut_short])
def test_a_file_that_has_changed_since_it_was_opened_is_refused(change, tmp_path):
    folder = Folder(write_family(tmp_path / "model", "qwen3_moe"))
    one, other = some(folder.plan, 1), some(folder.plan, 2)
    first, _ = compact(folder, one)
    before, model = weights_of(first), folder.open()
    change(folder.path / "model.safetensors")
    donors = list(map(Donor, folder.plan.modules(first), one.indices))
    fills = folder.fill_all(folder.plan.modules(model), other.indices, donors)
    with pytest.raises(
        OSError, match=r"model\.safetensors has changed since .*; open it"
    ):
        fill_model(model, folder.plan, fills, other)
    after = weights_of(first)
    assert all(after[name] is before[name] for name in before)


# The file below


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=9),
    most=st.integers(1, 4),
    offset=st.integers(0, 20),
    short=st.integers(1, 30),
)
def test_buffers_are_filled_one_after_another_however_little_comes_at_a_time(
    tmp_path_factory, sizes, most, offset, short
):
    path = tmp_path_factory.getbasetemp() / "bytes"
    path.write_bytes(bytes(range(200)) * 3)
    file, preadv = OpenFile(path, "do something"), os.preadv

    def little(fd, buffers, at):
        """Read as a system may: some bytes of what was asked for."""
        assert len(buffers) <= most
        return preadv(fd, [buffers[0][:short]], at)

    buffers = [np.zeros(size, np.uint8) for size in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ifp_mlx.storage.ranges.MOST_BUFFERS", most)
        patch.setattr("ifp_mlx.storage.ranges.os.preadv", little)
        assert file.read(file.ranges, buffers, offset) == sum(sizes)
    found = np.concatenate(buffers).tobytes()
    assert found == path.read_bytes()[offset : offset + sum(sizes)]


def test_a_file_that_ends_early_is_said_with_a_remedy(tmp_path):
    path = tmp_path / "bytes"
    path.write_bytes(b"0123456789")
    file = OpenFile(path, "do something")
    with pytest.raises(OSError, match="bytes was cut short while in use; do something"):
        file.read(file.sweeps, [np.zeros(11, np.uint8)], 0)
