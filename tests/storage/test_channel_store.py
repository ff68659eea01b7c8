"""Channel stores: the same model, of which a few channels can be read alone."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import (
    FAMILIES,
    run_command,
    tiny_config,
    tiny_model,
    write_family,
    write_folder,
    write_tokenizer,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from ifp_mlx import load
from ifp_mlx.channel_store import main
from ifp_mlx.convert import from_pytorch
from ifp_mlx.generate import main as generate_main
from ifp_mlx.selection.masks import Selection
from ifp_mlx.selection.top_k import select
from ifp_mlx.slicing.plan import plan_of
from ifp_mlx.storage import writer
from ifp_mlx.storage.device import Device, Range, device_of, pieces, plan
from ifp_mlx.storage.folder import source_of
from ifp_mlx.storage.layout import CHANNEL_FILE, START, read_layout
from ifp_mlx.storage.writer import write_folder as write_plain
from ifp_mlx.storage.writer import write_store

TOKENS = mx.array([[1, 5, 9, 200, 3]])
QUANTISED = [(4, 32, "affine"), (3, 64, "affine"), (4, 32, "mxfp4"), (8, 32, "mxfp8")]


def write_quantised(folder, bits=4, group=32, mode="affine", **changes):
    """Write a tiny llama in which every linear layer is quantised."""
    from mlx_lm.utils import quantize_model, save_config, save_model

    changes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16} | changes
    model = tiny_model("llama", **changes)
    config = tiny_config("llama", **changes)
    model, config = quantize_model(model, config, group, bits, mode)
    folder.mkdir(parents=True)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    write_tokenizer(folder)
    return folder


def same_weights(one, other):
    one, other = (tree_flatten(m.parameters(), destination={}) for m in (one, other))
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert mx.array_equal(one[name].view(mx.uint8), other[name].view(mx.uint8))
    return True


def files_of(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def random_uses(channels, layers=3, seed=0):
    return np.random.default_rng(seed).random((2, layers, channels))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A plain folder and its store, opened."""
    root = tmp_path_factory.mktemp("pair")
    folder = write_folder(root / "plain")
    write_store(folder, root / "store", uses=random_uses(64))
    return load(folder)[0], load(root / "store")[0]


@pytest.fixture(scope="module")
def quantised_pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("quantised")
    folder = write_quantised(root / "plain")
    write_store(folder, root / "store", uses=random_uses(128))
    return load(folder)[0], load(root / "store")[0]


# Round trips


@pytest.mark.parametrize("family", FAMILIES)
def test_a_store_holds_the_same_model_and_gives_the_folder_back(tmp_path, family):
    folder = write_folder(tmp_path / "plain", family)
    store = write_store(folder, tmp_path / "store", uses=random_uses(64))
    assert same_weights(source_of(store).dense(), source_of(folder).dense())
    assert mx.array_equal(
        source_of(store).dense()(TOKENS), source_of(folder).dense()(TOKENS)
    )
    assert files_of(write_plain(store, tmp_path / "back")) == files_of(folder)


@pytest.mark.parametrize(("bits", "group", "mode"), QUANTISED)
def test_quantised_models_are_stored_by_whole_groups(tmp_path, bits, group, mode):
    folder = write_quantised(tmp_path / "plain", bits, group, mode)
    store = write_store(folder, tmp_path / "store", uses=random_uses(128))
    assert read_layout(store / CHANNEL_FILE).unit == group
    assert same_weights(source_of(store).dense(), source_of(folder).dense())
    assert files_of(write_plain(store, tmp_path / "back")) == files_of(folder)


def test_biases_half_precision_and_many_files_survive(tmp_path):
    folder = write_folder(tmp_path / "plain", mlp_bias=True)
    model = source_of(folder).dense()
    weights = tree_flatten(model.parameters(), destination={})
    weights = {name: w.astype(mx.bfloat16) for name, w in weights.items()}
    mx.eval(weights)
    names = sorted(weights)
    (folder / "model.safetensors").unlink()
    for number in range(3):  # the last of them holds FFN tensors alone
        last = [n for n in names if "mlp.up_proj" in n]
        rest = [n for n in names if n not in last]
        part = last if number == 2 else rest[number::2]
        file = folder / f"model-0000{number + 1}-of-00003.safetensors"
        mx.save_safetensors(str(file), {n: weights[n] for n in part}, {"format": "mlx"})
    (folder / "predictor").mkdir()
    (folder / "predictor" / "head.safetensors").write_bytes(b"anything")
    store = write_store(folder, tmp_path / "store", granularity=8)
    assert "model.layers.0.mlp.down_proj.bias" in mx.load(
        str(store / "model-00001-of-00003.safetensors")
    ) | mx.load(str(store / "model-00002-of-00003.safetensors"))
    assert same_weights(source_of(store).dense(), source_of(folder).dense())
    assert files_of(write_plain(store, tmp_path / "back")) == files_of(folder)


def test_a_store_takes_the_place_of_its_folder(pair):
    plain, store = pair
    selection = plain.select("Translate", keep=0.5, selector="activation")
    assert store.select("Translate", keep=0.5, selector="activation").mask_id == (
        selection.mask_id
    )
    assert same_weights(store.compact(selection), plain.compact(selection))
    assert source_of(store.path).config == source_of(plain.path).config


# Reading


def subset(draw, channels, unit):
    units = draw(
        st.lists(
            st.sets(st.integers(0, channels // unit - 1), min_size=1),
            min_size=3,
            max_size=3,
        )
    )
    rows = [np.array(sorted(row))[:, None] * unit + np.arange(unit) for row in units]
    return Selection(
        tuple(mx.array(r.ravel().astype(np.int32)) for r in rows), None, channels
    )


@given(data=st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_channels_are_read_as_the_folder_has_them(pair, data):
    plain, store = pair
    selection = subset(data.draw, 64, 1)
    assert same_weights(store.compact(selection), plain.compact(selection))


@given(data=st.data())
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_groups_are_read_as_the_folder_has_them(quantised_pair, data):
    plain, store = quantised_pair
    selection = subset(data.draw, 128, 32)
    assert same_weights(store.compact(selection), plain.compact(selection))


def test_a_selection_finer_than_the_store_is_cut_after_reading(tmp_path, pair):
    plain, _ = pair
    store, _ = load(write_store(plain.path, tmp_path / "store", granularity=16))
    assert store.granularity == 16
    scores = mx.array(np.random.default_rng(1).random((3, 64)))
    selection = select(scores, [20, 7, 64])
    assert same_weights(store.compact(selection), plain.compact(selection))


def test_a_selection_that_cuts_groups_is_quantised_again_as_in_a_folder(
    quantised_pair,
):
    plain, store = quantised_pair
    scores = mx.array(np.random.default_rng(1).random((3, 128)))
    selection = select(scores, [64, 32, 128])
    assert same_weights(store.compact(selection), plain.compact(selection))


def test_gates_are_folded_in_alike(pair):
    plain, store = pair
    scores = mx.array(np.random.default_rng(2).normal(size=(3, 64)))
    selection = select(scores, [16] * 3, gates="soft")
    assert same_weights(store.compact(selection), plain.compact(selection))


def test_grouped_channels_are_read_and_nothing_else(tmp_path):
    changes = {"intermediate_size": 4096, "num_hidden_layers": 2, "hidden_size": 64}
    folder = write_folder(tmp_path / "plain", **changes)
    store, _ = load(write_store(folder, tmp_path / "store", granularity=512))
    rows = [np.r_[0:512, 2048:3072], np.r_[1024:1536]]
    selection = Selection(tuple(mx.array(r.astype(np.int32)) for r in rows), None, 4096)
    store.compact(selection)
    reader = store.source.reader
    assert reader.bytes_wanted == 2048 * 3 * 64 * 4
    assert reader.bytes_read <= 1.1 * reader.bytes_wanted


# Refusals


@pytest.fixture(scope="module")
def small_store(tmp_path_factory):
    root = tmp_path_factory.mktemp("small")
    folder = write_folder(root / "plain", intermediate_size=16)
    return write_store(folder, root / "store", uses=random_uses(16))


@pytest.fixture
def copied(small_store, tmp_path):
    return shutil.copytree(small_store, tmp_path / "copy")


def read_all(folder):
    model, _ = load(folder)
    model.dense()


@given(
    place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), header=st.booleans()
)
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_flipped_bit_is_found(small_store, tmp_path, place, bit, header):
    file = small_store / CHANNEL_FILE
    whole = file.read_bytes()
    start = read_layout(file).data_offset
    at = int(place * (start if header else len(whole) - start))
    at += 0 if header else start
    broken = bytearray(whole)
    broken[at] ^= 1 << bit
    copy = tmp_path / "copy"
    if not copy.exists():
        shutil.copytree(small_store, copy)
    (copy / CHANNEL_FILE).write_bytes(broken)
    if header:  # before any record is read
        with pytest.raises(ValueError, match=CHANNEL_FILE):
            load(copy)
    else:
        model, _ = load(copy)
        with pytest.raises(ValueError, match=r"record of channel \d+ in layer \d"):
            model.dense()


def test_damage_elsewhere_does_not_hinder_reading_what_is_whole(copied):
    file = copied / CHANNEL_FILE
    layout = read_layout(file)
    last = int(layout.order[2, -1])
    whole = bytearray(file.read_bytes())
    whole[-1] ^= 1
    file.write_bytes(whole)
    model, _ = load(copied)
    keep = [c for c in range(16) if c != last]
    every = mx.array(np.array(keep, np.int32))
    # One at a time, so that the damaged record lies in no gap that is read over.
    model.compact(Selection((every, every, every[:1]), None, 16))
    with pytest.raises(ValueError, match=f"channel {last} in layer 2"):
        model.compact(Selection((every, every, mx.arange(16)), None, 16))


@given(share=st.floats(0, 1, exclude_max=True))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_cut_short_is_refused(small_store, tmp_path, share):
    copy = tmp_path / "copy"
    if not copy.exists():
        shutil.copytree(small_store, copy)
    whole = (small_store / CHANNEL_FILE).read_bytes()
    (copy / CHANNEL_FILE).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=f"{CHANNEL_FILE} (has|is)"):
        load(copy)


def test_a_file_with_something_after_its_end_is_refused(copied):
    with (copied / CHANNEL_FILE).open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="but its header says"):
        load(copied)


def test_another_version_is_refused(copied):
    file = copied / CHANNEL_FILE
    whole = bytearray(file.read_bytes())
    whole[8] = 9
    file.write_bytes(whole)
    with pytest.raises(ValueError, match=r"has version 9, and this ifp_mlx reads vers"):
        load(copied)


def test_a_header_that_asks_for_more_than_there_is_is_refused(copied):
    file = copied / CHANNEL_FILE
    whole = bytearray(file.read_bytes())
    magic, version, _, digest = START.unpack(whole[: START.size])
    whole[: START.size] = START.pack(magic, version, 1 << 62, digest)
    file.write_bytes(whole)
    with pytest.raises(ValueError, match="header fails its checksum"):
        load(copied)


def test_another_models_channels_are_refused(small_store, copied, tmp_path):
    folder = write_folder(tmp_path / "other", seed=1, intermediate_size=16)
    other = write_store(folder, tmp_path / "other-store")
    shutil.copyfile(other / CHANNEL_FILE, copied / CHANNEL_FILE)
    with pytest.raises(ValueError, match="was made for another model"):
        load(copied)


def test_weights_in_both_places_are_refused(small_store, copied, tmp_path):
    folder = write_folder(tmp_path / "plain", intermediate_size=16)
    shutil.copyfile(folder / "model.safetensors", copied / "model.safetensors")
    with pytest.raises(ValueError, match=r"is in both .* and .*channels\.bin"):
        load(copied)


def test_a_config_of_another_shape_is_refused(copied):
    config = json.loads((copied / "config.json").read_text())
    config["intermediate_size"] = 32
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"proj.weight in .*channels\.bin has shape"):
        load(copied)


def test_a_file_cut_short_while_in_use_is_said(copied):
    model, _ = load(copied)
    os.truncate(copied / CHANNEL_FILE, model.source.reader.layout.data_offset)
    with pytest.raises(OSError, match="was cut short while in use"):
        model.dense()


def test_an_error_in_the_middle_leaves_a_layer_as_it_was(copied):
    file = copied / CHANNEL_FILE
    layout = read_layout(file)
    whole = bytearray(file.read_bytes())
    whole[layout.layer_offsets[1]] ^= 1
    file.write_bytes(whole)
    model, _ = load(copied)
    stock = model.source.open()
    ffn = plan_of(stock).modules(stock)[1]
    model.source.fill(ffn, 0, mx.arange(4))
    before = dict(tree_flatten(ffn.parameters()))
    with pytest.raises(ValueError, match="fails its checksum"):
        model.source.fill(ffn, 1)
    after = dict(tree_flatten(ffn.parameters()))
    assert all(after[name] is before[name] for name in before)


# Writing


def test_what_cannot_be_stored_is_refused(tmp_path, small_store, tiny_folder):
    with pytest.raises(FileExistsError, match="store already exists"):
        write_store(tiny_folder, small_store)
    with pytest.raises(ValueError, match="is a channel store already"):
        write_store(small_store, tmp_path / "out")
    with pytest.raises(ValueError, match="granularity=7 does not divide the 64"):
        write_store(tiny_folder, tmp_path / "out", granularity=7)
    with pytest.raises(ValueError, match="is a plain folder already"):
        write_plain(tiny_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layer", range(4))
def test_a_failure_while_writing_leaves_nothing(tmp_path, tiny_folder, layer):
    def fail_at(items):
        for number, item in enumerate(items):
            if number == layer:
                raise KeyboardInterrupt
            yield item
        raise KeyboardInterrupt  # after the last

    with pytest.raises(KeyboardInterrupt):
        write_store(tiny_folder, tmp_path / "out", progress=fail_at)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


KILLED = """
import os, signal, sys
from ifp_mlx.storage import writer
count = int(sys.argv[3])
def kill_at(items):
    for number, item in enumerate(items):
        if number == count:
            os.kill(os.getpid(), signal.SIGKILL)
        yield item
    os.kill(os.getpid(), signal.SIGKILL)
writer.write_store(sys.argv[1], sys.argv[2], progress=kill_at)
"""


def test_a_killed_conversion_leaves_no_store_and_does_not_hinder_the_next(
    tmp_path, tiny_folder
):
    out = tmp_path / "out"
    root = Path(writer.__file__).parents[2]
    command = [sys.executable, "-c", KILLED, tiny_folder, out, "3"]  # in the last part
    done = subprocess.run(command, cwd=root, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    write_store(tiny_folder, out)
    assert same_weights(source_of(out).dense(), source_of(tiny_folder).dense())


# The commands


def test_the_command_makes_a_store_and_a_folder_again(tmp_path, tiny_folder, capsys):
    model, _ = load(tiny_folder)
    (tiny_folder / "tasks").mkdir()
    for text in ("Translate", "Write code", "Add numbers"):
        task = model.select(text, keep=0.5, selector="activation")
        task.save(tiny_folder / "tasks" / f"{text}.safetensors")
    store, back = tmp_path / "store", tmp_path / "back"
    command = ("--model", tiny_folder, "--output", store, "--json")
    status, out, _ = run_command(main, capsys, *command)
    assert (status, json.loads(out)["order"]) == (0, "3 masks")
    always = np.array(task.mask())[1] > 0
    for text in ("Translate", "Write code"):
        mask = Selection.load(store / "tasks" / f"{text}.safetensors").mask()
        always &= np.array(mask)[1] > 0
    first = read_layout(store / CHANNEL_FILE).order[1][: always.sum()]
    assert set(first.tolist()) == set(np.flatnonzero(always).tolist())
    command = ("--model", store, "--output", back, "--to-folder")
    assert run_command(main, capsys, *command)[:2] == (0, f"{back}\n")
    assert files_of(back) == files_of(tiny_folder)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--granularity", "7"], "granularity=7 does not divide the 64 channels"),
        (["--granularity", "0"], "granularity=0 does not divide the 64 channels"),
        (["--order-from", "nowhere"], "There is no mask file nowhere."),
        (["--to-folder"], "is a plain folder already"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, tiny_folder, capsys, options, sentence):
    command = ("--model", tiny_folder, "--output", tmp_path / "out", *options)
    status, out, err = run_command(main, capsys, *command)
    assert (status, out) == (2, "")
    assert sentence in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_store_is_ordered_by_the_prior_when_there_are_no_tasks(
    tmp_path, tiny_folder, capsys
):
    command = ("--model", tiny_folder, "--output", tmp_path / "a", "--json")
    _, out, _ = run_command(main, capsys, *command)
    assert json.loads(out)["order"] == "none"
    prior = np.random.default_rng(0).random((3, 64)).astype(np.float32)
    file = str(tiny_folder / "prior.safetensors")
    mx.save_safetensors(file, {"scores": mx.array(prior)})
    command = ("--model", tiny_folder, "--output", tmp_path / "b", "--json")
    _, out, _ = run_command(main, capsys, *command, "--order-from", "prior")
    assert json.loads(out)["order"] == "prior"
    order = read_layout(tmp_path / "b" / CHANNEL_FILE).order
    assert (np.diff(np.take_along_axis(prior, order.astype(int), axis=1)) <= 0).all()


def test_a_conversion_can_end_in_a_store(tmp_path, tiny_folder, capsys):
    arguments = ["--hf-path", str(tiny_folder), "--mlx-path", str(tmp_path / "out")]
    from_pytorch.main([*arguments, "--channel-store"])
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    assert (tmp_path / "out" / CHANNEL_FILE).exists()
    assert not (tmp_path / "out" / "plain").exists()
    assert same_weights(
        source_of(tmp_path / "out").dense(), source_of(tiny_folder).dense()
    )


def test_generating_from_a_store_says_the_same(pair, capsys):
    answers = []
    for model in pair:
        command = ("--model", model.path, "--prompt", "Hi", "--max-tokens", "8")
        status, out, _ = run_command(generate_main, capsys, *command)
        assert status == 0
        answers.append(out)
    assert answers[0] == answers[1]


# From one selection to the next


@given(data=st.data())
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_switching_is_the_same_as_loading_afresh(pair, quantised_pair, data):
    for (_, store), channels, unit in ((pair, 64, 1), (quantised_pair, 128, 32)):
        selection = subset(data.draw, channels, unit)
        model = store.compact(selection)
        for _ in range(3):
            following = subset(data.draw, channels, unit)
            model = store.compact(following, beside=(model, selection))
            selection = following
        assert same_weights(model, store.compact(selection))


def test_only_channels_that_change_are_read(tmp_path):
    changes = {"intermediate_size": 4096, "num_hidden_layers": 2, "hidden_size": 64}
    folder = write_folder(tmp_path / "plain", **changes)
    store, _ = load(write_store(folder, tmp_path / "store", granularity=512))
    one, other = (
        Selection((mx.array(np.array(row, np.int32)),) * 2, None, 4096)
        for row in (np.arange(2048), np.arange(512, 2560))
    )
    first = store.compact(one)
    before = store.source.reader.bytes_read
    second = store.compact(other, beside=(first, one))
    assert store.source.reader.bytes_read - before == 2 * 512 * 3 * 64 * 4
    core = tree_flatten(first.model.embed_tokens.parameters())
    assert core[0][1] is second.model.embed_tokens.weight
    assert same_weights(second, store.compact(other))


@pytest.fixture(scope="module")
def expert_store(tmp_path_factory):
    root = tmp_path_factory.mktemp("experts")
    folder = write_family(root / "plain", "qwen3_moe", quantised=True)
    return write_store(folder, root / "store", uses=random_uses(8))


def experts(*rows):
    indices = tuple(mx.array(np.array(row, np.int32)) for row in rows)
    return Selection(indices, None, 8, unit="expert")


@pytest.fixture
def no_gaps(monkeypatch):
    """Read over no gap, however small the records of a test are."""
    exact = Device(latency=1e-12, bandwidth=1.0, sweep=1e-3)
    monkeypatch.setattr("ifp_mlx.storage.units.CACHED", exact)
    monkeypatch.setattr("ifp_mlx.storage.units.device_of", lambda *_: exact)


def test_only_experts_that_change_are_read(expert_store, no_gaps):
    store, _ = load(expert_store)
    one = experts([0, 2, 4, 6], [1, 3, 5, 7], [0, 1, 2, 3])
    other = experts([0, 2, 3, 4], [1, 3, 5, 7], [0, 1, 2, 3])
    reader = store.source.reader
    first = store.compact(one)
    assert reader.bytes_read == 4 * sum(reader.layout.record_bytes)
    before = reader.bytes_read
    second = store.compact(other, beside=(first, one))
    assert reader.bytes_read - before == reader.layout.record_bytes[0]
    assert reader.bytes_wanted == reader.bytes_read
    assert same_weights(second, store.compact(other))


def test_a_damaged_expert_is_named_and_hinders_no_other(
    expert_store, tmp_path, no_gaps
):
    copy = shutil.copytree(expert_store, tmp_path / "copy")
    layout = read_layout(copy / CHANNEL_FILE)
    place = int(layout.places[1][5])
    whole = bytearray((copy / CHANNEL_FILE).read_bytes())
    whole[layout.layer_offsets[1] + place * layout.record_bytes[1] + 7] ^= 1
    (copy / CHANNEL_FILE).write_bytes(whole)
    store, _ = load(copy)
    with pytest.raises(ValueError, match="the record of expert 5 in layer 1 fails"):
        store.compact(experts([0, 5], [0, 5], [0, 5]))
    rest = experts([0, 5], [4, 6], [0, 5])
    assert same_weights(store.compact(rest), load(expert_store)[0].compact(rest))


def test_gates_and_cut_groups_are_not_taken_over(pair, quantised_pair):
    _, store = pair
    scores = mx.array(np.random.default_rng(2).normal(size=(3, 64)))
    soft, hard = (select(scores, [32] * 3, gates=g) for g in ("soft", "binary"))
    for one, other in ((soft, hard), (hard, soft), (soft, soft)):
        switched = store.compact(other, beside=(store.compact(one), one))
        assert same_weights(switched, store.compact(other))
    _, store = quantised_pair
    scores = mx.array(np.random.default_rng(1).random((3, 128)))
    cut, whole = (select(scores, [64] * 3, granularity=g) for g in (1, 32))
    for one, other in ((cut, whole), (whole, cut)):
        switched = store.compact(other, beside=(store.compact(one), one))
        assert same_weights(switched, store.compact(other))


def test_an_error_in_the_middle_leaves_the_model_that_was_there(copied):
    file = copied / CHANNEL_FILE
    layout = read_layout(file)
    place = int(layout.places[2][15])
    whole = bytearray(file.read_bytes())
    whole[layout.layer_offsets[2] + place * layout.record_bytes[2]] ^= 1
    file.write_bytes(whole)
    store, _ = load(copied)
    one = Selection((mx.arange(4),) * 3, None, 16)
    model = store.compact(one)
    before = np.array(model(TOKENS))
    bad = Selection((mx.arange(8), mx.arange(8), mx.arange(8, 16)), None, 16)
    with pytest.raises(ValueError, match="channel 15 in layer 2 fails"):
        store.compact(bad, beside=(model, one))
    assert np.array_equal(np.array(model(TOKENS)), before)


# How it is read


@given(
    places=st.sets(st.integers(0, 199), min_size=1),
    latency=st.floats(1e-6, 1e-2),
    record=st.integers(1, 100_000),
)
@settings(max_examples=100)
def test_a_plan_reads_what_is_wanted_for_the_least_cost(places, latency, record):
    wanted = np.array(sorted(places))
    device = Device(latency, 1e9, 1e9)

    def cost(ranges):
        spans = [int(wanted[b - 1] - wanted[a] + 1) for a, b in ranges]
        return device.seconds(len(spans), sum(spans) * record)

    ranges = plan(wanted, record, 200, device)
    assert [r.first for r in ranges] == [0, *(r.last for r in ranges[:-1])]
    assert ranges[-1].last == len(wanted)
    runs = np.flatnonzero(np.diff(wanted) > 1) + 1
    edges = [0, *runs.tolist(), len(wanted)]
    exact = [Range(a, b) for a, b in zip(edges, edges[1:], strict=False)]
    whole = [Range(0, len(wanted))]
    assert cost(ranges) <= min(cost(exact), cost(whole)) * (1 + 1e-9)
    groups = list(pieces(ranges, wanted, 7))
    cut = [piece for group in groups for piece in group]
    assert [p.first for p in cut] == [0, *(p.last for p in cut[:-1])]
    assert cut[-1].last == len(wanted)
    assert {r.last for r in ranges} <= {p.last for p in cut}
    for group in groups:
        assert sum(wanted[p.last - 1] - wanted[p.first] + 1 for p in group) <= 7


def test_a_disk_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "sparse"
    with file.open("wb") as stream:
        stream.truncate(300 << 20)
    reads = []
    fd = os.open(file, os.O_RDONLY)
    measured = device_of(fd, reads.append)
    assert len(reads) == 6 and measured.latency > 0 and measured.bandwidth > 0
    assert device_of(fd, reads.append) == measured and len(reads) == 6
    os.close(fd)


@pytest.mark.parametrize(
    ("latency", "bandwidth"), [(8e-3, 1e8), (3e-4, 5e8), (15e-6, 3e9)]
)
def test_what_large_records_cost_follows_from_what_was_measured(
    tmp_path, monkeypatch, latency, bandwidth
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    clock = [0.0]
    monkeypatch.setattr("ifp_mlx.storage.device.time.perf_counter", lambda: clock[0])

    def read(ranges):
        clock[0] += sum(latency + nbytes / bandwidth for _, nbytes in ranges)

    file = tmp_path / "sparse"
    with file.open("wb") as stream:
        stream.truncate(300 << 20)
    with file.open("rb") as stream:
        device = device_of(stream.fileno(), read)
    expert, half = 3_000_000, np.arange(0, 128, 2)
    cost = device.seconds(len(half), len(half) * expert)
    assert cost == pytest.approx(len(half) * (latency + expert / bandwidth), rel=0.02)
    assert len(plan(half, expert, 128, device)) == len(half)


def as_version_2(file):
    """Write a channel file's header as version 0.1 of the package did."""
    data = file.read_bytes()
    magic, _, size, _ = START.unpack(data[: START.size])
    covered, records = data[START.size : START.size + size], data[START.size + size :]
    length = int.from_bytes(covered[:8], "little")
    about = json.loads(covered[8 : 8 + length])
    words = 2 * len(about["layers"]) * about["channels"] // about["unit"]
    tables = covered[8 + length :][: 4 * words]
    for layer in about["layers"]:
        for part in layer:
            del part["repeat"]
            *_, part["projection"], part["tensor"] = part["name"].split(".")
    text = json.dumps(about, separators=(",", ":")).encode()
    covered = len(text).to_bytes(8, "little") + text + tables
    covered += bytes(-(START.size + len(covered)) % 4096)
    digest = hashlib.sha256(covered).digest()
    file.write_bytes(START.pack(magic, 2, len(covered), digest) + covered + records)


@pytest.mark.parametrize("layers", [3, 13])
def test_a_store_of_version_2_is_read_and_given_back(tmp_path, layers):
    folder = write_folder(tmp_path / "model", num_hidden_layers=layers)
    out = write_store(folder, tmp_path / "store")
    before = read_layout(out / CHANNEL_FILE).data_offset
    as_version_2(out / CHANNEL_FILE)
    after = read_layout(out / CHANNEL_FILE).data_offset
    assert (before == after) == (layers == 3)  # both lengths of a header are tried
    old, plain = load(out)[0], load(folder)[0]
    selection = plain.select("Hello", keep=0.5)
    assert same_weights(old.compact(selection), plain.compact(selection))
    write_plain(out, tmp_path / "back")
    name = "model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
