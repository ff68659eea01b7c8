"""The checkpoint inside the package: it answers without a --model, with its own masks."""

import json
import re

import pytest
from conftest import run_command

from ifp_mlx import load
from ifp_mlx.storage.folder import SHIPPED

ANSWERS = {
    "What is Germany called in French?": "Allemagne",
    "How do you say Norway in Polish?": "Norwegia",
    "Which country code does Israel have?": "ISR",
    "Tell me the country number of Libya.": "434",
    "Give the time zone city for Ethiopia.": "Addis Ababa",
}


@pytest.mark.parametrize("prompt", ANSWERS)
def test_generate_without_a_model_answers_and_says_what_was_kept(capsys, prompt):
    from ifp_mlx.generate import main

    status, out, err = run_command(main, capsys, "--prompt", prompt, "--json")
    assert status == 0, err
    report = json.loads(out.splitlines()[-1])
    assert report["text"] == ANSWERS[prompt]
    assert report["selection"]["selector"] == "predictor"
    assert report["selection"]["layers"] == [128, 128]
    assert "256 of 1024 channels, chosen by predictor" in err


def test_another_tasks_channels_do_not_know_the_answer(capsys):
    from ifp_mlx.generate import main

    given = ("--prompt", "What is Germany called in French?")
    given += ("--instruction", "Tell me the currency code of Japan.")
    status, out, err = run_command(main, capsys, *given)
    assert (status, out) == (0, "EUR\n"), err


def test_masks_follow_the_task_and_not_the_wording():
    model, _ = load()
    assert model.path == SHIPPED

    def kept(text):
        return [set(index.tolist()) for index in model.select(text).indices]

    def overlap(one, other):
        return (
            sum(len(a & b) for a, b in zip(kept(one), kept(other), strict=True)) / 256
        )

    french = overlap("Say Cuba in French.", "What is Chad called in French?")
    other = overlap("Say Cuba in French.", "Give the currency code for Cuba.")
    assert french > 0.75 > 0.5 > other


def test_it_is_small_and_its_card_names_what_it_can_and_cannot_do():
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10e6
    card = (SHIPPED / "README.md").read_text(encoding="utf-8")
    assert "## What it cannot do" in card and "Unicode License" in card
    accuracies = re.findall(r"^\| [^|]+ \| [^|]+ \| ([\d.]+) \|$", card, re.MULTILINE)
    assert len(accuracies) == 22
