"""Selections, quality and speed as one page that needs nothing else."""

from collections.abc import Sequence
from pathlib import Path

from ..files.atomic import new_file
from .measured import Point
from .page import page
from .plates import draw_all
from .tally import Tally


def visualize(
    model: str,
    tally: Tally,
    output: Path,
    *,
    quality: Sequence[Point] = (),
    speed: Sequence[Point] = (),
    png_folder: Path | None = None,
) -> list[Path]:
    """Write the page, and the pictures if a folder is given; return the files.

    Args:
        model: its name, for the title.
        tally: the selections, all of one model.
        output: the HTML file; an existing one is replaced.
        quality: settings measured by ``evaluate``.
        speed: settings timed by ``benchmark``.
        png_folder: where the pictures go as PNG files; needs matplotlib.
    """
    written = [output]
    if png_folder is not None:  # first: it fails early without matplotlib
        written += draw_all(tally, [*quality, *speed], png_folder)
    with new_file(output) as scratch:
        scratch.write_text(page(model, tally, quality, speed), encoding="utf-8")
    return written
