"""Packages that compute what MLX computes, and mistakes that leave nothing behind.

Trap: a defect that neither coremltools nor a single step would show; the tests named
in the comments fail when it is put back.
"""

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import LLAMA3, tiny_model, write_folder

pytest.importorskip("coremltools")
import coremltools as ct

from ifp_mlx import load
from ifp_mlx.convert import to_coreml
from ifp_mlx.convert.coreml.graph import (
    GEMMA_STREAM,
    Interface,
    build_program,
    rope_tables,
)
from ifp_mlx.convert.coreml.package import SPEC, save_program
from ifp_mlx.convert.coreml_verify import Package, verify
from ifp_mlx.convert.to_coreml import Options, export, main, parse_functions
from ifp_mlx.model.export import Quantisation, write_compact

pytestmark = pytest.mark.coreml

SMALL = {"num_hidden_layers": 2}
ONE = {"num_hidden_layers": 1}
TOKENS = [int(t) for t in np.random.default_rng(0).integers(0, 256, 19)]
INSTRUCTION = "Say yes."


def size(package):
    return sum(file.stat().st_size for file in package.rglob("*") if file.is_file())


def save(model, path, consumer="default", *, lut=False):
    interface = Interface(64, 32, consumer)
    program = build_program(model, interface, lut=lut)
    return save_program(program, interface.inputs(), path / "tiny.mlpackage")


# Trap: a state read twice gives every layer but one a stale cache. Trap: mb.select of
# scalars infers a scalar mask. Trap: a hand-made rope or window. All fail here.
@pytest.mark.parametrize(
    ("family", "changes", "consumer"),
    [
        ("llama", {"rope_scaling": LLAMA3}, "default"),
        (
            "mistral",
            {
                "layer_types": ["full_attention", "sliding_attention"],
                "sliding_window": 5,
                "rope_scaling": {"type": "linear", "factor": 4.0},
            },
            "default",
        ),
        ("qwen2", {"tie_word_embeddings": True}, "hf"),
        ("qwen3", {"num_key_value_heads": 4}, "default"),
        ("gemma3_text", {"sliding_window": 5}, "hf"),
    ],
)
def test_prefill_and_decoding_are_mlxs(family, changes, consumer, tmp_path):
    model = tiny_model(family, **SMALL | changes)
    package = save(model, tmp_path, consumer)
    report = verify(package, model, TOKENS, consumer=consumer)
    assert report.max_logit_error <= 0.01 and report.tokens_equal


@pytest.mark.parametrize(
    ("bits", "lut", "tied"), [(4, False, True), (8, False, False), (4, True, True)]
)
def test_quantised_weights_are_mlxs(bits, lut, tied, tmp_path):
    model = tiny_model("qwen2", seed=bits, **ONE, tie_word_embeddings=tied)
    nn.quantize(model, 32, bits)
    report = verify(save(model, tmp_path, lut=lut), model, TOKENS)
    assert report.max_logit_error <= 0.01 and report.tokens_equal


# Trap: the mean of squares in float16 overflows from |x| = 1500 on.
def test_large_activations_stay_right(tmp_path):
    model = tiny_model("llama", **ONE)
    embedding = model.model.embed_tokens
    embedding.weight *= 1500 / mx.abs(embedding.weight).max()
    report = verify(save(model, tmp_path), model, TOKENS)
    assert report.max_logit_error <= 0.01 and report.tokens_equal


def test_gemmas_stream_may_leave_float16(tmp_path):
    model = tiny_model("gemma3_text", **ONE, sliding_window_pattern=1)
    top = 1e5 / GEMMA_STREAM * 2**-5  # what Gemma-3-270m reaches
    model.layers[0].post_feedforward_layernorm.weight += top / 4
    hidden = model.layers[0](model.model.embed_tokens(mx.array([TOKENS])))
    assert mx.abs(hidden).max() > 65504
    report = verify(save(model, tmp_path), model, TOKENS)
    assert report.max_logit_error <= 0.01 and report.tokens_equal


# Trap: swift-transformers' mask is zeros, has one row, and is one position too long.
def test_the_mask_that_swift_transformers_sends(tmp_path):
    model = tiny_model("llama", **ONE)
    session = Package(save(model, tmp_path, "hf")).session()
    expected = np.array(model(mx.array([TOKENS]))[0])
    found, past = [], 0
    for q in (15, 1, 1, 1, 1):
        ids = np.array([TOKENS[past : past + q]], np.int32)
        past += q
        mask = np.zeros((1, 1, 1, past + 1), np.float16)
        logits = session.run({"inputIds": ids, "causalMask": mask})["logits"]
        assert logits.shape == (1, q, 259) and logits.dtype == np.float16
        found.append(logits[0])
    error = np.abs(np.concatenate(found) - expected).max() / np.abs(expected).max()
    assert error <= 0.01


def test_a_program_has_one_embedding_and_reads_each_state_once():
    model = tiny_model("qwen3", **SMALL, tie_word_embeddings=True)
    nn.quantize(model, 32, 4)
    program = build_program(model, Interface(64, 32))
    operations = program.functions["main"].operations
    assert sum(op.op_type == "read_state" for op in operations) == 2
    matrices = [op for op in operations if op.op_type.startswith("constexpr_")]
    embeddings = [op for op in matrices if op.outputs[0].shape == (259, 32)]
    assert len(embeddings) == 1 and len(matrices) == 1 + 2 * 7


# Trap: a tied head stored a second time.
def test_a_tied_head_costs_nothing_on_disk(tmp_path):
    model = tiny_model("llama", **ONE, vocab_size=8192, tie_word_embeddings=True)
    embedding = 8192 * 32 * 2
    assert embedding < size(save(model, tmp_path)) < 1.5 * embedding


def test_a_rope_that_does_not_turn_halves_is_refused():
    with pytest.raises(ValueError, match="RoPE of this model turns"):
        rope_tables(nn.RoPE(8, traditional=True), 8, 64)
    with pytest.raises(ValueError, match="RoPE of this model turns"):
        rope_tables(nn.RoPE(4), 8, 64)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "tiny"
    write_folder(folder, "llama", **ONE, vocab_size=2048, tie_word_embeddings=True)
    tokenizer = folder / "tokenizer_config.json"
    content = json.loads(tokenizer.read_text())
    (folder / "chat_template.jinja").write_text(content.pop("chat_template"))
    tokenizer.write_text(json.dumps(content))
    return load(folder)[0]


@pytest.fixture(scope="module")
def selections(opened):
    select = opened.select
    return {
        "yes": select(INSTRUCTION, keep=0.5, allocation="uniform"),
        "no": select("x", keep=0.5, allocation="uniform", selector="random"),
    }


def test_functions_share_their_weights(opened, selections, tmp_path):
    options = Options(Quantisation(4, 32), context_length=64)
    report = export(opened, selections, tmp_path / "out", options)
    package = Package(report["package"])
    assert package.functions == ["yes", "no"]
    assert {"yes", "no"} == report["functions"].keys()
    for name, function in report["functions"].items():
        assert function["mask_id"] == selections[name].mask_id
        assert function["verification"]["max_logit_error"] <= 0.01
        assert function["verification"]["tokens_equal"]
    sizes = report["bytes"]
    assert sizes["package"] == size(tmp_path / "out/model.mlpackage")
    assert sizes["package"] < 0.8 * sizes["separate"]
    assert not list((tmp_path / "out").glob("part-*"))
    with np.load(tmp_path / "out/reference.npz") as stored:
        assert {name.split(".")[0] for name in stored} == {"yes", "no"}


def test_an_app_finds_what_it_needs(opened, selections, tmp_path, monkeypatch):
    monkeypatch.setattr(opened, "name", "org/tiny")
    options = Options(context_length=64, consumer="hf")
    one = {"main": selections["yes"]}
    export(opened, one, tmp_path / "App.mlpackage", options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["App", "App.mlpackage"]
    folder = tmp_path / "App"
    read = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert "<|im_start|>" in read["tokenizer_config"]["chat_template"]
    assert read["generation_config"]["eos_token_id"] == 258
    assert read["config"]["intermediate_size"] == 32
    manifest = read["manifest"]
    assert (manifest["base_model"], manifest["consumer"]) == ("org/tiny", "hf")
    assert manifest["functions"]["main"]["mask_id"] == selections["yes"].mask_id
    assert {"coremltools", "mlx"} <= manifest["versions"].keys()
    assert (folder / "masks/main.safetensors").exists()
    assert "not run on a Mac" in (folder / "README.md").read_text()
    spec = ct.utils.load_spec(str(tmp_path / "App.mlpackage" / SPEC))
    labels = spec.description.metadata.userDefined
    assert labels["co.huggingface.exporters.name"] == "org/tiny"
    assert [i.name for i in spec.description.input] == ["inputIds", "causalMask"]
    assert [s.name for s in spec.description.state] == ["keyCache", "valueCache"]


def test_the_values_of_a_quantised_source_are_taken(opened, tmp_path):
    everything = opened.select(INSTRUCTION, keep=1.0)
    how = Quantisation(4, 32)
    write_compact(opened, everything, tmp_path / "q4", quantisation=how)
    model = load(tmp_path / "q4")[0]
    one = {"main": model.select(INSTRUCTION, keep=0.5, allocation="uniform")}
    report = export(model, one, tmp_path / "taken", Options(context_length=64))
    assert report["functions"]["main"]["verification"]["max_logit_error"] <= 0.01
    with pytest.raises(ValueError, match="is quantised already"):
        export(model, one, tmp_path / "twice", Options(how, context_length=64))


def test_a_package_that_differs_from_mlx_is_not_kept(
    opened, selections, tmp_path, monkeypatch
):
    monkeypatch.setattr(to_coreml, "LIMIT", 0.0)
    one = {"main": selections["yes"]}
    with pytest.raises(ValueError, match="main of the package differs from MLX by 0"):
        export(opened, one, tmp_path / "X.mlpackage", Options(context_length=64))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (Options(context_length=1024), "1024 is more than the 512 positions"),
        (Options(context_length=100), "100 is not a multiple of 32; use 96"),
        (
            Options(Quantisation(4, 64)),
            "target_size=32 .* group of 64 channels; use 64",
        ),
        (Options(Quantisation(3, 32)), "3 bits in groups of 32"),
        (Options(lut=True), "add -q"),
    ],
)
def test_what_does_not_fit_is_refused(opened, selections, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        export(opened, selections, tmp_path / "out", options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["gemma2", "ministral3"])
def test_other_architectures_are_refused_by_name(family, tmp_path):
    model = load(write_folder(tmp_path / "tiny", family, **SMALL))[0]
    one = {"main": model.select(INSTRUCTION, keep=0.5)}
    with pytest.raises(ValueError, match=f"{family}.Model cannot be exported.*qwen3"):
        export(model, one, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("coremltools", "coremltools, which writes the package, is missing"),
        ("coremltools.libmilstoragepython", r"BlobWriter not loaded"),
    ],
)
def test_an_incomplete_coremltools_is_named(
    opened, selections, tmp_path, monkeypatch, module, words
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{words}.*pip install 'ifp-mlx\[coreml\]'"):
        export(opened, selections, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["a", "a=", "=b", "a=b,,c=d", "a b=c", "1a=b", "a=b,a=c"]
)
def test_functions_that_cannot_be_read(text):
    with pytest.raises(ValueError, match="--functions"):
        parse_functions(text)


def test_functions_are_read():
    files = parse_functions("a=x.safetensors, b_2=y=z")
    assert {n: str(f) for n, f in files.items()} == {"a": "x.safetensors", "b_2": "y=z"}


def asked(folder, *options):
    """Return a package to write, and the command that writes it."""
    out, model = folder / "X.mlpackage", write_folder(folder / "m", seed=2, **SMALL)
    command = ["--model", model, "--output", out, "--instruction", INSTRUCTION]
    return out, [str(part) for part in (*command, "--context-length", 64, *options)]


def test_the_command_prints_one_line(tmp_path, capsys):
    options = ("-q", "--q-group-size", 32, "--keep", 0.7, "--json")
    out, command = asked(tmp_path, *options, "--selector", "activation")
    main(command)
    done = capsys.readouterr()
    report = json.loads(done.out)
    assert report["package"] == str(out) and out.is_dir()
    main_function = report["functions"]["main"]
    assert main_function["layers"] == [64, 26]  # padded to whole groups, exactly
    assert main_function["verification"]["max_logit_error"] <= 0.01
    assert {"convert", "verify"} == report["seconds"].keys()
    assert report["peak_memory_bytes"] > 1e7
    said = " MB; main: logits within 0."
    assert said in done.err and "the same greedy tokens" in done.err


@pytest.mark.long  # a process that imports everything
def test_the_script_is_the_command_and_coremltools_says_nothing(tmp_path):
    out, options = asked(tmp_path, "--selector", "activation", "--no-verify")
    command = [sys.executable, "convert/to_coreml.py", *options]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0 and out.is_dir(), done.stderr
    assert "libcoremlpython" not in done.stderr


@pytest.mark.parametrize(("least", "kept"), [("0.01", [64, 32]), ("1", [64, 64])])
def test_auto_exports_the_smallest_that_is_promised_to_agree_enough(
    least, kept, tmp_path, capsys
):
    folder = write_folder(tmp_path / "m", **SMALL)
    main([
        "--model", str(folder), "--instruction", INSTRUCTION, "--keep", "auto",
        "--min-agreement", least, "--output", str(tmp_path / "out"), "--no-verify",
        "--context-length", "64", "--json",
    ])  # fmt: skip
    about = json.loads(capsys.readouterr().out)["functions"]["main"]
    assert about["layers"] == kept


def test_a_folder_that_is_compact_is_exported_whole(
    opened, selections, tmp_path, capsys
):
    folder = write_compact(opened, selections["yes"], tmp_path / "compact")
    out = tmp_path / "X.mlpackage"
    main([
        "--model", str(folder), "--keep", "1", "--output", str(out),
        "--context-length", "64", "--json",
    ])  # fmt: skip
    about = json.loads(capsys.readouterr().out)["functions"]["main"]
    assert about["layers"] == [32]  # all that the folder has: half of the source's
    assert about["verification"]["max_logit_error"] <= 0.01
    assert about["verification"]["tokens_equal"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Give one of --instruction, --mask-file and --functions, or --keep 1"),
        (["--instruction", "x", "--functions", "a=b"], "Give one of"),
        (["--functions", "a"], "--functions has 'a'"),
        (["--mask-file", "m", "--keep", "0.5"], "leave out keep"),
        (["--functions", "a=b", "--keep", "0.5"], "leave out --keep"),
        (["--mask-file", "none"], "no mask file none"),
        (["--instruction", "x", "--output", "."], "already exists"),
    ],
)
def test_mistakes_are_one_line(opened, tmp_path, capsys, arguments, words):
    out = tmp_path / "X.mlpackage"
    with pytest.raises(SystemExit) as stop:
        main(["--model", str(opened.path), "--output", str(out), *arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
