import subprocess
import sys

import mlx.core as mx
import pytest

from ifp_mlx import Selection, cli
from ifp_mlx.model.card import Card, Point
from ifp_mlx.selection.masks import Origin
from ifp_mlx.selection.request import Request


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError, ImportError])
def test_a_users_mistake_is_one_line_and_exit_status_2(kind, capsys):
    def command():
        raise kind("width=3 is odd;\n use 2 or 4.")

    with pytest.raises(SystemExit) as stop:
        cli.run(command, "verb")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "verb: error: width=3 is odd; use 2 or 4.\n"


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 / 0, "verb")


def test_an_interrupt_is_not_an_error_of_ours():
    def command():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        cli.run(command, "verb")
    assert stop.value.code == 130


def test_a_terminated_run_cleans_up(tmp_path):
    code = (
        "import os, signal, sys\n"
        "from ifp_mlx import cli\n"
        "from ifp_mlx.files import atomic\n"
        "def command():\n"
        "    with atomic.new_folder(sys.argv[1]) as scratch:\n"
        "        (scratch / 'half').write_text('written')\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "cli.run(command, 'verb')\n"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "out"])
    assert run.returncode == 143 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["generate", "compact"])
def test_every_command_explains_itself(verb):
    run = subprocess.run(
        [sys.executable, "-m", f"ifp_mlx.{verb}", "--help"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and "--mask-file" in run.stdout and run.stderr == ""


def kept(share, **origin):
    return Selection((mx.arange(int(64 * share)),) * 2, None, 64, Origin(**origin))


def said(capsys, selection, card=None, **request):
    """Return the lines that are said of a selection."""
    cli.say_quality(selection, card, Request(**request))
    return capsys.readouterr().err.splitlines()


def test_what_the_self_check_found_is_said_and_little_is_warned_of(capsys):
    [line] = said(capsys, kept(0.75, agreement=0.9, kl=0.25))
    assert line == (
        "On the instruction's last tokens: the compact model chooses the dense model's "
        "next token at 90% (KL 0.25 nats)."
    )
    line, warning = said(capsys, kept(0.75, agreement=0.85, kl=0.5, router_mass=0.9))
    assert "the kept experts had 90% of the gate weights; the compact model" in line
    assert warning.startswith("Warning: below 90% the compact model differs from the")


def test_what_was_measured_of_a_task_mask_is_said(capsys):
    found = {"agreement": 0.52, "kl": 1.0, "rows": 40}
    [line] = said(capsys, kept(0.5, evaluation=found))
    assert line == (
        "Note: 50% of the channels, without training for it: this task mask chose the "
        "dense model's next token 52% of the time on 40 other examples."
    )
    found["compensated"] = {"agreement": 0.64, "kl": 0.7}
    compensated = kept(0.5, evaluation=found).compensated([1, 2, 3])
    [line] = said(capsys, compensated)
    assert "64% of the time on 40 other examples" in line


def test_the_models_card_is_quoted_and_names_the_keep_that_takes_enough(capsys):
    about = ("tiny", "channel", "blend", "", 9, 1.0, "0")
    points = [
        Point(kind, keep, 1, agreement + more, 0.1)
        for keep, agreement in ((0.5, 0.7), (0.75, 0.96))
        for kind, more in (("maths", -0.05), ("code", 0.05))
    ]
    card = Card(*about, points=tuple(points), dense_right={})
    quoted = (
        "by the card of tiny, keep {} chooses the dense model's next token at {} of "
        "answers' tokens (maths: {})"
    )
    [line] = said(capsys, kept(0.75), card)
    assert line == f"Note: {quoted.format('0.75', '96%', '91%')}."
    [line] = said(capsys, kept(0.5), card)
    expected = quoted.format("0.5", "70%", "65%")
    assert line == f"Warning: {expected}; 90% takes keep 0.75."
    [line] = said(capsys, kept(0.25), card)
    assert "less than the card of tiny has measured (0.5)" in line
    of_one = Card(*about, points=tuple(points[::2]), dense_right={})
    [line] = said(capsys, kept(0.75), of_one)
    assert line.endswith("at 91% of answers' tokens.")


def test_that_auto_drops_nothing_is_said_with_what_dropping_costs(capsys):
    about = ("tiny", "channel", "blend", "", 9, 1.0, "0")
    points = (
        Point("dialogues", 0.75, 1, 0.6, 0.4),
        Point("dialogues", 0.9, 1, 0.8, 0.1),
    )
    card = Card(*about, points=points, dense_right={})
    [line] = said(capsys, kept(1), card)
    assert line.startswith(
        "Note: this is the whole model: by the card of tiny, keep 0.9 "
    )
    assert "at 80% of answers' tokens, and --keep auto asks for 90%" in line
    [line] = said(capsys, kept(1), card, keep="auto", min_agreement=0.95)
    assert "--keep auto asks for 95%" in line
    assert said(capsys, kept(1), card, keep=1.0) == []
    assert said(capsys, kept(1)) == []


def test_without_a_card_less_than_three_quarters_is_said_to_be_little(capsys):
    [line] = said(capsys, kept(0.5))
    assert "Note: 50% of the channels" in line and "ifp_mlx.evaluate --card" in line
    assert "keep no less than 75%" in line
    assert said(capsys, kept(0.75)) == []


def test_a_trained_predictor_and_a_whole_model_need_no_warning(capsys):
    assert said(capsys, kept(0.25, selector="predictor")) == []
    assert said(capsys, kept(1.0)) == []
