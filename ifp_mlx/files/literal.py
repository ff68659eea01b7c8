"""A path of a folder that no library takes for a pattern."""

import glob
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def literal(folder: Path) -> Iterator[Path]:
    """Yield a path of ``folder`` that is safe for libraries that read paths as
    patterns.

    mlx-lm looks for weights by a pattern that begins with the folder's path: for
    ``model [4bit]`` it would find none, and for ``model*`` those of other folders too.
    Such a folder gets a link for as long as the block lasts.
    """
    if glob.escape(str(folder)) == str(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as place:
        link = Path(place) / "model"
        link.symlink_to(folder.resolve(), target_is_directory=True)
        yield link
