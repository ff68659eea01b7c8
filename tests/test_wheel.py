"""What an installation puts on a machine."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    int(version("setuptools").split(".")[0]) < 77, reason="setuptools is too old"
)
ROOT = Path(__file__).parent.parent
BUILD = "import setuptools.build_meta as b, sys; b.build_wheel(sys.argv[1])"
HELP = """
import sys
from ifp_mlx.__main__ import main
for verb in ("convert", "to-coreml"):
    try:
        main([verb, "--help"])
    except SystemExit as stop:
        assert stop.code == 0
import ifp_mlx
print(ifp_mlx.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A folder with what the wheel holds."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    hidden = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "ifp_mlx", source / "ifp_mlx", ignore=hidden)
    for name in ("convert", "examples"):  # what lies beside it
        (source / name).mkdir()
        (source / name / "module.py").touch()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-c", BUILD, str(folder)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_a_wheel_holds_the_package_and_nothing_beside_it(wheel):
    package, about = sorted(path.name for path in wheel.iterdir())
    assert package == "ifp_mlx" and about.startswith("ifp_mlx-")
    assert about.endswith(".dist-info")


def test_a_wheel_holds_every_file_of_the_package(wheel):
    def files(root):
        found = root.glob("ifp_mlx/**/*")
        return {path.relative_to(root) for path in found if path.is_file()}

    here = {path for path in files(ROOT) if "__pycache__" not in path.parts}
    assert files(wheel) == here


def test_an_installed_package_converts_and_exports(wheel, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", HELP],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(wheel)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "--hf-path" in done.stdout and "--mask-file" in done.stdout
    assert Path(done.stdout.splitlines()[-1]) == wheel / "ifp_mlx/__init__.py"
