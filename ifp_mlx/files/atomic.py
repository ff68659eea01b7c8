"""Write beside, then rename: no output is ever left half-written."""

import contextlib
import errno
import fcntl
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Unwritten(OSError):
    """A file or folder cannot be written, for want of room or permission.

    Attributes:
        why: the system's reason.
    """

    def __init__(self, path: str | os.PathLike[str], why: str) -> None:
        super().__init__(
            f"{path} cannot be written: {why}; choose another place, or see that this one "
            "has room and may be written."
        )
        self.why = why


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raise :class:`Unwritten` for ``path`` if it cannot be written, whatever the
    error.

    For a full disk Python's own error names no file, MLX raises a ``RuntimeError``, and
    copying a tree raises a list of errors. Where such blocks are nested, the error
    names the outer path. An error about another file stays unchanged.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if why := _reason(error, Path(path)):
            raise Unwritten(path, why) from error
        raise


def _reason(error: Exception, target: Path) -> str | None:
    """Return why ``target`` cannot be written, if an error says that."""
    if isinstance(error, Unwritten):
        return error.why
    if isinstance(error, shutil.Error) and isinstance(error.args[0], list):
        return str(error.args[0][0][-1])
    if isinstance(error, OSError):
        named = error.filename
        if isinstance(named, str) and _is_place_of(target, Path(named)):
            return error.strerror
        return error.strerror if error.errno in NO_ROOM else None
    # MLX's message begins with the name of a function.
    said = re.fullmatch(r"\[(?:write|save\w*)\] (.+?)\.?", str(error))
    return said and said[1]


def _is_place_of(target: Path, named: Path) -> bool:
    """Whether a path is ``target``, a folder that it is in, or its scratch name."""
    scratch = named.parent == target.parent and named.name.startswith(
        f".{target.stem}."
    )
    return scratch or target.is_relative_to(named)


@contextmanager
def new_folder(
    path: str | os.PathLike[str], *, replace: bool = False
) -> Iterator[Path]:
    """Yield a scratch folder that becomes ``path`` when the block ends well.

    Scratch folders that killed processes left behind are deleted first: those are the
    ones without a lock.

    Args:
        path: the folder to make; its parents are made too.
        replace: whether the new folder replaces an existing one, at the end.

    Raises:
        FileExistsError: if ``path`` is already there, unless it is to be replaced.
        Unwritten: if the disk is full, or nothing may be written there.
    """
    target = Path(path)
    if not replace:
        refuse_existing(target)
    with scratch_beside(target) as scratch:
        yield scratch
        scratch.chmod(0o755)  # mkdtemp makes it private
        if replace and target.exists():
            _give_way(target, scratch)
        else:
            refuse_existing(target)
            scratch.rename(target)


@contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """Yield a scratch folder on the disk where ``target`` is to be; deleted at the end.

    Raises:
        Unwritten: for ``target``, if the disk is full, or nothing may be written there.
    """
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _delete_leftovers(target)
        scratch, lock = _locked_scratch(target)
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            os.close(lock)


def _give_way(target: Path, new: Path) -> None:
    """Put ``new`` in the place of ``target``, and delete the old one."""
    old, lock = _locked_scratch(target)
    try:
        target.rename(old)
        new.rename(target)
    finally:
        shutil.rmtree(old, ignore_errors=True)
        os.close(lock)


def _locked_scratch(target: Path) -> tuple[Path, int]:
    """Return a new scratch folder and its lock, which ends with this process."""
    while True:
        made = tempfile.mkdtemp(prefix=f".{target.name}.ifp-", dir=target.parent)
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(made, os.O_RDONLY)
            with contextlib.suppress(OSError):  # not every file system has locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            if os.path.exists(
                made
            ):  # else another process has just deleted it as a leftover
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

    Raises:
        IsADirectoryError: if ``path`` is a folder.
        Unwritten: if the disk is full, or nothing may be written there.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file.")
    with writing(target):
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
