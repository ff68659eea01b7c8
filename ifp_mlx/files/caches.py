"""Where this machine keeps things that can be made again."""

import os
from pathlib import Path


def cache_place(name: str) -> Path:
    """Return the user's folder or file for one kind of cached thing; it need not exist,
    and cannot if the user has no home.
    """
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # as in a container that runs as a user without a name
        home = os.devnull
    return Path(home) / "ifp_mlx" / name
