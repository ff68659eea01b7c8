"""One step, however it is run: compiled, over two machines, or cut off in the midst."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import relative_error, write_folder
from test_train import gradient

WORDS = ("alpha", "beta", "gamma", "delta", "omega", "kappa", "sigma", "theta")


@pytest.fixture
def command(tmp_path):
    """Return what trains a tiny model into a folder, and the environment for it."""
    rows = [
        {"prompt": f"{verb} {word}", "completion": word[::-1], "task": verb}
        for verb in ("turn", "swap")
        for word in WORDS
    ]
    for name in ("train", "valid"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    model = write_folder(tmp_path / "model")

    def build(output: str, steps: int) -> list[str]:
        options = {
            "--model": model, "--data": tmp_path, "--output": tmp_path / output,
            "--steps": steps, "--batch-size": 8, "--lr": 0.01, "--eval-every": 1000,
            "--log-every": 1, "--save-every": 2, "--warm-steps": 4,
        }  # fmt: skip
        pairs = [str(part) for pair in options.items() for part in pair]
        return ["-m", "ifp_mlx.train", *pairs, "--no-compile", "--watch", "off"]

    return build


def losses(folder: Path) -> dict[int, float]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return {line["step"]: line["loss"] for line in found if "loss" in line}


@pytest.mark.long  # a C++ compiler at work for half a minute
def test_the_predictor_gets_the_same_gradient_compiled():
    plain = gradient(compiled=False, checkpointed=False, gates="soft")
    mx.enable_compile()
    try:
        again = gradient(compiled=True, checkpointed=False, gates="soft")
    finally:
        mx.disable_compile()
    name = "masker.predictor.reduce.weight"
    assert float(mx.abs(plain[name]).max()) > 0
    assert relative_error(again[name], plain[name]) < 1e-5


@pytest.mark.long  # three processes that each import everything
def test_two_ring_ranks_make_the_steps_of_one(command, tmp_path):
    launch = [str(Path(sys.executable).with_name("mlx.launch")), "-n", "2"]
    launch += ["--backend", "ring", "--", sys.executable]
    subprocess.run([sys.executable, *command("one", 5)], check=True)
    subprocess.run([*launch, *command("two", 5)], check=True)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 5 and one.keys() == two.keys()
    for step, loss in one.items():
        assert two[step] == pytest.approx(loss, rel=1e-5)


@pytest.mark.long  # several processes one after another
def test_a_killed_run_loses_only_the_steps_since_its_checkpoint(command, tmp_path):
    subprocess.run([sys.executable, *command("whole", 40)], check=True)
    log, rng = tmp_path / "cut" / "log.jsonl", random.Random(0)
    kills = 0
    for number in (6, 17, 29):
        run = subprocess.Popen(
            [sys.executable, *command("cut", 40)], stderr=subprocess.DEVNULL
        )
        while run.poll() is None:
            done = log.read_text().count("\n") if log.exists() else 0
            if done >= number:
                time.sleep(rng.random() / 20)  # anywhere in a step or a save
                os.kill(run.pid, signal.SIGKILL)
            time.sleep(0.002)
        kills += run.returncode == -signal.SIGKILL
        made = max(losses(tmp_path / "cut"))
        saved = [p.name for p in (tmp_path / "cut" / "checkpoints").glob("step-*")]
        kept = max(int(name.split("-")[1]) for name in saved if name[5:].isdigit())
        assert made - kept <= 2 + 1  # it saves every other step, after logging
    assert kills == 3
    subprocess.run([sys.executable, *command("cut", 40)], check=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    ends = [
        tmp_path / name / "model" / "model.safetensors" for name in ("cut", "whole")
    ]
    assert ends[0].read_bytes() == ends[1].read_bytes()
