"""The curve of a run as a picture."""

from collections.abc import Sequence
from pathlib import Path

from ..evaluation.plotting import pyplot
from ..files.atomic import new_file


def draw_curve(lines: Sequence[dict[str, float]], path: Path) -> None:
    """Draw the losses of a run's log, and below them the overlaps of its masks.

    Args:
        lines: as :func:`ifp_mlx.training.run.train` returns them.
        path: of the picture; its suffix says the format.

    Raises:
        ImportError: without matplotlib, saying how to get it.
    """
    plt = pyplot()
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(7, 5), layout="constrained", sharex=True
    )
    panels = {
        above: {"loss": "training", "valid_loss": "validation, hard mask"},
        below: {
            "overlap_within": "within a task",
            "overlap_between": "between tasks",
            "overlap_chance": "chance",
        },
    }
    for axes, series in panels.items():
        for name, label in series.items():
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                axes.plot(*zip(*points, strict=True), label=label)
        if axes.lines:
            axes.legend()
    above.set_ylabel("loss, nats per token")
    below.set_ylabel("shared channels")
    below.set_ylim(0, 1.02)
    below.set_xlabel("step")
    with new_file(path) as scratch:
        figure.savefig(scratch)
    plt.close(figure)
