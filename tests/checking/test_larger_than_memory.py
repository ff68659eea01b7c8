"""A model that does not fit a process's memory answers exactly in it."""

import json
import subprocess
import sys

import mlx_lm
import pytest
from conftest import write_folder

from ifp_mlx import load
from ifp_mlx.model import checkpoint
from ifp_mlx.selection.prompts import as_messages, tokenize

CHILD = """
import resource, runpy, sys
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
if limit:
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__")
status = open("/proc/self/status").read()
print(next(l for l in status.splitlines() if l.startswith("VmData")))
"""
WIDE = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 8192}
FFN_BYTES = 8 * 3 * 256 * 8192 * 4  # of eight layers, 201 MB


def child(*command, limit):
    """Run a module in a process that may have so many bytes of its own; return its status
    and what it printed.
    """
    words = [sys.executable, "-c", CHILD, str(limit), *map(str, command)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.mark.long  # two processes that each import everything
@pytest.mark.skipif(sys.platform != "linux", reason="limits what a process allocates")
def test_it_says_what_the_dense_model_says_where_that_cannot_be_loaded(
    tmp_path, monkeypatch
):
    asked = ["--prompt", "Hello", "--max-tokens", 8]
    empty = write_folder(tmp_path / "empty")
    wide = write_folder(tmp_path / "wide", num_hidden_layers=8, **WIDE)
    monkeypatch.setattr(checkpoint, "MOST_TOKENS", 20)
    for folder in (empty, wide):  # a calibration text is read once, before
        load(folder)[0].compute_prior()
    checks = ["--keep", 0.25, "--check", "exact", "--json"]

    idle = child("ifp_mlx.generate", "--model", empty, *asked, *checks, limit=0)
    status, lines, err = idle
    assert status == 0, err
    limit = int(lines[-1].split()[1]) * 1024 + round(0.7 * FFN_BYTES)  # not all of it

    found = child("ifp_mlx.generate", "--model", wide, *asked, *checks, limit=limit)
    status, lines, err = found
    assert status == 0, err

    model, tokenizer = load(wide)
    tokens = tokenize(tokenizer, as_messages("Hello"))
    expected = mlx_lm.generate(model.dense(), tokenizer, tokens, max_tokens=8)
    report = json.loads(lines[-2])
    assert report["text"] == expected
    assert report["check"]["bytes_read"] > FFN_BYTES
