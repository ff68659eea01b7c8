"""Lists of experts that other tools write."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifp_mlx.selection.masks import Selection
from ifp_mlx.selection.profiles import FORMS, read, write
from ifp_mlx.selection.top_k import select

# Layer 0 is dense, as a first layer often is; four experts in each of the others.
PATHS = ["model.layers.1.mlp", "model.layers.2.mlp", "model.layers.3.mlp"]
KEPT = [[0, 2], [1, 3], [2, 3]]
SCORES = [[0.4, 0.1, 0.3, 0.2], [0.1, 0.4, 0.2, 0.3], [0.1, 0.1, 0.2, 0.3]]


def counts(*rows):
    said = ({"activation_counts": row, "universal": []} for row in rows)
    return {"num_prompts": 22, "layers": dict(zip("123", said, strict=True))}


def chosen(profile, size, **how):
    """Return what a list says, or the first ``size`` of each layer of a ranking."""
    if profile.sizes is not None:
        return profile.selection()
    scores = mx.array(profile.scores)
    return replace(select(scores, [size] * len(scores), **how), unit="expert")


def kept(selection):
    return [index.tolist() for index in selection.indices]


WRITTEN = {
    "llm-compressor": {
        "model.layers.1.mlp": [0, 2],
        "model.layers.2.mlp": [1, 3],
        "model.layers.3.mlp": [2, 3],
    },
    "reap": {"1": [0, 2], "2": [1, 3], "3": [2, 3]},
    "vllm": {
        "version": 1,
        "pruned_experts": [[1, 1], [1, 3], [2, 0], [2, 2], [3, 0], [3, 1]],
    },
    "mlx-moe": {
        "num_prompts": 1,
        "threshold": 1.0,
        "capacity": 2,
        "num_experts": 4,
        "moe_layers": 3,
        "layers": {
            number: {
                "universal": ids,
                "activation_counts": {str(expert): 1 for expert in ids},
                "total_unique": 2,
            }
            for number, ids in zip("123", KEPT, strict=True)
        },
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_a_profile_is_written_as_its_tool_has_it(form):
    index = tuple(mx.array(ids, dtype=mx.int32) for ids in KEPT)
    text = write(Selection(index, None, 4, unit="expert"), PATHS, form)
    assert json.loads(text) == WRITTEN[form] and text.endswith("\n")


READ = [
    ("llm-compressor", WRITTEN["llm-compressor"]),
    # As transformers names the layers of a model that sees, out of order.
    (
        "llm-compressor",
        {f"model.language_model.layers.{n}.mlp": KEPT[n - 1] for n in (3, 1, 2)},
    ),
    ("reap", WRITTEN["reap"]),
    ("reap", {"layers": WRITTEN["reap"]}),
    ("reap", {"pinned_experts": WRITTEN["reap"], "note": "x"}),
    ("reap", {"kept_experts": {"1": [2, 0], "2": [3, 1], "3": [3, 2]}}),
    ("vllm", WRITTEN["vllm"]),
    (
        "vllm",
        WRITTEN["vllm"]
        | {"version": 2, "routing_mode": "pre_topk_mask", "model_revision": "a"},
    ),
    ("mlx-moe", WRITTEN["mlx-moe"]),
    ("mlx-moe", counts({"2": 20, "0": 22, "1": 3}, {"3": 1, "1": 9}, {"3": 5, "2": 4})),
    ("llm-compressor scores", {"saliency": SCORES, "count": [[1] * 4] * 3}),
    ("llm-compressor scores", {"saliency": [[9, 0, 8, 1], [0, 7, 1, 3], [0, 0, 1, 1]]}),
]


@pytest.mark.parametrize(("form", "said"), READ)
def test_a_profile_is_known_by_what_is_in_it(form, said):
    profile = read(json.dumps(said), PATHS, 4)
    assert profile.form == form
    assert (profile.sizes is None) == (form in ("mlx-moe", "llm-compressor scores"))
    selection = chosen(profile, 2)
    assert (selection.unit, selection.channels) == ("expert", 4)
    assert kept(selection) == KEPT


def test_a_layer_that_vllm_prunes_nothing_of_stays_whole():
    said = {"version": 1, "pruned_experts": [[2, 3]]}
    whole = [0, 1, 2, 3]
    found = read(json.dumps(said), PATHS, 4).selection()
    assert kept(found) == [whole, [0, 1, 2], whole]


def test_a_ranking_keeps_equally_many_of_each_group_of_experts():
    profile = read(json.dumps({"saliency": [[4, 3, 2, 1]] * 3}), PATHS, 4)
    assert kept(chosen(profile, 2)) == [[0, 1]] * 3
    assert kept(chosen(profile, 2, groups=2)) == [[0, 2]] * 3
    # What a list says is not changed by them.
    listed = read(json.dumps(WRITTEN["reap"]), PATHS, 4)
    assert kept(chosen(listed, 2)) == KEPT


@st.composite
def selections(draw, equal):
    """Draw layers that have experts, how many there are, and those that are kept."""
    numbers = sorted(draw(st.sets(st.integers(0, 99), min_size=1, max_size=5)))
    home = draw(st.sampled_from(["model.layers.{}.mlp", "backbone.layers.{}.mixer"]))
    experts = draw(st.integers(2, 20))
    every, count = range(experts), draw(st.integers(1, experts))
    least, most = (count, count) if equal else (1, experts)
    some = st.sets(st.sampled_from(every), min_size=least, max_size=most).map(sorted)
    index = tuple(mx.array(draw(some), dtype=mx.int32) for _ in numbers)
    selection = Selection(index, None, experts, unit="expert")
    return [home.format(number) for number in numbers], selection


@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
def test_what_is_written_is_read_again(form, data):
    paths, selection = data.draw(selections(equal=form == "mlx-moe"))
    profile = read(write(selection, paths, form), paths, selection.channels)
    again = chosen(profile, selection.sizes[0])
    assert profile.form == form and again.mask_id == selection.mask_id
    assert np.array_equal(profile.scores, selection.mask())


def changed(form, **changes):
    return WRITTEN[form] | changes


BAD = [
    ("{'1': [0]}", "A profile is JSON, and this is none"),
    (b"PK\x03\x04\x80\x02", "A profile is JSON, and this is none"),
    ("[" * 100_000, "A profile is JSON, and this is none"),
    ('{"1": [0], "1": [1]}', "says '1' twice"),
    ([[0, 2], [1, 3]], "no profile of experts that is known here"),
    ({}, "no profile of experts that is known here"),
    (
        {"hidden_size": 64, "architectures": ["X"]},
        "no profile of experts that is known",
    ),
    ({"layers": [0, 2]}, "no profile of experts that is known here"),
    (
        {"layers": {"0": {"cached_ids": [1]}}},
        "no profile of experts that is known here",
    ),
    # Of another model: other layers, other experts.
    (
        changed("reap", **{"4": [0, 1]}),
        'names the layer "4", and this model has experts',
    ),
    (
        changed("reap", **{"0": [0, 1]}),
        "has experts in layers 1 to 3; use a profile of",
    ),
    (changed("reap", **{"1.5": [0]}), 'names the layer "1.5"'),
    ({"1": [0, 2], "3": [2, 3]}, "says nothing of layer 2"),
    (changed("reap", **{"01": [0, 1]}), "names layer 1 twice"),
    (
        changed("reap", **{"1": [0, 4]}),
        "the expert 4 of layer 1, and this model's are 0",
    ),
    (changed("reap", **{"1": [-1]}), "names the expert -1 of layer 1"),
    (changed("reap", **{"1": [True]}), "names the expert true of layer 1"),
    (changed("reap", **{"1": [1.0]}), "names the expert 1.0 of layer 1"),
    (changed("reap", **{"1": ["a" * 99]}), r'the expert "a{36}\.\.\. of layer 1'),
    (changed("reap", **{"1": [0, 0]}), "lists expert 0 of layer 1 twice"),
    (changed("reap", **{"1": 3}), "has 3 for layer 1, where a list of experts belongs"),
    (changed("reap", **{"2": []}), "keeps no expert of layer 2"),
    (changed("vllm", pruned_experts=[[0, 1]]), 'names the layer "?0"?, and this model'),
    (changed("vllm", pruned_experts=[[1, 9]]), "names the expert 9 of layer 1"),
    (
        changed("vllm", pruned_experts=[[1, 1], [1, 1]]),
        "lists expert 1 of layer 1 twice",
    ),
    (changed("vllm", pruned_experts=[[1, n] for n in range(4)]), "keeps no expert of"),
    (
        changed("vllm", pruned_experts=[[1]]),
        "where pairs of a layer and an expert belong",
    ),
    (
        changed("vllm", pruned_experts={"1": [2]}),
        "where pairs of a layer and an expert",
    ),
    (changed("vllm", version=3), "has version 3 and routing_mode None"),
    (changed("vllm", version=2), "has version 2 and routing_mode None"),
    (
        changed("vllm", version=2, routing_mode="post_topk_drop"),
        "routing_mode 'post_topk_drop'; read are version 1, and 2 with the mode",
    ),
    (changed("mlx-moe", num_experts=8), "with 8 experts a layer, and this one has 4"),
    (counts({"4": 1}, {}, {}), "names the expert 4 of layer 1"),
    (counts({"x": 1}, {}, {}), 'names the expert "x" of layer 1'),
    (counts({"0": "many"}, {}, {}), 'has the score "many"'),
    (counts({}, [], {}), r"has \[\] for the activation_counts of layer 2"),
    (
        {"saliency": SCORES[:2]},
        "scores of 2 layers with 4 experts, and this model has 3",
    ),
    (
        {"saliency": [[1, 2]] * 3},
        "scores of 3 layers with 2 experts, and this model has",
    ),
    ({"saliency": [[1], *SCORES[1:]]}, "scores of 3 layers with 1 or 4 experts"),
    ({"saliency": [*SCORES[:2], [0, 1, None, 3]]}, "has the score null"),
    ({"saliency": [*SCORES[:2], [0, 1, float("nan"), 3]]}, "has the score NaN"),
    (
        {"saliency": [*SCORES[:2], [0, 1, 10**400, 3]]},
        "no finite number; make it again",
    ),
    ({"saliency": {"1": [0]}}, "where a list of numbers for each layer belongs"),
    ({"saliency": []}, "scores of 0 layers with"),
]


@pytest.mark.parametrize(("said", "why"), BAD)
def test_what_is_no_profile_of_this_model_is_refused_in_a_sentence(said, why):
    text = said if isinstance(said, str | bytes) else json.dumps(said)
    with pytest.raises(ValueError, match=why) as refused:
        read(text, PATHS, 4)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


def test_layers_that_do_not_follow_each_other_are_named_one_by_one():
    with pytest.raises(ValueError, match="has experts in layers 1, 3; use a profile"):
        read('{"2": [0]}', ["h.1.moe", "h.3.moe"], 4)


def test_a_mask_of_channels_is_no_profile():
    channels = Selection((mx.arange(2),) * 3, None, 4)
    with pytest.raises(ValueError, match="keeps channels, and a profile is a list of"):
        write(channels, PATHS, "reap")
