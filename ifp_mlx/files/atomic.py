"""Write beside, then rename: no output is ever left half-written."""

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a scratch folder that becomes ``path`` when the block ends well.

    What a killed process left of the same folder is deleted first: its scratch folder
    is the one that nobody holds a lock on.

    Args:
        path: the folder to make; its parents are made too.

    Raises:
        FileExistsError: if ``path`` is already there.
    """
    target = Path(path)
    refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _delete_leftovers(target)
    scratch, lock = _locked_scratch(target)
    try:
        yield scratch
        scratch.chmod(0o755)  # mkdtemp makes it private
        refuse_existing(target)
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(lock)


def _locked_scratch(target: Path) -> tuple[Path, int]:
    """Return a new scratch folder and its lock, which ends with this process."""
    while True:
        made = tempfile.mkdtemp(prefix=f".{target.name}.ifp-", dir=target.parent)
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(made, os.O_RDONLY)
            with contextlib.suppress(OSError):  # not every file system has locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            if os.path.exists(made):  # else another took it for a leftover just now
                return Path(made), lock
            os.close(lock)


def _delete_leftovers(target: Path) -> None:
    for folder in target.parent.glob(f".{glob.escape(target.name)}.ifp-*"):
        try:
            lock = os.open(folder, os.O_RDONLY)
        except OSError:  # it has just become its target, or is not ours
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # a live process writes it
            pass
        finally:
            os.close(lock)


@contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a scratch file name that replaces ``path`` when the block ends well.

    The scratch name keeps the suffix of ``path``, which some writers insist on.

    Args:
        path: the file to write; an existing file is replaced in one step.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file.")
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(
        prefix=f".{target.stem}.", suffix=target.suffix, dir=target.parent
    )
    os.close(handle)
    scratch = Path(name)
    try:
        yield scratch
        scratch.chmod(0o644)
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)


def refuse_existing(path: Path) -> None:
    """Raise ``FileExistsError`` if ``path`` is already there.

    Long jobs call this before they start, :func:`new_folder` again at the end.
    """
    if path.exists():
        raise FileExistsError(
            f"{path} already exists; delete it or choose another output path."
        )
