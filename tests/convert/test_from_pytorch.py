"""Checkpoints become MLX folders that compute the same, or one sentence."""

import json
import os
import pickle
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
    tiny_model,
    train_sentencepiece,
    write_folder,
)
from damage import store_as
from mlx.utils import tree_flatten

from ifp_mlx.convert import from_pytorch
from ifp_mlx.convert.from_pytorch import convert, main
from ifp_mlx.convert.gguf import shards
from ifp_mlx.storage.folder import source_of

TOKENS = mx.array([[3, 1, 4, 1, 5, 92, 65]])
ROOT = Path(__file__).parents[2]


def same(folder, model):
    return mx.array_equal(source_of(folder).dense()(TOKENS), model(TOKENS))


@pytest.fixture(autouse=True)
def keep_signals(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)


# safetensors


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_computes_the_same(tmp_path, family):
    folder = write_folder(tmp_path / "hf", family)
    model = source_of(folder).dense()
    assert same(convert(folder, tmp_path / "out"), model)


def test_shards_in_and_out_change_nothing(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)
    once = convert(tiny_folder, tmp_path / "once")
    assert len(list(once.glob("model-*-of-*.safetensors"))) > 2
    monkeypatch.undo()
    twice = convert(once, tmp_path / "twice")
    assert [f.name for f in twice.glob("*.safetensors")] == ["model.safetensors"]
    assert same(once, tiny_model("llama")) and same(twice, tiny_model("llama"))


@pytest.mark.parametrize("dtype", from_pytorch.DTYPES)
def test_weights_are_cast(tmp_path, tiny_folder, dtype):
    out = convert(tiny_folder, tmp_path / "out", dtype=dtype)
    dtypes = {
        value.dtype for _, value in tree_flatten(source_of(out).dense().parameters())
    }
    assert dtypes == {getattr(mx, dtype)}
    assert source_of(out).config["torch_dtype"] == dtype


def test_weights_keep_their_dtype_unasked(tmp_path, tiny_folder):
    half = convert(tiny_folder, tmp_path / "half", dtype="float16")
    out = convert(half, tmp_path / "out")
    assert source_of(out).dense().model.norm.weight.dtype == mx.float16


def test_an_unknown_dtype_is_named(tmp_path, tiny_folder):
    with pytest.raises(ValueError, match="dtype='int8' is unknown; use float16"):
        convert(tiny_folder, tmp_path / "out", dtype="int8")


# quantisation


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"q_group_size": 32}, {"group_size": 32, "bits": 4, "mode": "affine"}),
        ({"q_mode": "mxfp4"}, {"group_size": 32, "bits": 4, "mode": "mxfp4"}),
        (
            {"q_bits": 8, "q_group_size": 32},
            {"group_size": 32, "bits": 8, "mode": "affine"},
        ),
    ],
)
def test_weights_are_quantised_as_mlx_lm_does(tmp_path, tiny_folder, options, expected):
    from mlx_lm.utils import quantize_model

    out = convert(tiny_folder, tmp_path / "out", quantize=True, **options)
    config = source_of(out).config
    assert config["quantization"] == config["quantization_config"] == expected
    model, _ = quantize_model(tiny_model("llama"), {}, 32, expected["bits"])
    if expected["mode"] == "affine":
        assert same(out, model)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "is 32 wide, not a multiple of q_group_size=64; choose"),
        ({"q_bits": 7}, "q_bits=7, .* do not go together: .*bits 7 is not supported"),
        ({"q_group_size": 0}, "q_group_size=0 .* do not go together: .*positive"),
        ({"q_bits": 8, "q_mode": "mxfp4"}, "q_mode='mxfp4' do not go together"),
        ({"q_mode": "int4"}, "q_mode='int4' do not go together"),
    ],
)
def test_impossible_quantisation_is_said(tmp_path, tiny_folder, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        convert(tiny_folder, tmp_path / "out", quantize=True, **options)
    assert not (tmp_path / "out").exists()


def test_a_quantised_source_is_kept_but_not_quantised_again(tmp_path, tiny_folder):
    options = {"quantize": True, "q_group_size": 32}
    once = convert(tiny_folder, tmp_path / "once", **options)
    twice = convert(once, tmp_path / "twice")
    assert same(twice, source_of(once).dense())
    with pytest.raises(ValueError, match="once is already quantised .*'bits': 4"):
        convert(once, tmp_path / "thrice", **options)


# what comes along


def test_tokenizer_licence_and_settings_come_along(tmp_path, tiny_folder):
    for name in ("LICENSE", "generation_config.json", "chat_template.jinja", "evil.py"):
        (tiny_folder / name).write_text("{}")
    out = convert(tiny_folder, tmp_path / "out")
    names = ["LICENSE", "generation_config.json", "chat_template.jinja"]
    for name in [*names, "tokenizer.json", "tokenizer_config.json"]:
        assert (out / name).read_bytes() == (tiny_folder / name).read_bytes()
    assert not (out / "evil.py").exists()


def test_a_sentencepiece_tokenizer_becomes_tokenizer_json(tmp_path, tiny_folder):
    from sentencepiece import SentencePieceProcessor

    train_sentencepiece(tiny_folder, "the quick brown fox")
    (tiny_folder / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    out = convert(tiny_folder, tmp_path / "out")
    from tokenizers import Tokenizer

    original = SentencePieceProcessor(model_file=str(tiny_folder / "tokenizer.model"))
    rebuilt = Tokenizer.from_file(str(out / "tokenizer.json"))
    ids = original.encode("the fox, naïve")
    assert rebuilt.encode("the fox, naïve").ids == [original.bos_id(), *ids]
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert (config["chat_template"], config["bos_token"]) == ("x", "<s>")


def test_a_source_without_tokenizer_is_refused(tmp_path, tiny_folder):
    (tiny_folder / "tokenizer.json").unlink()
    with pytest.raises(
        FileNotFoundError, match="neither tokenizer.json nor tokenizer.m"
    ):
        convert(tiny_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_source_whose_tokenizer_cannot_be_opened_is_refused(tmp_path, tiny_folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    (tiny_folder / "tokenizer.json").write_text(pointer)
    with pytest.raises(ValueError, match=f"{tiny_folder}/tokenizer.json is not"):
        convert(tiny_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# predictor


@pytest.fixture
def predictor(tmp_path):
    folder = write_folder(tmp_path / "predictor_src", "qwen3", 1)
    mx.save_safetensors(str(folder / "head.safetensors"), {"a": mx.zeros((2,))})
    return folder


def test_a_predictor_lands_beside_the_model(tmp_path, tiny_folder, predictor):
    options = {"quantize": True, "q_group_size": 32, "dtype": "float16"}
    out = convert(tiny_folder, tmp_path / "out", predictor=predictor, **options)
    assert "quantization" in source_of(out).config
    config = source_of(out / "predictor").config
    assert (config["model_type"], config["torch_dtype"]) == ("qwen3", "float16")
    assert "quantization" not in config
    head = (out / "predictor" / "head.safetensors").read_bytes()
    assert head == (predictor / "head.safetensors").read_bytes()
    # A checkpoint with a predictor keeps it.
    again = convert(out, tmp_path / "again")
    assert (again / "predictor" / "head.safetensors").read_bytes() == head


def test_a_predictor_may_lack_a_tokenizer(tmp_path, tiny_folder, predictor):
    for file in predictor.glob("tokenizer*"):
        file.unlink()
    out = convert(tiny_folder, tmp_path / "out", predictor=predictor)
    assert not any((out / "predictor").glob("tokenizer*"))
    assert same(out / "predictor", tiny_model("qwen3", 1))


def test_a_predictor_without_head_is_refused(tmp_path, tiny_folder):
    with pytest.raises(FileNotFoundError, match="tiny has no head.safetensors"):
        convert(tiny_folder, tmp_path / "out", predictor=tiny_folder)


# the command


def test_the_command_prints_the_result_and_nothing_else(tmp_path, tiny_folder, capsys):
    out = tmp_path / "out"
    arguments = [
        "--hf-path",
        tiny_folder,
        "--mlx-path",
        out,
        "-q",
        "--q-group-size",
        32,
    ]
    status, output, errors = run_command(main, capsys, *arguments)
    assert (status, output) == (0, f"{out}\n")
    assert "tensors" not in errors  # no progress bar unless on a terminal


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--hf-path", "{tiny}", "--mlx-path", "{tiny}"],
            "tiny already exists; delete",
        ),
        (["--hf-path", "./none", "--mlx-path", "out"], "./none is neither an existing"),
        (
            ["--hf-path", "{tiny}", "--mlx-path", "out", "-q"],
            "not a multiple of q_group",
        ),
        (
            ["--hf-path", "{tiny}", "--mlx-path", "out", "--dtype", "int8"],
            "choice: 'int8'",
        ),
        (["--hf-path", "{tiny}"], "required: --mlx-path"),
    ],
)
def test_mistakes_are_one_line_and_status_2(
    tmp_path, tiny_folder, capsys, monkeypatch, arguments, sentence
):
    monkeypatch.chdir(tmp_path)
    arguments = [a.format(tiny=tiny_folder) for a in arguments]
    status, output, errors = run_command(main, capsys, *arguments)
    assert (status, output) == (2, "")
    (line,) = [e for e in errors.splitlines() if not e.startswith("[INFO]")]
    assert sentence in line


def test_the_script_runs_as_a_file(tmp_path, tiny_folder):
    script = ROOT / "convert" / "from_pytorch.py"
    arguments = ["--hf-path", str(tmp_path / "none"), "--mlx-path", str(tiny_folder)]
    result = subprocess.run(
        [sys.executable, script, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    line = f"from_pytorch.py: error: {tiny_folder} already exists; delete it or choose "
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"{line}another output path.\n"


def test_a_failure_halfway_leaves_nothing(tmp_path, tiny_folder, monkeypatch):
    def fail(folder, tensors, *, count):
        next(iter(tensors))
        (folder / "shard-0.safetensors").touch()
        raise OSError("halfway")

    monkeypatch.setattr(from_pytorch, "write_shards", fail)
    (tmp_path / "new").mkdir()
    with pytest.raises(OSError, match="halfway"):
        convert(tiny_folder, tmp_path / "new" / "out")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_killed_conversion_leaves_no_result(tmp_path, tiny_folder):
    program = """
import os, signal, sys
import mlx.core as mx
from ifp_mlx.convert import from_pytorch
save = mx.save_safetensors
def save_and_die(*arguments, **options):
    save(*arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)
mx.save_safetensors = save_and_die
from_pytorch.convert(*sys.argv[1:])
"""
    (tmp_path / "new").mkdir()
    result = subprocess.run(
        [sys.executable, "-c", program, tiny_folder, tmp_path / "new" / "out"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == -signal.SIGKILL
    (left,) = (tmp_path / "new").iterdir()
    assert left.name.startswith(".out.")
    shutil.rmtree(left)
    assert same(convert(tiny_folder, tmp_path / "new" / "out"), tiny_model("llama"))


def test_a_folder_without_weights_is_refused(tmp_path, tiny_folder):
    (tiny_folder / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match="tiny holds no weights; give a folder wi"
    ):
        convert(tiny_folder, tmp_path / "out")
    for name in ("a.pt", "b.bin"):
        (tiny_folder / name).touch()
    with pytest.raises(
        FileNotFoundError, match="tiny holds a.pt, b.bin; give a folder"
    ):
        convert(tiny_folder, tmp_path / "out")


def test_without_torch_its_extra_is_named(tmp_path, tiny_folder, monkeypatch):
    (tiny_folder / "model.safetensors").rename(tiny_folder / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"pip install 'ifp-mlx\[torch\]'$"):
        convert(tiny_folder, tmp_path / "out")


# PyTorch


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def pytorch_folder(tiny_folder, torch):
    """Return a function that turns the tiny folder into one with PyTorch weights."""

    def make(change=lambda state: state, file="pytorch_model.bin", **options):
        weights = mx.load(str(tiny_folder / "model.safetensors"))
        state = {k: torch.from_numpy(np.array(v)) for k, v in weights.items()}
        torch.save(change(state), tiny_folder / file, **options)
        (tiny_folder / "model.safetensors").unlink()
        return tiny_folder

    return make


@pytest.mark.torch
def test_pytorch_weights_compute_the_same(tmp_path, pytorch_folder):
    out = convert(pytorch_folder(), tmp_path / "out")
    assert same(out, tiny_model("llama"))
    assert not (out / "unpacked").exists()
    assert (out / "tokenizer.json").exists()


@pytest.mark.torch
def test_sharded_pytorch_weights_compute_the_same(tmp_path, pytorch_folder, torch):
    folder = pytorch_folder()
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    (folder / "pytorch_model.bin").unlink()
    weight_map = {}
    for i, names in enumerate((list(state)[::2], list(state)[1::2])):
        file = f"pytorch_model-{i}.bin"
        torch.save({name: state[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert same(convert(folder, tmp_path / "out"), tiny_model("llama"))
    index.write_text(json.dumps({"weight_map": {"a": "../evil.bin"}}))
    with pytest.raises(
        ValueError, match="names '../evil.bin', which is no file of its"
    ):
        convert(folder, tmp_path / "out2")


@pytest.mark.torch
@pytest.mark.parametrize(
    "nest",
    [
        lambda state: {"model": state, "step": 7},
        lambda state: {"state_dict": state},
        lambda state: {"model": {"state_dict": state}},
    ],
)
def test_a_nested_state_dict_file_computes_the_same(tmp_path, pytorch_folder, nest):
    folder = pytorch_folder(nest, "checkpoint.pt")
    assert same(convert(folder / "checkpoint.pt", tmp_path / "a"), tiny_model("llama"))
    assert same(convert(folder, tmp_path / "b"), tiny_model("llama"))


@pytest.mark.torch
def test_files_from_before_pytorch_1_6_are_read(tmp_path, pytorch_folder):
    folder = pytorch_folder(_use_new_zipfile_serialization=False)
    assert same(convert(folder, tmp_path / "out"), tiny_model("llama"))


@pytest.mark.torch
def test_shared_bfloat16_and_strided_tensors_are_read(tmp_path, pytorch_folder, torch):
    def change(state):
        state = {k: torch.nn.Parameter(v.bfloat16()) for k, v in state.items()}
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
        up = "model.layers.0.mlp.up_proj.weight"
        state[up] = state[up].detach().T.contiguous().T
        return state

    out = convert(pytorch_folder(change), tmp_path / "out")
    weights = dict(tree_flatten(source_of(out).dense().parameters()))
    originals = dict(tree_flatten(tiny_model("llama").parameters()))
    originals["lm_head.weight"] = originals["model.embed_tokens.weight"]
    for name, original in originals.items():
        assert mx.array_equal(weights[name], original.astype(mx.bfloat16)), name


class Evil:
    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


@pytest.mark.torch
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(
    tmp_path, pytorch_folder, capsys, zipped
):
    evil = tmp_path / "evil"
    folder = pytorch_folder(
        lambda state: state | {"x": Evil(evil)}, _use_new_zipfile_serialization=zipped
    )
    out = tmp_path / "out"
    status, _, errors = run_command(
        main, capsys, "--hf-path", folder, "--mlx-path", out
    )
    assert status == 2
    assert "pytorch_model.bin holds io.open, not only tensors; it was not" in errors
    assert "weights_only" not in errors  # torch advises to switch its safety off
    assert not evil.exists() and not out.exists()


@pytest.mark.torch
def test_a_plain_pickle_is_refused_and_not_run(tmp_path, tiny_folder, torch):
    evil = tmp_path / "evil"
    (tiny_folder / "model.safetensors").unlink()
    (tiny_folder / "model.pt").write_bytes(pickle.dumps(Evil(evil)))
    with pytest.raises(
        ValueError, match="model.pt is damaged, or no state dict; it was"
    ):
        convert(tiny_folder / "model.pt", tmp_path / "out")
    assert not evil.exists()


@pytest.mark.torch
@pytest.mark.parametrize("length", [0, 10, 1000, -1000])
def test_a_damaged_file_is_refused(tmp_path, pytorch_folder, length):
    file = pytorch_folder() / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match="pytorch_model.bin is damaged, or no state"):
        convert(file, tmp_path / "out")


@pytest.mark.torch
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda state: [1, 2], "holds a list, not the tensors of a model"),
        (lambda state: {}, "holds a dict, not the tensors of a model"),
        (
            lambda state: state | {"step": 7},
            "step in .*model.bin is a int, not a tensor",
        ),
        (
            lambda state: {k: v for k, v in state.items() if "norm" not in k},
            "lacks the tensor model.layers.0.input_layernorm.weight",
        ),
    ],
)
def test_what_is_no_state_dict_is_said(tmp_path, pytorch_folder, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        convert(pytorch_folder(change), tmp_path / "out")


@pytest.mark.torch
def test_a_tensor_that_mlx_lacks_is_named(tmp_path, pytorch_folder, torch):
    def change(state):
        return {k: v.to(torch.float8_e4m3fn) for k, v in state.items()}

    with pytest.raises(
        ValueError, match="weight in .* is a torch.float8_e4m3fn tensor"
    ):
        convert(pytorch_folder(change), tmp_path / "out")


@pytest.mark.torch
def test_a_state_dict_needs_its_config(tmp_path, pytorch_folder):
    folder = pytorch_folder()
    (folder / "config.json").unlink()
    with pytest.raises(
        FileNotFoundError, match="config.json is missing, without which py"
    ):
        convert(folder / "pytorch_model.bin", tmp_path / "out")


def test_floats_stored_as_whole_numbers_are_not_converted(tmp_path, tiny_folder):
    store_as(tiny_folder, "F8_E4M3", "model.layers.0.mlp.up_proj.weight")
    with pytest.raises(ValueError, match="holds F8_E4M3 without scales"):
        convert(tiny_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
