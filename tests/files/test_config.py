"""A config.json means the same in the words of transformers 4 and 5."""

import json
import re

import mlx.core as mx
import pytest
from conftest import LLAMA3, families, run_command, write_family, write_folder
from damage import change_config

from ifp_mlx import load
from ifp_mlx.files.config import check_numbers
from ifp_mlx.generate import main as answer
from ifp_mlx.storage.folder import source_of

LINEAR = {"rope_type": "linear", "factor": 8.0}
# What transformers 4 wrote, and what transformers 5 writes in its place.
POSITIONS = {
    "llama": (
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
        LLAMA3 | {"rope_theta": 500000.0},
    ),
    "mistral": ({"rope_theta": 1e6}, {"rope_type": "default", "rope_theta": 1e6}),
    "qwen3": (
        {"rope_theta": 1e6, "rope_scaling": LINEAR},
        LINEAR | {"rope_theta": 1e6},
    ),
    "glm4": (
        {"rope_theta": 500.0, "partial_rotary_factor": 0.5},
        {"rope_theta": 500.0, "partial_rotary_factor": 0.5, "rope_type": "default"},
    ),
    "gpt_neox": (
        {"rotary_emb_base": 500, "rotary_pct": 0.25},
        {"rope_theta": 500, "partial_rotary_factor": 0.25, "rope_type": "default"},
    ),
    "gemma3_text": (
        {"rope_theta": 1e6, "rope_local_base_freq": 500.0, "rope_scaling": LINEAR},
        {
            "full_attention": LINEAR | {"rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
    ),
    "olmo3": (
        {"rope_theta": 500.0, "rope_scaling": LINEAR},
        {
            "full_attention": LINEAR | {"rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
    ),
}
OLDER = ("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor")
OLDER += ("rotary_emb_base", "rotary_pct")
TOKENS = mx.array([[n % 250 for n in range(3, 90)]])


def newer(config, family):
    """Return a config as transformers 5 writes it."""
    left = {key: value for key, value in config.items() if key not in OLDER}
    return left | {"rope_parameters": POSITIONS[family][1]}


def write_newer(folder, family):
    """Write a folder whose config.json transformers 5 could have written, and return
    it with the logits of transformers 4's.
    """
    write_family(folder, family, **POSITIONS[family][0])
    logits = source_of(folder).dense()(TOKENS)
    file = folder / "config.json"
    file.write_text(json.dumps(newer(json.loads(file.read_text()), family)))
    return folder, logits


@pytest.mark.parametrize("family", POSITIONS)
def test_positions_are_the_same_in_the_words_of_transformers_5(tmp_path, family):
    folder, expected = write_newer(tmp_path / "tiny", family)
    assert mx.array_equal(source_of(folder).dense()(TOKENS), expected)


def test_positions_of_a_model_inside_another_are_the_same(tmp_path):
    text = families()["gemma3"]["text_config"]
    older, rope = POSITIONS["gemma3_text"]
    folder = write_family(tmp_path / "tiny", "gemma3", text_config=text | older)
    expected = source_of(folder).dense()(TOKENS)
    change_config(folder, text_config=newer(text, "gemma3_text"))
    assert mx.array_equal(source_of(folder).dense()(TOKENS), expected)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_compact_folder_says_positions_in_both_words(tmp_path, family):
    from mlx_lm.utils import load_model
    from transformers import AutoConfig

    from ifp_mlx.model.export import write_compact

    folder, _ = write_newer(tmp_path / "tiny", family)
    model, _ = load(folder)
    selection = model.select(selector="random", keep=0.5, allocation="uniform")
    out = write_compact(model, selection, tmp_path / "out")
    stock, _ = load_model(out)
    assert mx.array_equal(stock(TOKENS), model.compact(selection)(TOKENS))
    after, before = (AutoConfig.from_pretrained(path) for path in (out, folder))
    assert after.rope_parameters == before.rope_parameters


def test_a_predictor_reads_positions_as_a_model_does(tmp_path):
    from ifp_mlx.selection.predictor import SparsityPredictor

    folder, _ = write_newer(tmp_path / "tiny", "llama")
    model, config = (
        source_of(folder).dense(),
        json.loads((folder / "config.json").read_text()),
    )
    predictor = SparsityPredictor(model, 3, 64, 4, config=config)
    predictor.save(tmp_path / "predictor")
    again = SparsityPredictor.load(tmp_path / "predictor")
    assert mx.array_equal(again(TOKENS), predictor(TOKENS))


def test_a_model_from_scratch_has_the_positions_of_its_config(tmp_path):
    from ifp_mlx.training.recipe import TrainConfig
    from ifp_mlx.training.trainee import open_trainee

    folder, _ = write_newer(tmp_path / "tiny", "llama")
    about = {"model": str(folder), "data": "", "output": "", "from_scratch": True}
    assert open_trainee(TrainConfig(**about)).model.args.rope_theta == 500000.0


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("llama", POSITIONS["gemma3_text"][1]),
        ("gemma2", LINEAR | {"rope_theta": 1e4}),
    ],
)
def test_positions_that_a_class_cannot_be_told_are_refused(
    tmp_path, capsys, family, rope
):
    from ifp_mlx.plan import main

    folder = write_folder(tmp_path / "tiny", family)
    change_config(folder, rope_theta=None, rope_parameters=rope)
    file = folder / "config.json"
    sentence = f"{re.escape(str(rope))} in {file} cannot be passed to .* for {family}"
    with pytest.raises(ValueError, match=sentence):
        source_of(folder)
    status, out, err = run_command(main, capsys, "--model", file)
    assert (status, out) == (2, "") and re.search(sentence, err)


@pytest.mark.parametrize("key", ["max_position_embeddings", "attention_bias"])
def test_a_null_that_transformers_refuses_is_named(tiny_folder, capsys, key):
    from ifp_mlx.compact import main

    file = tiny_folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: None}))
    paths = ("--model", tiny_folder, "--mlx-path", tiny_folder / "out")
    status, out, err = run_command(main, capsys, *paths, "--instruction", "Hi")
    assert (status, out) == (2, "")
    assert re.search(
        f"{tiny_folder} .*'{key}'.*value: None.* correct what is named", err
    )


@pytest.mark.parametrize("key", ["rope_theta", "rms_norm_eps", "hidden_size"])
def test_a_text_in_place_of_a_number_is_named(tiny_folder, capsys, key):
    change_config(tiny_folder, **{key: "64"})
    given = ("--model", tiny_folder, "-p", "Hello", "--keep", 0.5)
    status, _, err = run_command(answer, capsys, *given)
    assert status == 2 and len(err.splitlines()) == 1
    assert f"{key}='64' in {tiny_folder / 'config.json'} is a text" in err
    assert "write it without quotes" in err


def test_a_text_in_place_of_a_number_is_named_in_a_model_inside_another(tmp_path):
    folder = write_family(tmp_path / "m", "gemma3")
    inner = json.loads((folder / "config.json").read_text())["text_config"]
    change_config(folder, text_config=inner | {"rms_norm_eps": "1e-6"})
    with pytest.raises(ValueError, match="rms_norm_eps='1e-6' .* is a text"):
        load(folder)


def test_no_text_that_belongs_there_is_taken_for_a_number(tmp_path):
    refused = 0
    for config in families().values():
        check_numbers(config | {"torch_dtype": "float32"}, tmp_path)
        try:
            check_numbers(config | {"hidden_size": "64"}, tmp_path)
        except ValueError:
            refused += 1
    # Others have another name for it, or read a dictionary as it is.
    assert refused > 0.8 * len(families())
