"""Two selections that give different weights never share an identity."""

import json
from dataclasses import replace
from itertools import combinations

import mlx.core as mx
import numpy as np
import pytest
from conftest import relative_error, run_command, write_family
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from ifp_mlx import Selection, load
from ifp_mlx.compact import main as compact
from ifp_mlx.engine import Engine
from ifp_mlx.generate import main as generate
from ifp_mlx.model.export import MASK_FILE
from ifp_mlx.selection.masks import Origin
from ifp_mlx.selection.top_k import select

TOKENS = mx.array([[5, 9, 77, 200, 13]])
TEXT = [40, 41, 42, 43, 44, 45]


@pytest.fixture
def model(tiny_folder):
    return load(tiny_folder)[0]


def test_what_decides_the_weights_decides_the_identity(model):
    plain = model.select(TEXT, keep=0.5, selector="activation")
    ones = [
        plain,
        model.select(TEXT, keep=0.5, selector="random"),
        plain.compensated(TEXT, "one text"),
        plain.compensated(TEXT, "one text", sketch=None),
        plain.compensated(TEXT[:-1], "another text"),
        replace(plain, trained="distillation, 100 steps"),
        replace(plain, unit="expert"),
    ]
    assert len({one.identity for one in ones}) == len(ones)
    assert len({one.mask_id for one in ones}) == 2
    weights = [model.compact(one)(TOKENS) for one in ones[:5]]
    for one, other in combinations(weights, 2):
        assert not mx.array_equal(one, other)


def test_how_a_text_is_called_does_not_change_what_it_makes(model):
    plain = model.select(TEXT, keep=0.5)
    one, other = (plain.compensated(TEXT, name) for name in ("this", "that"))
    assert one.identity == other.identity != plain.identity
    assert plain.identity == plain.mask_id == one.plain().identity


@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, 7),
    compensated=st.booleans(),
    sketch=st.sampled_from([None, "1"]),
)
def test_a_mask_file_keeps_mask_id_identity_and_origin(
    tmp_path_factory, seed, k, compensated, sketch
):
    scores = np.random.default_rng(seed).normal(size=(3, 8)).astype(np.float32)
    made = select(mx.array(scores), [k] * 3)
    origin = Origin(selector="random", keep=k / 8, made={"examples": seed})
    made = replace(made, origin=origin, text=tuple(range(k)))
    made = made.compensated(sketch=sketch) if compensated else made
    file = tmp_path_factory.mktemp("masks") / "mask.safetensors"
    made.save(file)
    read = Selection.load(file)
    assert (read.mask_id, read.identity) == (made.mask_id, made.identity)
    assert read.origin == replace(origin, keep=float(f"{k / 8:.4g}"))
    assert read.compensation == made.compensation and read.text == made.text


def test_in_one_engine_a_mask_and_its_compensated_twin_answer_for_themselves(
    tiny_folder, model, tmp_path
):
    plain = model.select(TEXT, keep=0.5)
    files = {"plain": plain, "twin": plain.compensated(TEXT, "a text")}
    for name, selection in files.items():
        selection.save(tmp_path / name)

    def answers(*order):
        with Engine.open(tiny_folder) as engine:
            for name in order:
                engine.prepare(mask_file=str(tmp_path / name), name=name)
            return {
                name: engine.generate("Hello there", task=name, max_tokens=8)
                for name in order
            }

    found = answers("plain", "twin")
    assert found == answers("twin", "plain") and found["plain"] != found["twin"]


def test_the_mask_of_a_compensated_folder_says_that_it_cannot_make_its_weights(
    tiny_folder, tmp_path, capsys
):
    options = ("--model", tiny_folder, "--instruction", "Say hello.", "--keep", 0.5)
    out = tmp_path / "out"
    status, said, err = run_command(
        compact, capsys, *options, "--mlx-path", out, "--json"
    )
    assert status == 0, err
    report, saved = json.loads(said), Selection.load(out / MASK_FILE)
    assert saved.compensates and saved.text is None
    assert saved.identity == report["identity"] != saved.mask_id
    model, _ = load(tiny_folder)
    with pytest.raises(ValueError, match="not in its file, so those weights cannot be"):
        model.compact(saved)
    use = ("--model", tiny_folder, "--mask-file", out / MASK_FILE, "--prompt", "Hi")
    status, _, err = run_command(generate, capsys, *use)
    assert status == 2 and "--no-compensate" in err and "Traceback" not in err
    status, said, _ = run_command(
        generate, capsys, *use, "--no-compensate", "--json", "-m", 2
    )
    assert status == 0
    assert json.loads(said.splitlines()[-1])["selection"]["identity"] == saved.mask_id


def test_a_mask_file_with_its_text_makes_the_same_weights_again(
    tiny_folder, tmp_path, capsys
):
    mask = tmp_path / "mask.safetensors"
    said = []
    for more in (("--save-mask", mask), ("--mask-file", mask)):
        status, out, err = run_command(
            generate, capsys, "--model", tiny_folder, "--prompt", "Say hello.", "-m", 8,
            "--prefill", "compact", "--json", *more,
        )  # fmt: skip
        assert status == 0, err
        said.append(json.loads(out.splitlines()[-1]))
    assert said[0]["text"] == said[1]["text"]
    assert said[0]["selection"]["identity"] == said[1]["selection"]["identity"]
    assert said[0]["selection"]["compensated"] is True


def rewritten(source, target, change):
    """Write a mask file with other words, as another version would."""
    with safe_open(source, framework="numpy") as file:
        words = dict(file.metadata())
        arrays = {name: file.get_tensor(name) for name in file.keys()}
    change(words, arrays)
    save_file(arrays, target, metadata=words)
    return target


def test_mask_files_of_version_0_1_are_read(model, tmp_path):
    chosen = model.select("Say hello.", keep=0.5)
    made = chosen.compensated(TEXT, "the instruction", sketch=None)
    made.save(tmp_path / "new")

    def as_before(words, arrays):
        assert "sketch" not in words
        del words["unit"], words["text digest"]

    old = Selection.load(rewritten(tmp_path / "new", tmp_path / "old", as_before))
    assert old.identity == made.identity and old.compensation == made.compensation
    assert old.origin == Selection.load(tmp_path / "new").origin
    assert relative_error(model.compact(old)(TOKENS), model.compact(made)(TOKENS)) == 0

    def as_in_a_folder(words, arrays):
        as_before(words, arrays)
        del arrays["text"]

    lost = Selection.load(
        rewritten(tmp_path / "new", tmp_path / "lost", as_in_a_folder)
    )
    assert lost.compensates and lost.compensation.tokens == len(TEXT)
    with pytest.raises(ValueError, match="compensated by 6 tokens of the instruction"):
        model.compact(lost)


def test_a_mask_beside_another_sketch_is_refused_and_its_channels_are_not(
    model, tmp_path
):
    made = model.select("Say hello.", keep=0.5).compensated(TEXT)
    made.save(tmp_path / "mask")
    later = Selection.load(
        rewritten(
            tmp_path / "mask",
            tmp_path / "later",
            lambda words, _: words.update(sketch="9"),
        )
    )
    assert later.identity != made.identity
    with pytest.raises(ValueError, match="the sketch 9 .* this version has 1: use the"):
        model.compact(later)
    assert model.compact(later.plain())(TOKENS).shape[-1] == 259


def test_experts_are_not_compensated(tmp_path):
    mixture, _ = load(write_family(tmp_path / "m", "qwen3_moe"))
    experts = mixture.select("Say hello.", keep=0.5)
    with pytest.raises(ValueError, match="keeps experts, which cannot make up"):
        experts.compensated(TEXT)
    channels = replace(experts, unit="channel").compensated(TEXT)
    with pytest.raises(ValueError, match="keeps experts, which cannot make up"):
        mixture.compact(replace(channels, unit="expert"))  # as a mask file might say


def test_the_mask_of_trained_weights_says_so(model):
    trained = replace(model.select(TEXT, keep=0.5), trained="distillation, 10 steps")
    with pytest.raises(ValueError, match="trained further .distillation, 10 steps"):
        model.compact(trained)
    assert model.compact(trained.plain())(TOKENS).shape[-1] == 259


def test_what_a_selection_says_of_itself_includes_its_weights(model):
    kept = model.select(TEXT, keep=0.5, selector="random")
    assert kept.as_text() == kept.origin.as_text()
    made = replace(kept.compensated(TEXT, "a text"), trained="distillation")
    more = {"compensated by": "6 tokens of a text", "recovered by": "distillation"}
    assert made.as_text() == kept.origin.as_text() | more


def test_what_cannot_select_is_refused_in_a_sentence(model):
    with pytest.raises(ValueError, match="scores have the shape .* give scores of"):
        model.select(TEXT, scores=mx.zeros((model.layers, model.channels - 1)))
    with pytest.raises(ValueError, match="token id 5000 is beyond the model's"):
        model.select([5, 5000], keep=0.5)
    with pytest.raises(ValueError, match="seed=-1 must be 0 to"):
        model.select(TEXT, selector="random", seed=-1)
    with pytest.raises(ValueError, match="keep='a' is not a share"):
        model.select(TEXT, keep="a")
    arrays = model.select(np.array(TEXT), keep=0.5)
    assert arrays.mask_id == model.select(TEXT, keep=0.5).mask_id


def test_a_task_of_an_engine_says_and_takes_compensation(tiny_folder):
    with Engine.open(tiny_folder) as engine:
        made = engine.prepare("cats", name="cats", keep=0.5)
        assert made.info["compensated by"].endswith("of the instruction")
        plain, own = (
            list(engine.stream("Hi", task="cats", max_tokens=1, **options))[-1]
            for options in ({"compensate": False}, {})
        )
        assert plain.mask_id == own.mask_id == plain.identity
        assert own.identity == engine.prepare("cats", keep=0.5).name != plain.identity
