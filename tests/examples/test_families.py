import json

import mlx.core as mx
import pytest
from conftest import write_tokenizer
from mlx.utils import tree_flatten

from examples.benchmarks.families import families
from ifp_mlx import load
from ifp_mlx.evaluation.sensitivity import Probe
from ifp_mlx.model.export import write_compact
from ifp_mlx.slicing.pruning import TESTED, ffn_layers


@pytest.fixture(scope="module")
def verdicts():
    """Judge each type when it is first asked for."""
    known = {}

    def verdict(name):
        if name not in known:
            known[name] = families.judge(name)
        return known[name]

    return verdict


@pytest.mark.parametrize("name", [*families.SEPARATE, *families.WRAPPED])
def test_a_family_with_separate_projections_works(name, verdicts):
    verdict = verdicts(name)
    assert verdict.refused is None
    assert verdict.error <= 1e-5 and verdict.whole


@pytest.mark.parametrize("name", families.OTHERS)
def test_what_cannot_be_sliced_exactly_is_refused_with_its_classes(name, verdicts):
    model = families.build(name)
    with pytest.raises(ValueError, match=rf"{type(model).__module__}\.Model has no"):
        ffn_layers(model)
    assert verdicts(name).refused


def test_an_ffn_that_mixes_its_channels_in_some_layers_is_refused(verdicts):
    # Its class is one and the same in all layers; the last ones do not mix.
    assert verdicts("gemma3n").refused == "MLP mixes its channels"
    assert verdicts("gemma3n, no layer sparse").works


def test_every_type_named_in_errors_is_judged():
    assert set(TESTED) <= set(families.SEPARATE)


def test_the_page_is_current(verdicts):
    expected = families.page({name: verdicts(name) for name in families.ALL})
    assert families.PAGE.read_text(encoding="utf-8") == expected


def folder_of(path, name):
    path.mkdir()
    weights = dict(tree_flatten(families.build(name).parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "mlx"})
    config = families.config_of(name) | {"eos_token_id": 258}
    (path / "config.json").write_text(json.dumps(config))
    write_tokenizer(path)
    return path


# Final norms by other names, channels that config.json cannot say, keys and values
# that later blocks take from earlier ones.
ODD = ["afm7", "falcon_h1", "recurrent_gemma", "lille-130m"]


@pytest.mark.parametrize("name", ["cohere", *ODD])
def test_a_folder_opens_selects_and_compacts(name, tmp_path):
    model, _ = load(folder_of(tmp_path / "model", name))
    selection = model.select("Hello", keep=0.5, allocation="uniform")
    compact = model.compact(selection)
    assert compact(mx.array([[5, 9, 7]])).shape == (1, 3, families.BASE["vocab_size"])
    if name in ODD and name != "falcon_h1":
        with pytest.raises(ValueError, match=f"of the type {name} can have"):
            write_compact(model, selection, tmp_path / "out")
    else:
        out, _ = load(write_compact(model, selection, tmp_path / "out"))
        assert out.channels == selection.target_size


@pytest.mark.parametrize(("name", "alone"), [("afm7", False), ("llama", True)])
def test_sensitivity_replays_only_blocks_that_stand_alone(
    name, alone, tmp_path, monkeypatch
):
    # The last blocks of afm7 take keys and values from block 1.
    model, _ = load(folder_of(tmp_path / "model", name))
    probe = Probe(model, [families.TOKENS, [7, *families.TOKENS[1:]]])
    assert probe._can_replay(1) == alone
    costs = probe.costs(2)
    monkeypatch.setattr(Probe, "_can_replay", lambda *_: False)
    assert costs == pytest.approx(probe.costs(2), rel=2e-3, abs=1e-6)
    assert costs.shape == (2, 6) and (costs[:, 0] > 0).all()
