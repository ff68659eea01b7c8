"""What is written for Core AI, run by Core AI's own CPU runtime where it is there."""

import json
from importlib.util import find_spec

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import run_command, tiny_model, write_family, write_folder

from ifp_mlx import load
from ifp_mlx.convert.coreai.graph import Decoder
from ifp_mlx.convert.to_coreai import compare
from ifp_mlx.convert.to_coreml import main
from ifp_mlx.model.checkpoint import IFPModel
from ifp_mlx.model.decide import decide
from ifp_mlx.selection.request import Request

needs_core_ai = pytest.mark.skipif(find_spec("coreai") is None, reason="no coreai-core")
SIZES = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}


@needs_core_ai
@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("family, tied", [("llama", True), ("qwen2", 0), ("qwen3", 1)])
def test_a_core_ai_program_decodes_as_mlx(tmp_path, family, tied, bits):
    model = tiny_model(family, tie_word_embeddings=bool(tied), **SIZES)
    if bits:
        nn.quantize(model, 32, bits)
    path = tmp_path / "tiny.aimodel"
    Decoder(model, 64).program().save_asset(path)
    error, same = compare(path, model, [1, 5, 9, 200, 77])
    assert error < 1e-5 and same == 9


@needs_core_ai
def test_four_bit_constants_are_read_as_they_were_written(tmp_path):
    model = tiny_model("llama", **SIZES)
    rng = np.random.default_rng(1)
    wide = mx.array(rng.normal(size=(259, 64)).astype(np.float32))
    model.model.embed_tokens.weight = wide
    nn.quantize(model, 64, 4)
    path = tmp_path / "tiny.aimodel"
    Decoder(model, 64).program().save_asset(path)
    assert path.joinpath("main.mlirb").stat().st_size < 200_000
    assert compare(path, model, list(range(1, 40)))[0] < 1e-5


@needs_core_ai
@pytest.mark.parametrize("quantised", [[], ["-q", "--q-group-size", "32"]])
def test_the_command_writes_and_verifies(tmp_path, capsys, quantised):
    folder = write_folder(tmp_path / "tiny", **SIZES)
    out = tmp_path / "out.aimodel"
    given = ["--model", folder, "--instruction", "Hello", "--format", "coreai"]
    given += ["--context-length", "64", "--output", out, "--json", *quantised]
    status, printed, _ = run_command(main, capsys, *given)
    report = json.loads(printed)
    assert status == 0 and report["verification"]["tokens_equal"]
    assert report["package"] == str(out)
    model, _ = load(folder)
    decision = decide(Request(instruction="Hello"), model, lasting=True)
    compact = model.prepare(decision).model
    if not quantised:  # the finished folder, too
        assert compare(out, compact, [1, 2, 3])[0] < 1e-5


@pytest.mark.parametrize(
    "extra, sentence",
    [
        (["--lut"], "--lut is for --format coreml"),
        (["--consumer", "hf"], "--consumer is for --format coreml"),
        (["--functions", "a=b"], "--functions is for --format coreml"),
    ],
)
def test_what_core_ai_does_not_have_is_said(tmp_path, capsys, extra, sentence):
    folder = write_folder(tmp_path / "tiny")
    chosen = [] if "--functions" in extra else ["--instruction", "Hello"]
    given = ["--model", folder, "--format", "coreai", *chosen, *extra]
    output = tmp_path / "out.aimodel"
    status, _, error = run_command(main, capsys, *given, "--output", output)
    assert status == 2 and sentence in error and not output.exists()


@pytest.mark.skipif(find_spec("coreai") is not None, reason="coreai-core is here")
def test_without_core_ai_the_command_says_what_to_install(tmp_path, capsys):
    folder = write_folder(tmp_path / "tiny")
    given = ["--model", folder, "--instruction", "Hello", "--format", "coreai"]
    output = tmp_path / "out.aimodel"
    status, _, error = run_command(main, capsys, *given, "--output", output)
    assert status == 2 and "pip install 'ifp-mlx[coreai]'" in error
    assert not output.exists()


@pytest.mark.parametrize(
    ("form", "needs", "words"),
    [
        ("coreml", "coremltools", "qwen3_moe.Model cannot be exported to Core ML"),
        ("coreai", "json", "(qwen3_moe) is not written for Core AI yet"),
    ],
)
def test_a_mixture_is_refused_before_it_is_read(
    tmp_path, capsys, monkeypatch, form, needs, words
):
    pytest.importorskip(needs)
    monkeypatch.setattr(IFPModel, "prepare", None)
    folder = write_family(tmp_path / "m", "qwen3_moe")
    out = tmp_path / "out"
    given = [
        "--model",
        folder,
        "--instruction",
        "Hi",
        "--format",
        form,
        "--output",
        out,
    ]
    status, printed, err = run_command(main, capsys, *given)
    assert (status, printed) == (2, "") and words in err
    assert err.count("to_coreml.py: error:") == 1 and not out.exists()
