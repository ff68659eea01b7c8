"""A folder by a name that is only a name."""

import glob
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def literal(folder: Path) -> Iterator[Path]:
    """Yield a path of ``folder`` that is no pattern, for libraries that take it for one.

    mlx-lm looks for weights by a pattern that begins with the folder's path: from
    ``model [4bit]`` it would find none, and from ``model*`` those of others too. Such
    a folder has a link to it for as long as the block lasts.
    """
    if glob.escape(str(folder)) == str(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as place:
        link = Path(place) / "model"
        link.symlink_to(folder.resolve(), target_is_directory=True)
        yield link
