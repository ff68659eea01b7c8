"""The Core AI experiment: what it writes, run by Core AI's own CPU runtime."""

import runpy
from importlib.util import find_spec
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import tiny_model, write_folder

from ifp_mlx import load
from ifp_mlx.cli import run

SCRIPT = Path(__file__).parent.parent / "examples" / "coreai_decoder.py"
needs_core_ai = pytest.mark.skipif(find_spec("coreai") is None, reason="no coreai-core")


@needs_core_ai
@pytest.mark.parametrize("quantised", [False, True], ids=["float", "4-bit"])
@pytest.mark.parametrize("family, tied", [("llama", True), ("qwen2", 0), ("qwen3", 1)])
def test_a_core_ai_program_decodes_as_mlx(tmp_path, family, tied, quantised):
    script = runpy.run_path(str(SCRIPT))
    sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}
    model = tiny_model(family, tie_word_embeddings=bool(tied), **sizes)
    if quantised:
        nn.quantize(model, 32, 4)
    path = tmp_path / "tiny.aimodel"
    script["Decoder"](model).program().save_asset(path)
    error, same = script["compare"](path, model, [1, 5, 9, 200, 77])
    assert error < 1e-5 and same == 9


@needs_core_ai
def test_four_bit_constants_are_read_as_they_were_written(tmp_path):
    script = runpy.run_path(str(SCRIPT))
    model = tiny_model("llama", hidden_size=64, head_dim=16, intermediate_size=128)
    rng = np.random.default_rng(1)
    wide = mx.array(rng.normal(size=(259, 64)).astype(np.float32))
    model.model.embed_tokens.weight = wide
    nn.quantize(model, 64, 4)
    path = tmp_path / "tiny.aimodel"
    script["Decoder"](model).program().save_asset(path)
    assert path.joinpath("main.mlirb").stat().st_size < 200_000
    assert script["compare"](path, model, list(range(1, 40)))[0] < 1e-5


@pytest.mark.skipif(find_spec("coreai") is not None, reason="coreai-core is here")
def test_without_core_ai_the_command_says_what_to_install(tmp_path, capsys):
    folder = write_folder(tmp_path / "tiny")
    mask = tmp_path / "mask.safetensors"
    load(folder)[0].select([1, 2, 3], keep=0.5).save(mask)
    main = runpy.run_path(str(SCRIPT))["main"]
    options = ["--model", str(folder), "--mask-file", str(mask)]
    with pytest.raises(SystemExit) as stop:
        run(lambda: main([*options, "--output", str(tmp_path / "o.aimodel")]), "x")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "pip install coreai-core" in error
