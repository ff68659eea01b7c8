"""Comparing a saved package with an MLX model, here and in the script for a Mac."""

import json
import math
import re
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mil_programs import (
    CONTEXT,
    MARKS,
    TOKENS,
    E,
    K,
    V,
    decoder_package,
    hf_package,
    stale_package,
)

from ifp_mlx.convert import coreml_verify
from ifp_mlx.convert.coreml_verify import Report, main, reference, verify
from ifp_mlx.convert.mil.mlpackage import Package, Session

__all__ = ["decoder_package", "hf_package", "stale_package"]  # fixtures
pytestmark = MARKS


class Decoder(nn.Module):
    """The saved decoder in MLX; its cache is all tokens so far."""

    def make_cache(self):
        return []

    def __call__(self, tokens, cache):
        cache.extend(tokens[0].tolist())
        x = mx.array(E)[mx.array(cache)].astype(mx.float32)
        n = len(cache)
        hidden = mx.triu(mx.full((n, n), -mx.inf), 1)
        for layer in mx.array(K).astype(mx.float32):
            q, k, v = (x @ part.T for part in layer)
            x = x + mx.softmax(q @ k.T + hidden, axis=-1) @ v
        return (x @ mx.array(E).astype(mx.float32).T)[None, -tokens.shape[1] :]


def test_verify_finds_a_right_package_right(decoder_package):
    report = verify(decoder_package, Decoder(), TOKENS[:6].tolist(), steps=4)
    assert report.max_logit_error < 0.005 and report.tokens_equal
    assert (report.positions, report.same_argmax) == (10, 10)
    assert report.seconds > 0 and report.peak_memory_bytes > 10_000_000
    assert json.loads(json.dumps(report.as_json()))["tokens_equal"] is True


def test_verify_feeds_long_prompts_in_pieces(decoder_package, monkeypatch):
    monkeypatch.setattr(Session, "largest", lambda *_: 4)
    report = verify(decoder_package, Decoder(), TOKENS.tolist(), steps=3)
    assert report.max_logit_error < 0.005 and report.positions == 12


def test_verify_finds_every_trap(decoder_package, stale_package, hf_package):
    tokens = TOKENS[:6].tolist()
    assert verify(stale_package, Decoder(), tokens, steps=4).max_logit_error > 0.1
    assert verify(stale_package, Decoder(), tokens, steps=0).max_logit_error < 0.01
    right = verify(hf_package, Decoder(), tokens, consumer="hf")
    assert right.max_logit_error < 0.005
    wrong = verify(decoder_package, Decoder(), tokens, consumer="hf")
    assert wrong.max_logit_error > 0.1


def test_the_reference_is_greedy_and_its_last_rows_chose_the_tokens():
    tokens, logits = reference(Decoder(), TOKENS[:4].tolist(), 3)
    assert logits.shape == (4 + 3, V) and logits.dtype == np.float32
    assert logits[-4:].argmax(-1).tolist() == tokens


def test_nothing_to_verify_is_a_sentence(decoder_package):
    with pytest.raises(ValueError, match="There are no tokens to verify with"):
        verify(decoder_package, Decoder(), [])


def test_an_infinite_error_is_still_json():
    report = Report(math.inf, False, 1, 0, 0.1, 1)
    assert json.loads(json.dumps(report.as_json()))["max_logit_error"] is None


def test_the_command_says_how_far_it_is_and_its_exit_whether_that_is_right(
    decoder_package, stale_package, monkeypatch, capsys
):
    model = SimpleNamespace(compact=lambda selection: Decoder())
    monkeypatch.setattr(coreml_verify, "load", lambda name: (model, None))
    monkeypatch.setattr(coreml_verify.Selection, "load", lambda file: None)
    monkeypatch.setattr(coreml_verify, "tokenize", lambda *_: TOKENS[:6].tolist())
    options = ["--model", "m", "--mask-file", "f", "--steps", "4", "--package"]
    main([*options, str(decoder_package), "--json"])
    assert json.loads(capsys.readouterr().out)["positions"] == 10
    main([*options, str(decoder_package)])
    assert "greedy tokens the same" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main([*options, str(stale_package)])
    assert stop.value.code == 1 and "MB" in capsys.readouterr().out


def test_the_command_refuses_a_missing_package_in_one_line(
    tmp_path, monkeypatch, capsys
):
    missing = tmp_path / "no.mlpackage"
    options = ["--package", str(missing), "--model", "m", "--mask-file", "f"]
    with pytest.raises(SystemExit) as stop:
        main(options)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert re.search("no.mlpackage is not a Core ML package", error)


# --- the script for a Mac: everything but Core ML itself ---

ON_MAC = Path(__file__).parents[2] / "examples/benchmarks/coreml_on_mac.py"


class CoreML:
    """What coremltools' MLModel is on a Mac, on the interpreter."""

    def __init__(self, package):
        self.package = package

    def make_state(self):
        return Package(self.package).session()

    def predict(self, inputs, state):
        return state.run(inputs)


@pytest.mark.parametrize("consumer", ["default", "hf"])
def test_the_mac_script_feeds_a_package_as_a_host_should(
    decoder_package, hf_package, tmp_path, monkeypatch, capsys, consumer
):
    package = tmp_path / "out.mlpackage"
    shutil.copytree(hf_package if consumer == "hf" else decoder_package, package)
    folder = tmp_path / "out"
    folder.mkdir()
    tokens = TOKENS[:6].tolist()
    stored = folder / "reference.npz"
    for _ in range(2):  # functions of one package are added one by one
        options = {"consumer": consumer, "reference_file": stored}
        verify(package, Decoder(), tokens, steps=4, **options)
    manifest = {"functions": {"main": {}}, "consumer": consumer}
    manifest |= {"query_length": 4, "context_length": CONTEXT}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    script = SimpleNamespace(**runpy.run_path(str(ON_MAC)))
    inside = script.main.__globals__
    monkeypatch.setitem(inside, "check_system", lambda: None)
    monkeypatch.setitem(inside, "load", lambda package, *_: CoreML(package))
    monkeypatch.setitem(inside, "plan", lambda *_: script.Counter({"a GPU": 3}))
    with pytest.raises(SystemExit) as stop:
        script.main([str(package)])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    assert "greedy tokens: 5 of 5" in said and "3 operations on a GPU" in said
    error = float(re.search(r"largest logit error: ([\d.]+)%", said)[1])
    assert error < 0.5
    stored.unlink()
    with pytest.raises(SystemExit) as stop:
        script.main([str(package)])
    assert stop.value.code == 2 and "no manifest.json and" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "darwin", reason="it would run")
def test_the_mac_script_refuses_other_systems_in_one_line(capsys):
    script = runpy.run_path(str(ON_MAC))
    with pytest.raises(SystemExit) as stop:
        script["main"](["x.mlpackage"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "needs macOS 15 or newer, and here is" in error
