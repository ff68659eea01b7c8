"""Matplotlib, imported late and set to draw files."""

from typing import Any


def pyplot() -> Any:
    """Return matplotlib's pyplot.

    Raises:
        ImportError: without matplotlib, saying how to get it.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("Pictures need: pip install 'ifp_mlx[plot]'.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt
