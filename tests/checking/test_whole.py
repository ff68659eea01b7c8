"""What the whole model reads, holds and lets go; and reads that fail."""

import os
import shutil

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_model, write_folder, write_quantised
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step

from ifp_mlx import load, stream_generate
from ifp_mlx.checking.loop import CheckedRun, DraftLength
from ifp_mlx.checking.rule import Rule
from ifp_mlx.checking.whole import Whole
from ifp_mlx.decoding.options import Decoding
from ifp_mlx.selection.masks import Selection
from ifp_mlx.slicing.sliced import sliced_names
from ifp_mlx.storage.layout import CHANNEL_FILE, read_layout
from ifp_mlx.storage.writer import write_store

PROMPT = [5, 9, 77, 200, 13, 40, 41]
SHAPE = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 256}


def kept_of(model, group=1, share=0.5, seed=0):
    """Return a selection that keeps a share of the channels of all layers but the last."""
    rng = np.random.default_rng(seed)
    count = model.channels // group
    indices = []
    for layer in range(model.layers):
        whole = layer == model.layers - 1
        rows = rng.permutation(count)[: count if whole else round(share * count)]
        index = (np.sort(rows)[:, None] * group + np.arange(group)).ravel()
        indices.append(mx.array(index.astype(np.int32)))
    return Selection(tuple(indices), None, model.channels)


def beside(model, selection, room=0):
    return Whole(model.source, model.apart(selection), room)


def run_of(whole, draft=3):
    rule = Rule("exact", Decoding())
    return CheckedRun(whole, PROMPT, rule, DraftLength(draft, draft))


def answer(run, count):
    for _ in run.prefill(4):
        pass
    tokens = []
    while len(tokens) < count:
        tokens += [one.token for one in run.check(count - len(tokens))]
    return tokens


def greedy(model, count):
    steps = generate_step(mx.array(PROMPT), model.dense(), max_tokens=count)
    return [token for token, _ in steps]


WRITE = {
    "plain": (lambda path: write_folder(path, **SHAPE), 1),
    "4 bits": (lambda path: write_quantised(path, group=32), 1),
    "4 bits, groups": (lambda path: write_quantised(path, group=32), 32),
}
KINDS = [*WRITE, *(f"store: {kind}" for kind in WRITE)]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Return a model of a kind, and the group by which it is to be selected."""
    known = {}

    def one(kind):
        write, group = WRITE[kind.removeprefix("store: ")]
        if kind not in known:
            root = tmp_path_factory.mktemp("kind")
            path = write(root / "plain")
            if kind.startswith("store"):
                path = write_store(path, root / "store")
            known[kind] = load(path)[0]
        return known[kind], group

    return one


def row_bytes(model, layer, inlet):
    """Return the bytes of one channel's rows in a layer, and of all of its inlet."""
    weights = tree_flatten(model.source.skeleton.parameters(), destination={})
    names = sliced_names(model.source.skeleton, model.plan)[layer]
    sizes = [0, 0]
    for name in names:
        sizes[f".{inlet}." in name] += weights[name].nbytes
    return sizes[0] // model.channels, sizes[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_reads_the_dropped_channels_and_nothing_else(kind, opened, monkeypatch):
    model, group = opened(kind)
    whole, read, preadv = beside(model, kept_of(model, group)), [], os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda *args: read.append(preadv(*args)) or read[-1]
    )
    expected = 0
    for layer, part in enumerate(whole.parts[:-1]):
        rows, down = row_bytes(model, layer, model.plan.layers[layer].inlet)
        dropped = part.dropped_index.size
        if not kind.startswith("store"):
            # A column is no piece of a file; an inlet that is whole needs none.
            expected += dropped * rows + (0 if part.whole else down)
        elif part.whole:  # whose groups are whole records
            expected += model.channels * rows + down
        else:
            expected += dropped * (rows + down // model.channels)
    run = run_of(whole)
    answer(run, 9)
    figures = run.figures
    assert figures.prompt_bytes_read == 2 * expected  # the prompt is read in two steps
    assert figures.bytes_read == (2 + figures.checks) * expected == whole.bytes_read
    if kind != "4 bits, groups":  # of which mlx reads down_proj
        assert sum(read) == whole.bytes_read
    assert whole.dense_bytes == sum(
        weight.nbytes
        for name, weight in tree_flatten(model.dense().parameters())
        if ".mlp." in name
    )


def test_a_whole_store_record_is_less_than_the_folder_reads(opened):
    figures = {}
    for kind in ("plain", "store: plain"):
        run = run_of(beside(opened(kind)[0], kept_of(opened(kind)[0])))
        answer(run, 9)
        figures[kind] = run.figures.bytes_read
    assert figures["store: plain"] == 0.75 * figures["plain"]


def test_who_throttles_is_told_of_every_byte(opened):
    model, _ = opened("plain")
    whole, told = beside(model, kept_of(model)), []
    whole.throttle = lambda nbytes, began: told.append(nbytes)
    answer(run_of(whole), 9)
    assert len(told) > 2 and sum(told) == whole.bytes_read


@pytest.mark.parametrize("kind", KINDS)
def test_no_dropped_channel_stays_in_memory_between_checks(kind, opened):
    model, group = opened(kind)
    whole = beside(model, kept_of(model, group))
    run = run_of(whole)
    answer(run, 8)  # what is only made once is not counted
    before = [mx.get_active_memory(), run.cache[0].nbytes]
    for _ in range(4):
        run.check(4)
        assert run.cache[0].nbytes == before[1]
        assert mx.get_active_memory() - before[0] <= 2048


@pytest.mark.parametrize("stored", [False, True])
def test_two_layers_of_dropped_channels_are_in_memory_at_most(stored, tmp_path):
    wide = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 2048}
    path = write_folder(tmp_path / "wide", num_hidden_layers=8, **wide)
    model, _ = load(write_store(path, tmp_path / "store") if stored else path)
    whole = beside(model, kept_of(model))
    run = run_of(whole)
    answer(run, 6)  # the KV cache is there from now on
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    run.check(4)
    two_layers = whole.dense_bytes / 8
    activations = 16 * 4 * model.channels * 4  # some arrays of four tokens
    assert mx.get_peak_memory() - before <= two_layers + activations
    assert two_layers + activations < 0.2 * whole.dense_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_there_is_room_for_are_not_read_again(kind, opened):
    model, group = opened(kind)
    selection = kept_of(model, group)
    expected = greedy(model, 6)

    def passes(room):
        whole = beside(model, selection, room)
        run = run_of(whole)
        assert answer(run, 6) == expected
        return [*whole.held], run.figures.bytes_read / (2 + run.figures.checks)

    rows, down = row_bytes(model, 0, model.plan.layers[0].inlet)
    part = beside(model, selection).parts[0]
    held = part.dropped_index.size * rows
    held += 0 if part.whole else round(down * part.dropped_index.size / model.channels)
    none, one, still_one = passes(held - 1), passes(held), passes(2 * held - 1)
    assert none[0] == [] and one[0] == still_one[0] == [0]
    assert none[1] == 2 * one[1] == 2 * still_one[1] > 0
    assert passes(2 * held) == ([0, 1], 0)


def test_no_more_is_held_than_there_is_room_for(opened):
    for kind in KINDS:
        model, group = opened(kind)
        made = model.apart(kept_of(model, group))
        names = sum(sliced_names(model.source.skeleton, model.plan), [])
        weights = tree_flatten(model.source.skeleton.parameters(), destination={})
        room = sum(weights[name].nbytes for name in names) // 2
        whole = Whole(model.source, made, 0)
        answer(run_of(whole), 4)
        before = mx.get_active_memory()
        whole = Whole(model.source, made, room)
        answer(run_of(whole), 4)
        assert len(whole.held) == 2
        assert mx.get_active_memory() - before <= room + 4096, kind


# Reads that fail


def cut_short(file):
    os.truncate(file, file.stat().st_size // 2)


def put_in_its_place(file):
    other = tiny_model("llama", seed=9, **SHAPE)
    copy = file.with_suffix(".copy.safetensors")
    weights = dict(tree_flatten(other.parameters()))
    mx.save_safetensors(str(copy), weights, {"format": "mlx"})
    copy.replace(file)


def written_over(file):
    """Change bytes all over the file, in place; its size stays."""
    state = file.stat()
    with file.open("r+b") as content:
        for offset in range(state.st_size // 3, state.st_size, 501):
            content.seek(offset)
            content.write(b"\x3f\x11")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 1))


FAILURES = [
    ("plain", cut_short, "has changed since the model was opened; open it again"),
    ("plain", put_in_its_place, "has changed since the model was opened"),
    ("plain", written_over, "has changed since the model was opened"),
    ("4 bits", cut_short, "has changed since the model was opened"),
    ("4 bits, groups", cut_short, "damaged|has changed since the model was opened"),
    ("4 bits, groups", put_in_its_place, "has changed since the model was opened"),
    ("store: plain", cut_short, "was cut short while in use; "),
    ("store: plain", written_over, "is damaged: the record of channel .* fails its"),
    ("store: 4 bits", written_over, "is damaged: the record of channel .* fails its"),
]


@pytest.mark.parametrize(("kind", "damage", "sentence"), FAILURES)
def test_after_a_read_that_fails_there_is_an_error_and_no_token(
    kind, damage, sentence, opened, tmp_path
):
    path = tmp_path / "model"
    shutil.copytree(opened(kind)[0].path, path)
    model, tokenizer = load(path)
    selection = kept_of(model, opened(kind)[1])
    expected = greedy(model, 12)
    file = path / (CHANNEL_FILE if kind.startswith("store") else "model.safetensors")
    options = {"selection": selection, "check": "exact", "draft_tokens": 2}
    steps = stream_generate(model, tokenizer, PROMPT, max_tokens=12, **options)
    said = [next(steps).token]
    damage(file)
    with pytest.raises((OSError, ValueError), match=sentence):
        said += [step.token for step in steps]
    assert said == expected[: len(said)] and len(said) < 12
    assert next(steps, None) is None


@pytest.mark.parametrize("kind", ["plain", "store: plain"])
def test_a_read_that_fails_leaves_the_answer_where_it_was(kind, opened, monkeypatch):
    model, _ = opened(kind)
    whole = beside(model, kept_of(model))
    expected = greedy(model, 12)
    run, tokens = run_of(whole), []
    calls = [0]
    visits = whole._visits

    def breaking():
        """Let every second pass fail in its second layer."""
        visit = visits()
        calls[0] += 1
        fails = calls[0] % 2

        def visited(layer, *args, **kwargs):
            if layer == 1 and fails:
                raise OSError("no disk")
            return visit(layer, *args, **kwargs)

        return visited

    monkeypatch.setattr(whole, "_visits", breaking)
    while run.known < len(PROMPT) - 1:
        with pytest.raises(OSError, match="no disk"):
            list(run.prefill(4))
        before = run.known
        next(run.prefill(4))
        assert run.known > before
    while len(tokens) < 12:
        with pytest.raises(OSError, match="no disk"):
            run.check(12 - len(tokens))
        tokens += [one.token for one in run.check(12 - len(tokens))]
    assert tokens == expected
    monkeypatch.undo()
    assert answer(run_of(whole), 12) == expected


def test_a_store_made_anew_meanwhile_does_not_mix_with_the_old_one(opened, tmp_path):
    path = tmp_path / "store"
    shutil.copytree(opened("store: plain")[0].path, path)
    model, _ = load(path)
    run = run_of(beside(model, kept_of(model)))
    expected = greedy(model, 12)
    copy = path / "copy"
    shutil.copy2(path / CHANNEL_FILE, copy)
    written_over(copy)
    copy.replace(path / CHANNEL_FILE)
    assert answer(run, 12) == expected
    assert read_layout(path / CHANNEL_FILE)  # it is the records that differ
