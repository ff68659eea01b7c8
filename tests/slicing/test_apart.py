"""Kept channels with their own weights, in every type whose channels are selected: alone
they are the compact model, with the dropped ones read beside them the dense one.
"""

from itertools import product

import mlx.core as mx
import numpy as np
import pytest
from conftest import (
    by_turns,
    families,
    family_units,
    randomised,
    relative_error,
    thinned,
    write_family,
)
from mlx_lm.models.cache import make_prompt_cache

from ifp_mlx.checking.whole import Whole
from ifp_mlx.model.checkpoint import IFPModel
from ifp_mlx.selection.masks import Selection
from ifp_mlx.slicing.apart import cut_apart
from ifp_mlx.slicing.compensation import Correction
from ifp_mlx.slicing.masked import mask_model, set_masks
from ifp_mlx.slicing.plan import plan_of
from ifp_mlx.slicing.shapes import at
from ifp_mlx.slicing.sliced import cut, scale_units
from ifp_mlx.slicing.stock import build
from ifp_mlx.storage.folder import source_of
from ifp_mlx.storage.writer import write_store

CHANNELS = [name for name, unit in family_units().items() if unit == "channel"]
TOKENS = [5, 9, 77, 200, 13, 40, 41, 8]
GROUP = 32  # of quantised models


def some(plan, groups=False, seed=0):
    """Return a selection of half the channels with gates, others in every layer.

    Args:
        plan: of the model.
        groups: whether every second layer keeps whole groups; the others cut them.
    """
    rng = np.random.default_rng(seed)
    indices, gates = [], []
    for layer in range(len(plan.layers)):
        group = GROUP if groups and layer % 2 == 0 else 1
        chosen = np.sort(
            rng.permutation(plan.units // group)[: plan.units // group // 2]
        )
        index = (chosen[:, None] * group + np.arange(group)).ravel()
        indices.append(mx.array(index.astype(np.int32)))
        gates.append(mx.array(rng.uniform(0.2, 1, index.size).astype(np.float32)))
    return Selection(tuple(indices), tuple(gates), plan.units)


def correction(kept, width, seed):
    """Return random factors that do about as much as a random ``down_proj``."""
    rng = np.random.default_rng(seed)
    reads, writes = rng.normal(0, 0.3, (kept, 3)), rng.normal(0, 0.3, (3, width))
    return Correction(mx.array(reads, mx.float32), mx.array(writes, mx.float32))


@pytest.mark.parametrize("name", CHANNELS)
def test_gates_and_correction_apart_do_what_they_do_in_the_weights(name):
    config = families()[name]
    apart, folded = randomised(build(config)), randomised(build(config))
    plan = plan_of(apart, config)
    selection = some(plan)
    rows = zip(plan.modules(apart), plan.modules(folded), plan.layers, strict=True)
    for number, (one, other, layer) in enumerate(rows):
        index, gate = selection.indices[number], selection.gates[number]
        inlet = at(other, layer.inlet)
        both = correction(index.size, inlet.weight.shape[0], number)
        part = cut_apart(one, layer, index, plan.units, gate=gate, correction=both)
        assert not part.whole and part.drops
        cut(other, layer, index, plan.units)
        inlet.weight = inlet.weight + (both.reads @ both.writes).T
        scale_units(other, layer, gate)
    logits = folded(mx.array([TOKENS]))
    assert relative_error(apart(mx.array([TOKENS])), logits) <= 1e-5


def says(model, parts):
    """Return what a model says of tokens that it reads in parts, one after another."""
    cache = make_prompt_cache(model.model if isinstance(model, Whole) else model)
    read = [
        model(mx.array([part]), cache, last=len(part))
        if isinstance(model, Whole)
        else model(mx.array([part]), cache=cache)
        for part in parts
    ]
    return mx.concatenate(read, axis=1)


PARTS = [TOKENS[:5], TOKENS[5:7], TOKENS[7:]]


def assert_whole(source, selection, room=0, times=1):
    """The dropped channels beside the kept ones are the dense model, and without them
    there is the compact one.
    """
    masked = source.dense()
    dense = says(masked, PARTS)
    mask = np.zeros(source.plan.shape, np.float32)
    for row, index, gate in zip(mask, selection.indices, selection.gates, strict=True):
        row[np.array(index)] = np.array(gate)
    set_masks(mask_model(masked, source.plan), mx.array(mask))
    compact = says(masked, PARTS)
    assert relative_error(compact, dense) > 1e-3  # or nothing is tried
    model = IFPModel(source, "").apart(selection)
    whole = Whole(source, model, room)
    for _ in range(times):
        assert relative_error(says(whole, PARTS), dense) <= 1e-5
        assert relative_error(says(model, PARTS), compact) <= 1e-5
    return whole


# Which mlx-lm does not multiply rightly when it is quantised, or has no place for.
UNTIED = {"llama4_text", "seed_oss", "minicpm"}
# mlx-lm's own class cannot be quantised.
FLOAT = ("afm7",)
WAYS = [(name, False) for name in FLOAT]
WAYS += by_turns((name for name in CHANNELS if name not in FLOAT), 3)


def written(folder, name, four_bits):
    untied = {"tie_word_embeddings": False} if name in UNTIED else {}
    return write_family(folder, name, quantised=four_bits, **untied)


@pytest.mark.parametrize(("name", "four_bits"), WAYS)
def test_the_whole_model_is_the_dense_one_in_every_type(name, four_bits, tmp_path):
    source = source_of(written(tmp_path / "model", name, four_bits))
    whole = assert_whole(source, some(source.plan, four_bits))
    assert whole.bytes_read > 0


STORED = product(
    ["llama", "phi3", "starcoder2", "nanbeige, looped"], [False, True], [0, 1 << 30]
)


@pytest.mark.parametrize(("name", "four_bits", "room"), thinned(STORED, 3))
def test_so_it_is_from_a_channel_store_and_with_room_for_all(
    name, four_bits, room, tmp_path
):
    plain = written(tmp_path / "model", name, four_bits)
    for path in (plain, write_store(plain, tmp_path / "store")):
        source = source_of(path)
        whole = assert_whole(source, some(source.plan, four_bits), room, times=2)
        assert len(whole.held) == (len(source.plan.layers) if room else 0)
