"""A path as users write it, with ``~`` for a home folder."""

import argparse
import os
from pathlib import Path


def path_of(name: str | os.PathLike[str]) -> Path:
    """Return a path with its ``~`` or ``~user`` replaced.

    Raises:
        ValueError: if that user's home is unknown.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError:
        user = Path(name).parts[0]
        raise ValueError(
            f"{name} begins with {user}, and there is no home folder of that user; write "
            f"the folder in full, or ./{user} if it is called so."
        ) from None


def named_path(text: str) -> Path:
    """Return a path given to a command: a shell leaves the ``~`` of ``--output=~/here``.

    Raises:
        argparse.ArgumentTypeError: as :func:`path_of`.
    """
    try:
        return path_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
