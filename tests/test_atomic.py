import pytest

from ifp_mlx.atomic import new_file, new_folder


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
