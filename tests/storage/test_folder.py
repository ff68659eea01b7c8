"""Model folders are found, and checked before a weight is read."""

import json
import struct

import mlx.core as mx
import pytest
from conftest import FAMILIES, tiny_model, write_family, write_folder
from damage import (
    change_config,
    change_weights,
    overlapping,
    store_as,
    truncated,
    write_index,
)
from huggingface_hub import constants, errors

from ifp_mlx.storage.folder import index_files, resolve, source_of

TOKENS = mx.array([[1, 2, 3]])

# resolve


def test_a_folder_is_itself(tiny_folder):
    assert resolve(tiny_folder) == resolve(str(tiny_folder)) == tiny_folder


def test_a_file_is_refused(tiny_folder):
    with pytest.raises(
        NotADirectoryError, match=r"config\.json is a file.*ifp_mlx convert"
    ):
        resolve(tiny_folder / "config.json")


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} has no config.json"):
        resolve(tmp_path)


@pytest.mark.parametrize("name", ["./no/such", "a/b/c", "/nowhere", "gpt9", "", "-x/y"])
def test_what_is_neither_folder_nor_hub_id_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither|no config.json"):
        resolve(name)


def test_a_hub_id_without_network_says_so():
    with pytest.raises(
        FileNotFoundError, match="org/absent.*hub cannot be reached"
    ) as e:
        resolve("org/absent")
    assert isinstance(e.value.__cause__, errors.LocalEntryNotFoundError)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (errors.GatedRepoError, "org/name .*is gated; accept its terms"),
        (errors.RepositoryNotFoundError, "org/name .*not there, or private; check"),
        (ConnectionResetError, "org/name .*ConnectionResetError: .*try again"),
    ],
)
def test_what_the_hub_refuses_is_explained(monkeypatch, kind, sentence):
    def fail(*_args, **_options):
        raise kind.__new__(kind)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match=sentence):
        resolve("org/name")


def test_no_code_and_no_pickle_is_fetched(monkeypatch, tiny_folder):
    from fnmatch import fnmatch

    asked = []

    def download(repo, allow_patterns):
        asked.extend(allow_patterns)
        return str(tiny_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve("org/name") == tiny_folder
    for name in (
        "modeling.py",
        "pytorch_model.bin",
        "x.gguf",
        "consolidated.safetensors",
    ):
        assert not any(fnmatch(name, pattern) for pattern in asked), name
    for name in ("model-00001-of-00002.safetensors", "LICENSE.txt", "chat.jinja"):
        assert any(fnmatch(name, pattern) for pattern in asked), name


def test_a_copy_fetched_by_mlx_lm_serves_offline(monkeypatch, tiny_folder):
    def download(repo, allow_patterns, local_files_only=False):
        if "README.md" in allow_patterns:
            raise errors.IncompleteSnapshotError.__new__(errors.IncompleteSnapshotError)
        assert local_files_only
        return str(tiny_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve("org/name") == tiny_folder


def test_the_hub_cache_with_its_links_works_offline(tmp_path, monkeypatch, tiny_folder):
    repo = tmp_path / "models--org--name"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(snapshot.name)
    for i, file in enumerate(tiny_folder.iterdir()):
        file.rename(repo / "blobs" / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    path = resolve("org/name")
    assert path == snapshot
    assert source_of(path).config["model_type"] == "llama"


# source_of


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_and_opens(tmp_path, family):
    folder = write_folder(tmp_path / family, family)
    assert source_of(folder).config["model_type"] == family
    tokens = mx.array([[1, 2, 3]])
    assert mx.array_equal(source_of(folder).dense()(tokens), tiny_model(family)(tokens))


def test_a_quantised_folder_passes_and_its_shapes_are_checked(tmp_path):
    from mlx_lm.utils import quantize_model, save_config, save_model

    folder = write_folder(tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    model, config = quantize_model(tiny_model("llama"), config, 32, 4)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    assert source_of(folder).config["quantization"]["bits"] == 4
    change_config(folder, intermediate_size=128)
    with pytest.raises(
        ValueError, match=r"\(64, 4\), but config.json asks for \(128, 4\)"
    ):
        source_of(folder)


def test_no_weight_is_read(tmp_path):
    folder = write_folder(tmp_path / "tiny", hidden_size=256, intermediate_size=1024)
    size = (folder / "model.safetensors").stat().st_size
    source_of(folder)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    model = source_of(folder).dense()
    assert mx.get_peak_memory() - before < size / 20
    mx.eval(model.parameters())
    assert mx.get_peak_memory() - before > size / 2


def test_end_of_text_ids_of_generation_config_count(tiny_folder):
    (tiny_folder / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert source_of(tiny_folder).config["eos_token_id"] == [7, 8]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "config.json is missing"),
        ("{", "config.json is not a JSON object .*line 1"),
        ("[1]", "config.json is not a JSON object .*JSON list"),
        ("[" * 100_000, "config.json is not a JSON object .*recursion"),
        ("{}", "model_type=None in .*config.json names no model"),
        ('{"model_type": "../x"}', r"model_type='\.\./x' in .* names no model"),
    ],
)
def test_a_config_that_says_nothing_is_refused(tiny_folder, text, sentence):
    file = tiny_folder / "config.json"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        source_of(tiny_folder)


@pytest.mark.parametrize("key", ["model_file", "trust_remote_code"])
def test_code_in_the_folder_is_never_run(tiny_folder, key):
    (tiny_folder / "evil.py").write_text("raise SystemExit('ran')")
    change_config(tiny_folder, **{key: "evil.py"})
    with pytest.raises(ValueError, match=f"{key}='evil.py' .* never done"):
        source_of(tiny_folder).dense()


@pytest.mark.parametrize("model_type", ["t5_next", "base", "switch_layers"])
def test_an_unsupported_architecture_is_named(tiny_folder, model_type):
    change_config(tiny_folder, model_type=model_type)
    with pytest.raises(ValueError, match=f"model_type='{model_type}' .*not supported"):
        source_of(tiny_folder)


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "num_attention_heads"])
def test_a_size_of_nothing_is_one_sentence(tiny_folder, key):
    change_config(tiny_folder, **{key: 0})
    with pytest.raises(ValueError, match="mlx-lm cannot build a llama model"):
        source_of(tiny_folder)


def test_more_layers_than_tensors_are_refused_before_they_are_built(tiny_folder):
    change_config(tiny_folder, num_hidden_layers=10**9)
    with pytest.raises(ValueError, match="num_hidden_layers=1000000000 in .*more than"):
        source_of(tiny_folder)


def test_an_incomplete_config_is_refused(tiny_folder):
    change_config(tiny_folder, hidden_size=None)
    with pytest.raises(ValueError, match="cannot build a llama model.*'hidden_size'"):
        source_of(tiny_folder)


def test_a_folder_without_weights_is_refused(tiny_folder):
    (tiny_folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\*.safetensors"):
        source_of(tiny_folder)


def test_an_index_that_names_a_missing_file_is_refused(tiny_folder):
    write_index(tiny_folder, "model.safetensors", "model-2.safetensors")
    with pytest.raises(FileNotFoundError, match="names model-2.safetensors, which is"):
        source_of(tiny_folder)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a/../b", "..", ""]
)
def test_an_index_that_leaves_the_folder_is_refused(tiny_folder, name):
    write_index(tiny_folder, name)
    with pytest.raises(
        ValueError, match=f"names {name!r}, which is no file of its own"
    ):
        source_of(tiny_folder)


@pytest.mark.parametrize("text", ["{", '{"weight_map": ["a"]}'])
def test_an_index_that_is_none_is_refused(tiny_folder, text):
    (tiny_folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(
        ValueError, match="index.json (is not a JSON|has no weight_map)"
    ):
        source_of(tiny_folder)


def test_an_index_gives_each_file_once(tmp_path):
    for name in ("b", "a"):
        (tmp_path / name).touch()
    write_index(tmp_path, "b", "a", "b")
    files = index_files(tmp_path / "model.safetensors.index.json")
    assert files == [tmp_path / "a", tmp_path / "b"]


def test_weights_may_be_links_to_another_place(tiny_folder, tmp_path):
    before = source_of(tiny_folder).dense()(TOKENS)
    blob = tmp_path / "blobs/0123"
    blob.parent.mkdir()
    (tiny_folder / "model.safetensors").rename(blob)
    (tiny_folder / "model.safetensors").symlink_to(blob)
    assert mx.array_equal(source_of(tiny_folder).dense()(TOKENS), before)


def test_a_link_to_nowhere_is_said(tiny_folder):
    (tiny_folder / "model.safetensors").unlink()
    (tiny_folder / "model.safetensors").symlink_to("/nowhere/weights")
    with pytest.raises(FileNotFoundError, match="a link to /nowhere/weights, which is"):
        source_of(tiny_folder)


@pytest.mark.parametrize("name", ["model [4bit]", "model*", "what?", "[!a]"])
def test_a_folders_name_is_no_pattern(name, tmp_path):
    write_folder(tmp_path / "model of another", seed=1)
    folder = write_folder(tmp_path / name)
    expected = source_of(write_folder(tmp_path / "plain")).dense()(TOKENS)
    assert mx.array_equal(source_of(folder).dense()(TOKENS), expected)


def garbage(data: bytes) -> bytes:
    return b"garbage" * 100


def empty(data: bytes) -> bytes:
    return b""


def huge_header(data: bytes) -> bytes:
    return struct.pack("<Q", 1 << 60) + data[8:]


@pytest.mark.parametrize(
    "damage", [garbage, truncated, empty, huge_header, overlapping]
)
def test_a_damaged_weight_file_is_refused(tiny_folder, damage):
    file = tiny_folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(
        ValueError, match=r"model\.safetensors is damaged \(.+\); fetch"
    ):
        source_of(tiny_folder)


def test_a_tensor_in_two_files_is_refused(tiny_folder):
    file = tiny_folder / "model.safetensors"
    (tiny_folder / "model-old.safetensors").write_bytes(file.read_bytes())
    with pytest.raises(
        ValueError, match="lm_head.weight is in both .*model-old.*model.sa"
    ):
        source_of(tiny_folder)


def test_a_tensor_of_another_shape_is_refused(tiny_folder):
    name = "model.layers.1.mlp.up_proj.weight"
    change_weights(tiny_folder, lambda w: w | {name: w[name][:60]})
    sentence = rf"{name} in .*model.safetensors has shape \(60, 32\), .* \(64, 32\)"
    with pytest.raises(ValueError, match=sentence):
        source_of(tiny_folder).dense()


def test_a_missing_tensor_is_refused(tiny_folder):
    change_weights(
        tiny_folder, lambda w: {k: v for k, v in w.items() if k != "model.norm.weight"}
    )
    with pytest.raises(ValueError, match=r"lacks the tensor model.norm.weight \(32,\)"):
        source_of(tiny_folder)


def test_a_tensor_too_many_is_refused(tiny_folder):
    change_weights(tiny_folder, lambda w: w | {"model.extra.weight": mx.zeros((2,))})
    with pytest.raises(ValueError, match="model.safetensors holds model.extra.weight"):
        source_of(tiny_folder)


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8", "U8"])
def test_floats_stored_as_whole_numbers_are_refused_by_their_type(tiny_folder, dtype):
    store_as(tiny_folder, dtype, UP)
    sentence = rf"{UP} in .*model\.safetensors holds {dtype} without scales .* fetch or"
    with pytest.raises(ValueError, match=sentence):
        source_of(tiny_folder)


@pytest.mark.parametrize("in_text", [False, True])
def test_what_quantised_a_model_that_mlx_lm_does_not_read_is_named(
    tiny_folder, in_text
):
    about = {"quantization_config": {"quant_method": "bitsandbytes"}}
    change_config(tiny_folder, **({"text_config": about} if in_text else about))
    source_of(tiny_folder)  # notes alone do no harm
    sentence = "quantised by bitsandbytes .* take the model before that, or one"
    change_weights(tiny_folder, lambda w: w | {f"{UP[:-7]}.SCB": mx.zeros(64)})
    with pytest.raises(ValueError, match=f"SCB, which .*{sentence}"):
        source_of(tiny_folder)
    change_weights(tiny_folder, lambda w: w | {UP: w[UP].reshape(-1, 1)})
    with pytest.raises(ValueError, match=rf"\(2048, 1\).*{sentence}"):
        source_of(tiny_folder)
    store_as(tiny_folder, "I8", UP)
    with pytest.raises(ValueError, match=sentence):
        source_of(tiny_folder)


def test_a_format_that_mlx_lm_refuses_is_named(tiny_folder):
    how = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    change_config(tiny_folder, quantization_config=how)
    sentence = "float-quantized.*quantised by compressed-tensors .* take the model"
    with pytest.raises(ValueError, match=sentence):
        source_of(tiny_folder)


def test_a_model_inside_another_has_older_and_newer_names(tmp_path):
    folder = write_family(tmp_path / "tiny", "gemma3")
    tokens = mx.array([[1, 2, 3]])
    expected = source_of(folder).dense()(tokens)
    mx.eval(expected)  # before its file is written again

    def newer(name):
        body = name.removeprefix("language_model.")
        inside = f"model.language_model.{body.removeprefix('model.')}"
        return inside if body.startswith("model.") else body

    pixels = {"model.vision_tower.x.weight": mx.zeros(2)}
    change_weights(folder, lambda w: {newer(n): a for n, a in w.items()} | pixels)
    assert mx.array_equal(source_of(folder).dense()(tokens), expected)


def test_a_text_config_that_is_null_is_none(tiny_folder):
    file = tiny_folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"text_config": None}))
    assert source_of(tiny_folder).config["text_config"] == {}
