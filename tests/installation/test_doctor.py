"""What the doctor finds, on this machine and on worse ones."""

import json
import os
import subprocess
import sys
from importlib import metadata

import pytest
from conftest import run_command

from ifp_mlx.doctor import main as doctor
from ifp_mlx.installation import machine, packages, places

REQUIREMENTS = [
    'mlx[cpu]<0.33,>=0.32.4; sys_platform == "linux"',
    'mlx<0.33,>=0.32.4; sys_platform == "darwin"',
    "mlx-lm<0.33,>=0.32.2",
    "tqdm",
    'shtab; extra == "completion"',
    'no-such-thing>=2; extra == "far"',
    'pytest; extra == "test"',
]


@pytest.fixture(autouse=True)
def requirements(monkeypatch):
    """What the package asks for, whatever of it is installed here."""
    monkeypatch.setattr(packages.metadata, "requires", lambda name: REQUIREMENTS)


def of(findings):
    return {found.name: found for found in findings}


def test_this_machine_works_and_every_finding_is_a_line(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    status, out, err = run_command(doctor, capsys, "--json")
    *lines, last = out.splitlines()
    report = json.loads(last)
    assert (status, err, report["usable"]) == (0, "", True)
    assert lines[-1] == "Everything that is needed works."
    remedies = sum(found["remedy"] is not None for found in report["findings"])
    assert len(lines) == len(report["findings"]) + remedies + 1
    found = {one["name"]: one for one in report["findings"]}
    assert found["mlx"]["said"] == metadata.version("mlx")
    assert "Allemagne" in found["answer"]["said"] and "device" in found


def test_it_answers_where_mlx_is_missing(tmp_path):
    code = (
        "import sys; sys.modules['mlx'] = None\n"
        "from ifp_mlx.__main__ import main; main(['doctor'])"
    )
    (tmp_path / "mlx.py").write_text("raise ImportError('libmlx.so: no such file')")
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert (done.returncode, done.stderr) == (1, "")
    (broken,) = [line for line in done.stdout.splitlines() if line.startswith("fix")]
    assert "MLX" in broken and "libmlx.so: no such file" in broken
    assert "> pip install --force-reinstall 'mlx" in done.stdout
    assert done.stdout.endswith("Fix what is marked: fix.\n")


def test_a_package_that_is_missing_or_of_another_version_must_be_fixed(monkeypatch):
    real = metadata.version
    versions = {"mlx-lm": "0.33.1"}

    def version(name):
        if name == "tqdm":
            raise metadata.PackageNotFoundError(name)
        return versions.get(name) or real(name)

    monkeypatch.setattr(packages.metadata, "version", version)
    found = of(packages.packages())
    assert found["mlx-lm"].state == "fix"
    assert found["mlx-lm"].said == "0.33.1, and <0.33,>=0.32.2 is needed"
    assert found["mlx-lm"].remedy == "pip install 'mlx-lm<0.33,>=0.32.2'"
    assert (found["tqdm"].state, found["tqdm"].said) == ("fix", "is missing")
    assert found["mlx"].state == "ok"


def test_extras_are_on_or_off_and_say_how_to_get_them():
    found = of(packages.packages())
    assert found["[completion]"].state == "ok" and "[test]" not in found
    assert found["[far]"].state == "off"
    assert found["[far]"].remedy == "pip install 'ifp-mlx[far]'"


def test_without_an_installation_the_packages_are_looked_for_all_the_same(monkeypatch):
    def requires(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packages.metadata, "requires", requires)
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    found = of(packages.packages())
    assert found["ifp_mlx"].state == "note" and found["mlx-lm"].state == "ok"


def test_a_python_that_is_too_old_or_translated_is_said(monkeypatch):
    monkeypatch.setattr(packages.sys, "version_info", (3, 9))
    assert of(packages.packages())["python"].state == "fix"
    monkeypatch.undo()
    monkeypatch.setattr(packages.sys, "platform", "darwin")
    monkeypatch.setattr(packages.platform, "machine", lambda: "x86_64")
    found = packages._python()
    assert found.state == "fix" and "Rosetta" in found.said


def tried(monkeypatch, *results):
    """Let the trials end like this."""
    left = iter(results)
    monkeypatch.setattr(machine, "_tried", lambda *arguments: next(left))
    return of(machine.machine())


def said(metal, files=(), **info):
    device = "Device(gpu, 0)" if metal else "Device(cpu, 0)"
    about = {"metal": metal, "device": device, "info": info}
    return 0, json.dumps(about | {"files": [*files]}) + "\n", ""


ANSWERS = (0, "Allemagne\n", "")


def test_metal_is_named_with_what_it_may_use(monkeypatch):
    info = {"device_name": "Apple M9", "max_recommended_working_set_size": 12 * 10**9}
    found = tried(monkeypatch, said(True, **info), ANSWERS)
    assert (
        found["device"].said == "Metal on Apple M9, at best 12.0 GB of memory at once"
    )
    assert "BLAS" not in found and found["answer"].state == "ok"


@pytest.mark.parametrize("installed", ["libopenblas.so.0", None])
def test_the_slow_blas_of_the_wheel_is_said_and_how_to_get_a_quick_one(
    monkeypatch, installed
):
    monkeypatch.setattr(machine.sys, "platform", "linux")
    monkeypatch.setattr(machine, "find_library", lambda name: installed)
    found = tried(monkeypatch, said(False, ["/x/libblas-1.so"]), ANSWERS)["BLAS"]
    assert found.state == "note" and found.said.startswith("/x/libblas-1.so, MLX's own")
    preload = "export LD_PRELOAD=libopenblas.so.0"
    install = "" if installed else "apt-get install libopenblas0-pthread; "
    assert found.remedy == install + preload
    files = ["/x/libblas-1.so", "/y/libopenblas.so.0"]
    found = tried(monkeypatch, said(False, files), ANSWERS)["BLAS"]
    assert (found.state, found.said) == ("ok", "/y/libopenblas.so.0, preloaded")


def test_the_compiler_is_looked_for_where_mlx_compiles_by_it(monkeypatch):
    monkeypatch.setattr(machine.sys, "platform", "linux")
    monkeypatch.delenv("MLX_DISABLE_COMPILE")
    for path, state in (("/bin/g++", "ok"), (None, "note")):
        monkeypatch.setattr(machine.shutil, "which", lambda name, path=path: path)
        assert tried(monkeypatch, said(False), ANSWERS)["g++"].state == state


def test_a_model_that_does_not_answer_must_be_fixed(monkeypatch):
    found = tried(monkeypatch, said(True), (1, "", "ImportError: transformers"))
    assert found["answer"].state == "fix"
    assert "ImportError: transformers" in found["answer"].said


def test_a_trial_that_dies_says_so():
    code = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    assert machine._tried("-c", code) == (-11, "", "it ended with status -11")
    assert machine._tried("-c", "raise SystemExit('no')") == (1, "", "no")


def test_caches_have_a_size_and_a_command_that_empties_them(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "ifp_mlx/compact"
    folder.mkdir(parents=True)
    (folder / "entry").write_bytes(b"x" * 1500)
    (folder / "link").symlink_to(folder / "entry")
    found = of(places.places())
    assert found["compact models"].said == f"{folder}, 1.50 kB"
    assert found["compact models"].remedy.startswith(f"rm -r {folder}")
    assert found["cards"].said == f"{tmp_path}/ifp_mlx/cards, empty"


def test_a_cache_that_cannot_be_made_and_a_full_disk_are_noted(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(places, "LOW_DISK", 1 << 62)
    found = of(places.places())
    assert found["cards"].state == "note" and "cannot be made" in found["cards"].said
    assert found["disk"].state == "note"


def test_variables_are_named_and_no_secret_is_told(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hush")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = of(places.places())["environment"].said
    assert "HF_HUB_OFFLINE=1" in said and "HF_TOKEN is set" in said
    assert "hush" not in said
