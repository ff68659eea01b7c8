import subprocess
import sys

import mlx.core as mx
import pytest

from ifp_mlx import Selection, cli
from ifp_mlx.selection.masks import Origin


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


def test_a_low_keep_is_said_with_what_was_measured(capsys):
    cli.warn_of_low_keep(kept(0.5))
    half = capsys.readouterr().err
    assert "50% of the channels" in half and half.count("\n") == 1
    known = {keep: f"{share:.0%}" for keep, share in cli.AGREEMENT.items()}
    assert f"{known[0.5]} of the time, {known[0.75]} at --keep 0.75" in half
    cli.warn_of_low_keep(kept(0.25))
    assert "SmolLM2-135M with 33% chooses" in capsys.readouterr().err
    card = {"agreement": 0.52, "kl": 1.0, "rows": 40}
    cli.warn_of_low_keep(kept(0.5, evaluation=card))
    assert "this task mask chose" in (err := capsys.readouterr().err)
    assert "52% of the time on 40 other examples" in err


def test_a_keep_that_models_bear_and_a_trained_predictor_need_no_warning(capsys):
    cli.warn_of_low_keep(kept(0.75))
    cli.warn_of_low_keep(kept(0.25, selector="predictor"))
    assert capsys.readouterr().err == ""
