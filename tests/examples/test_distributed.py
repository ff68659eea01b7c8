"""A compact folder on several ranks: mlx-lm's own server, nothing of ours between."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import run_command, write_folder

from ifp_mlx.compact import main as compact

ROOT = Path(__file__).parents[2]
CHECK = "examples.benchmarks.distributed_check"


@pytest.mark.long  # two servers of two ranks each: a minute
@pytest.mark.parametrize(
    ("family", "options"), [("llama", []), ("ministral3", ["--pipeline"])]
)
def test_two_ring_ranks_answer_as_one_process(tmp_path, capsys, family, options):
    folder = write_folder(tmp_path / "dense", family)
    status, _, err = run_command(
        compact,
        capsys,
        *("--model", folder, "--instruction", "Explain the words of geography."),
        *("--target-size", 32, "--mlx-path", tmp_path / "compact"),
    )
    assert status == 0, err
    done = subprocess.run(
        [sys.executable, "-m", CHECK, "--model", tmp_path / "compact", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["same_answer"] and report["ranks"] == 2 and report["answer"]
