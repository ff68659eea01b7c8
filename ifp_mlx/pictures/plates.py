"""The page's pictures as PNG files, drawn by matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.plotting import pyplot
from ..files.atomic import new_file
from .measured import Point
from .tally import Tally

COLOURS = {"none": "#eef1f3", "all": "#1d4e63", "some": "#3f9c93", "own": "#d9572f"}
TURNING = ["#c4472b", "#fafafa", "#12706a"]  # colours of overlap 0, chance, 1
INK, CHANCE = "#1f2a30", "#a3154f"


def draw_all(
    tally: Tally, points: Sequence[Point], folder: Path, *, dpi: int = 130
) -> list[Path]:
    """Draw what there is to draw into a folder, and return the files.

    Args:
        tally: the selections, counted.
        points: what was measured by keep, or nothing.
        folder: made if missing; files of the same names are replaced.
        dpi: dots per inch.

    Raises:
        ImportError: without matplotlib.
    """
    plt = pyplot()
    figures = {"strips": draw_strips(plt, tally)}
    if len(tally.names) > 1:
        figures["overlap"] = draw_matrices(
            [tally.overlaps[:, :, layer, 0] for layer in tally.shown_layers],
            [f"layer {layer}" for layer in tally.shown_layers],
            tally.names,
            chance=float(tally.by_depth[:, tally.shown_layers, 1].mean()),
            units=tally.units,
        )
        figures["depth"] = draw_depth(plt, tally)
        figures["always"] = draw_always(plt, tally)
    for value, name in (("kl", "quality"), ("speed", "speed")):
        if any(getattr(point, value) is not None for point in points):
            figures[name] = draw_by_keep(plt, points, value, tally.units)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        with new_file(paths[-1]) as scratch:
            figure.savefig(scratch, dpi=dpi, bbox_inches="tight", facecolor="white")
        plt.close(figure)
    return paths


def draw_strips(plt: Any, tally: Tally) -> Any:
    """Return the figure of every mask's strips, a layer a row, sorted units."""
    from matplotlib.colors import ListedColormap

    N, L, F = tally.masks.shape
    columns = 1 if N == 1 else 2
    rows = -(-N // columns)
    size = (6 * columns, (max(0.09 * L, 0.4) + 0.6) * rows + 0.5)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    shared = np.where(tally.kept_by == N, 1, np.where(tally.kept_by == 1, 3, 2))
    colours = ListedColormap(list(COLOURS.values()))
    for axis, mask, name in zip(axes.flat, tally.masks, tally.names, strict=False):
        kinds = np.take_along_axis(np.where(mask, shared, 0), tally.order, axis=1)
        axis.imshow(
            kinds, cmap=colours, vmin=0, vmax=3, aspect="auto", interpolation="nearest"
        )
        axis.set_title(name, loc="left", fontsize=10, color=INK)
        axis.set_ylabel("layer", color=INK)
        axis.set_yticks(sorted({0, L - 1}))
        axis.set_xticks([])
        axis.set_xlabel(f"{F} {tally.units}, most shared first", color=INK)
    for axis in axes.flat[N:]:
        axis.set_visible(False)
    names = {"all": "kept by all", "some": "by some", "own": "by this alone"}
    if N < 3:
        del names["some"]
    if N < 2:
        names = {"all": "kept"}
    patches = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[kind]) for kind in names]
    figure.legend(patches, names.values(), loc="upper right", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / size[1]))
    return figure


def draw_matrices(
    layers: Sequence[np.ndarray],
    titles: Sequence[str],
    names: Sequence[str],
    *,
    chance: float,
    units: str = "channels",
) -> Any:
    """Return the figure of overlaps of every two tasks, a square for every layer.

    Args:
        layers: ``[N, N]`` each, shares.
        titles: of the squares.
        names: ``N`` names.
        chance: the share of two random masks, at which the colours change.
        units: what is shared, in words.

    Source: Hou et al. 2025 (arXiv:2501.02086) fig. 3.
    """
    from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm

    plt = pyplot()
    side = max(2.6, 0.26 * len(names))
    size = (side * len(layers) + 2.0, side + 1.0)
    figure, axes = plt.subplots(1, len(layers), figsize=size, squeeze=False)
    colours = LinearSegmentedColormap.from_list("chance", TURNING)
    turn = TwoSlopeNorm(min(max(chance, 0.01), 0.99), 0, 1)
    for axis, values, title in zip(axes.flat, layers, titles, strict=True):
        image = axis.imshow(values, norm=turn, cmap=colours)
        axis.set_title(title, fontsize=10, color=INK)
        small = 9 if len(names) < 8 else 7
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=small)
        own = names if axis is axes[0, 0] else []
        axis.set_yticks(range(len(own)), own, fontsize=small)
        if len(names) <= 8:
            for (a, b), share in np.ndenumerate(values):
                colour = "white" if share > chance + 0.7 * (1 - chance) else INK
                where = {"ha": "center", "va": "center", "color": colour}
                axis.text(b, a, f"{100 * share:.0f}", fontsize=8, **where)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, label=f"shared {units}")
    bar.set_ticks([0, chance, 1], labels=["0", f"{chance:.0%}, chance", "100%"])
    bar.ax.axhline(chance, color=CHANCE, linewidth=2)
    return figure


def draw_depth(plt: Any, tally: Tally) -> Any:
    """Return the figure of every pair's overlap by layer, with chance."""
    figure, axis = plt.subplots(figsize=(7, 3.2))
    for pair in tally.by_depth:
        axis.plot(pair[:, 0], color="#8795a1", linewidth=0.8, alpha=0.6)
    mean = tally.by_depth.mean(axis=0)
    axis.plot(mean[:, 0], color="#12706a", linewidth=2.4, label="mean of all pairs")
    axis.plot(mean[:, 1], "--", color=CHANCE, label="chance")
    axis.set(xlabel="layer", ylabel=f"shared {tally.units}", ylim=(0, 1.02))
    _tidy(axis)
    return figure


def draw_always(plt: Any, tally: Tally) -> Any:
    """Return the figure of how many masks keep a unit, by layer."""
    figure, axis = plt.subplots(figsize=(7, 3.2))
    L, N = tally.shares.shape[0], tally.shares.shape[1] - 1
    parts = {
        "all": tally.always,
        "some": tally.shares[:, 2:N].sum(axis=1),
        "own": tally.shares[:, 1] if N > 1 else np.zeros(L),
    }
    names = {"all": "kept by all", "some": "by some", "own": "by one"}
    below = np.zeros(L)
    for kind, part in parts.items():
        bars = {"color": COLOURS[kind], "label": names[kind], "width": 0.86}
        axis.bar(range(L), part, bottom=below, **bars)
        below = below + part
    ends = np.arange(L)[:, None] + [-0.43, 0.43]
    for expected, (start, end) in zip(tally.always_by_chance, ends, strict=True):
        axis.plot([start, end], [expected] * 2, color=CHANCE, linewidth=1.6)
    axis.plot([], [], color=CHANCE, label="by all, by chance")
    axis.set(xlabel="layer", ylabel=f"share of the {tally.units}", ylim=(0, 1.02))
    _tidy(axis)
    return figure


def draw_by_keep(plt: Any, points: Sequence[Point], value: str, units: str) -> Any:
    """Return the figure of a measured value against keep, a line a setting."""
    figure, axis = plt.subplots(figsize=(7, 3.2))
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        if (found := getattr(point, value)) is not None:
            lines.setdefault(point.line, []).append((point.keep, found))
    for line, pairs in lines.items():
        axis.plot(*zip(*sorted(pairs), strict=True), marker="o", label=line)
    labels = {"kl": "KL to dense, nats per token", "speed": "decoding, tokens/s"}
    axis.set(xlabel=f"kept share of the {units}", ylabel=labels[value])
    axis.set_xlim(0, 1)
    axis.set_ylim(bottom=0)
    _tidy(axis)
    return figure


def _tidy(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=9)
