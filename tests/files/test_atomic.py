import shutil
import signal
import subprocess
import sys

import mlx.core as mx
import pytest
from conftest import full_disk

from ifp_mlx.files.atomic import new_file, new_folder, writing


def test_a_folder_appears_only_when_it_is_complete(tmp_path):
    out = tmp_path / "deep" / "out"
    with new_folder(out) as scratch:
        (scratch / "a").write_text("1")
        assert not out.exists()
    assert (out / "a").read_text() == "1" and out.stat().st_mode & 0o777 == 0o755
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_a_failure_leaves_no_folder(tmp_path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "out") as scratch:
        (scratch / "a").write_text("1")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


WRITER = """
import sys
from ifp_mlx.files.atomic import new_folder
with new_folder(sys.argv[1]) as scratch:
    (scratch / "large").write_text("1")
    print(scratch.name, flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_process_left_goes_and_what_a_live_one_writes_stays(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", WRITER, str(out)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as killed:
        left = killed.stdout.readline().strip()
        with subprocess.Popen(command, **pipes) as live:
            other = live.stdout.readline().strip()
            killed.send_signal(signal.SIGKILL)
            killed.wait()
            assert {p.name for p in tmp_path.iterdir()} == {left, other}
            with pytest.raises(ZeroDivisionError), new_folder(out):
                assert (tmp_path / other / "large").read_text() == "1"
                assert not (tmp_path / left).exists()
                raise ZeroDivisionError
            live.communicate("")
            assert live.returncode == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_hidden_folder_of_another_name_is_nobodys_leftover(tmp_path):
    kept = {".out", ".out.backup", ".out2.ifp-12345678", "out.ifp-12345678"}
    for name in kept:
        (tmp_path / name).mkdir()
    with new_folder(tmp_path / "out"):
        pass
    assert {p.name for p in tmp_path.iterdir()} == kept | {"out"}


def test_an_existing_folder_is_not_touched(tmp_path):
    (tmp_path / "out").mkdir()
    with (
        pytest.raises(FileExistsError, match="out already exists; delete it"),
        new_folder(tmp_path / "out"),
    ):
        raise AssertionError("the block must not run")


def test_a_file_is_replaced_in_one_step_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), new_file(path) as scratch:
        scratch.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    with new_file(path) as scratch:
        assert scratch.suffix == ".txt"
        scratch.write_text("new")
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == [
        "a.txt"
    ]


def write_text(folder, path):
    path.write_text("1234")


def write_tensors(folder, path):
    mx.save_safetensors(str(path), {"one": mx.zeros(4)})


def copy_a_file(folder, path):
    shutil.copyfile(folder / "here/a", path)


def copy_a_tree(folder, path):
    shutil.copytree(folder / "here", path.with_name("there"))


def write_inside(folder, path):
    with new_file(path) as scratch:
        scratch.write_text("1234")


WRITERS = [write_text, write_tensors, copy_a_file, copy_a_tree, write_inside]
NO_ROOM = (
    r"out\.safetensors cannot be written: .*(large|Unable).*; choose another place"
)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("kind", [new_file, new_folder])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(kind, writer, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here/a").write_text("1234")
    out = tmp_path / "place/out.safetensors"
    with pytest.raises(OSError, match=NO_ROOM), full_disk(), kind(out) as scratch:
        writer(tmp_path, scratch if kind is new_file else scratch / "a.safetensors")
    left = {"there"} if (kind, writer) == (new_file, copy_a_tree) else set()
    assert {path.name for path in out.parent.iterdir()} == left


@pytest.mark.parametrize("kind", [new_file, new_folder])
def test_a_place_where_nothing_can_be_made_is_said(kind, tmp_path):
    (tmp_path / "file").write_text("1")
    out = tmp_path / "file/out"
    sentence = f"{out} cannot be written: (Not a directory|File exists); choose another"
    with pytest.raises(OSError, match=sentence), kind(out):
        pass


@pytest.mark.parametrize("name", ["", "out", ".out.ifp-1", ".out.2.txt"])
def test_a_place_that_may_not_be_written_is_said(name, tmp_path):
    error = PermissionError(13, "Permission denied", str(tmp_path / name))
    sentence = f"{tmp_path / 'out'} cannot be written: Permission denied; choose"
    with pytest.raises(OSError, match=sentence), writing(tmp_path / "out"):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[read] Unable to read 4 bytes"),
        PermissionError(13, "Permission denied", "a"),
        OSError("model.safetensors ends early; fetch the model again."),
        shutil.SameFileError("a and b are one file"),
    ],
)
def test_what_is_no_matter_of_writing_is_said_as_it_is(error, tmp_path):
    with pytest.raises(type(error)) as caught, writing(tmp_path / "out"):
        raise error
    assert caught.value is error
