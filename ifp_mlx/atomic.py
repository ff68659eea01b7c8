"""Write beside, then rename: no output is ever left half-written."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a scratch folder that becomes ``path`` when the block ends well.

    Args:
        path: the folder to make; its parents are made too.

    Raises:
        FileExistsError: if ``path`` is already there.
    """
    target = Path(path)
    refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield scratch
        scratch.chmod(0o755)  # mkdtemp makes it private
        refuse_existing(target)
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a scratch file name that replaces ``path`` when the block ends well.

    The scratch name keeps the suffix of ``path``, which some writers insist on.

    Args:
        path: the file to write; an existing file is replaced in one step.
    """
    target = Path(path)
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
