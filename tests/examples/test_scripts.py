"""The short scripts of examples/ do what their first lines say, and leave nothing."""

import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Run a script in an empty folder, which is that of temporary files, too; return
    what it and its processes said.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def run_script(name, *arguments):
        script = str(EXAMPLES / name)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(script, run_name="__main__")
        return capfd.readouterr()

    yield run_script
    assert list(tmp_path.iterdir()) == []


def test_each_question_selects_for_itself_and_is_answered(run):
    out = run("select_and_generate.py").out
    answers = re.findall(r"\? (\S+)\n", out)
    assert answers == ["Allemagne", "Espagne", "Norwegia"]
    found = re.findall(r"kept: (\d+) of (\d+) channels, (\d+) of them", out)
    kept, there, shared = zip(*(map(int, row) for row in found), strict=True)
    assert kept == (256, 256, 256) and there == (1024, 1024, 1024)
    assert shared[0] == 256 and shared[1] > 1.5 * shared[2]


def test_a_task_mask_answers_its_own_task_and_no_other(run):
    out = run("task_mask.py").out
    assert re.search(r"french\.safetensors: \d{4} bytes, mask [0-9a-f]{12}\n", out)
    assert "in French? Allemagne\n" in out and "for Brazil? Brésil\n" in out
    assert "of Japan. " in out and "JPY" not in out


def test_mlx_lm_answers_from_a_smaller_compact_folder(run):
    out = run("compact_folder.py").out
    whole, compact = map(float, re.findall(r": ([\d.]+) MB", out))
    assert 0 < compact < 0.6 * whole
    assert out.endswith("in French? Allemagne\n")


def test_a_store_answers_as_the_folder_and_wants_a_quarter(run):
    out = run("channel_store.py").out
    wanted, there = map(int, re.search(r"wanted: (\d+) of (\d+) bytes", out).groups())
    assert 4 * wanted == there > 0
    assert out.endswith("from the folder: Allemagne\nfrom the store: Allemagne\n")


def test_the_engine_streams_and_answers_two_at_once(run):
    out = run("engine_asyncio.py").out
    assert "in Polish? Norwegia\n  256 of 1024 channels\n" in out
    assert out.endswith("\nAllemagne\nEspagne\n")


@pytest.mark.coreml
def test_the_exported_package_is_held_to_mlx(run):
    pytest.importorskip("coremltools")
    done = run("core_ml.py")
    assert 0.1 < float(re.search(r"mlpackage: ([\d.]+) MB", done.out)[1]) < 1
    assert "Running it needs a Mac" in done.out
    assert "the same greedy tokens over 8 decode steps" in done.err


@pytest.mark.long
@pytest.mark.coreml
def test_the_package_can_be_kept(run, tmp_path_factory):
    pytest.importorskip("coremltools")
    out = tmp_path_factory.mktemp("kept") / "french.mlpackage"
    checkpoint = EXAMPLES.parent / "ifp_mlx" / "checkpoint"
    run("core_ml.py", checkpoint, out)
    assert (out / "Manifest.json").is_file()


def test_without_coremltools_one_sentence_says_what_to_install(tmp_path):
    code = "import sys, runpy; sys.modules['coremltools'] = None; "
    code += f"runpy.run_path({str(EXAMPLES / 'core_ml.py')!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    sentence = "Core ML needs coremltools; run pip install '.[coreml]' first.\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", sentence)
