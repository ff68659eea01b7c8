"""Charts as SVG that takes its colours from the page it stands in.

Colours are CSS variables, so that a chart is readable in light and dark mode.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

SIZE = 1060, 310  # of a chart, pixels
LETTER = 6.8  # about the width of a character, pixels
LINES = 6  # how many series of a chart have a colour of their own
MAX_LABEL = 18


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: for the legend and the tooltip.
        points: ``[n, 2]``, x and y.
        style: a class of the page's style sheet.
        legend: whether the legend names it.
        marks: whether points are marked.
    """

    name: str
    points: np.ndarray
    style: str
    legend: bool = True
    marks: bool = False


@dataclass(frozen=True)
class Axis:
    """One axis of a chart: its label, its ends, and how a tick is written."""

    label: str
    low: float
    high: float
    form: str = "g"

    def ticks(self) -> list[float]:
        """Return four to eight round numbers from ``low`` to ``high``."""
        span = self.high - self.low
        step = 10.0 ** np.floor(np.log10(span / 4))
        step *= max(m for m in (1, 2, 2.5, 5) if span / (step * m) >= 4 or m == 1)
        first = np.ceil(self.low / step - 1e-9)
        count = int((self.high / step - first) + 1e-9) + 1
        return [float((first + n) * step) for n in range(count)]


def picture(width: float, height: float, title: str, body: str) -> str:
    """Return a picture that scales with the page and says what it shows."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" style="max-width:{width:g}px" '
        f'role="img" '
        f'aria-label="{escape(title)}"><title>{escape(title)}</title>{body}</svg>'
    )


def label(x: float, y: float, text: str, anchor: str = "start", style: str = "") -> str:
    """Return a text at a place."""
    kind = f' class="{style}"' if style else ""
    return (
        f'<text x="{x:.5g}" y="{y:.5g}" text-anchor="{anchor}"{kind}>'
        f"{escape(text)}</text>"
    )


def shorten(name: str) -> str:
    """Return a name that fits beside a picture."""
    return name if len(name) <= MAX_LABEL else name[: MAX_LABEL - 1] + "…"


def matrix(names: Sequence[str], values: np.ndarray, title: str) -> str:
    """Draw how much every two selections share, coloured by its distance from chance.

    Args:
        names: ``N`` names.
        values: ``[N, N, 2]``, overlap and chance.
        title: what it shows.
    """
    N, cell = len(names), max(26, min(54, 270 // len(names)))
    left = LETTER * max(len(shorten(name)) for name in names) + 12
    top = 8
    parts = []
    for row, name in enumerate(names):
        middle = top + (row + 0.5) * cell
        parts.append(label(left - 6, middle + 4, shorten(name), "end"))
        x, y = left + (row + 0.5) * cell, top + N * cell + 14
        parts.append(
            f'<g transform="rotate(-35 {x:g} {y:g})">'
            f"{label(x, y, shorten(name), 'end')}</g>"
        )
        for column, other in enumerate(names):
            share, chance = values[row, column]
            said = f"{name} and {other} share {share:.1%}; chance {chance:.1%}"
            x, y = left + column * cell, top + row * cell
            parts.append(
                f"<g><title>{escape(said)}</title>{_cell(x, y, cell, share, chance)}</g>"
            )
    height = top + N * cell + 24 + 3.6 * max(len(shorten(name)) for name in names)
    return picture(left + N * cell + 4, height, title, "".join(parts))


def _cell(x: float, y: float, size: float, share: float, chance: float) -> str:
    kind, strength = shade(share, chance)
    text = "strong" if strength > 0.55 else "value"
    number = label(x + size / 2, y + size / 2 + 4, f"{100 * share:.0f}", "middle", text)
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{size - 2:g}" height="{size - 2:g}" rx="3" '
        f'class="{kind}" fill-opacity="{strength:.3f}"/>{number}'
    )


def shade(share: float, chance: float) -> tuple[str, float]:
    """Return the class and the opacity that show an overlap: none at chance, full at
    all or nothing.
    """
    if share >= chance:
        return "above", (share - chance) / (1 - chance) if chance < 1 else 0.0
    return "below", (chance - share) / chance


def scale(chance: float, units: str) -> str:
    """Draw the colours of :func:`matrix` from 0 to 1, with chance marked.

    Args:
        chance: k/F.
        units: what is shared, in words.
    """
    steps, width, left = 60, 6, 20
    parts = []
    for step in range(steps):
        kind, strength = shade((step + 0.5) / steps, chance)
        parts.append(
            f'<rect x="{left + step * width}" y="20" width="{width}" height="12" '
            f'class="{kind}" fill-opacity="{strength:.3f}"/>'
        )
    at = left + chance * steps * width
    parts.append(
        f'<rect x="{left}" y="20" width="{steps * width}" height="12" class="frame"/>'
        f'<path class="chance-mark" d="M{at:.5g} 15v22"/>'
    )
    parts.append(label(at, 11, f"chance {chance:.0%}", "middle"))
    for share in (0, 1):
        parts.append(label(left + share * steps * width, 47, f"{share:.0%}", "middle"))
    middle = label(left + steps * width / 2, 47, f"shared {units}", "middle", "muted")
    title = f"Colour scale of shared {units}, chance at {chance:.0%}"
    return picture(2 * left + steps * width, 52, title, "".join(parts) + middle)


def chart(
    title: str,
    x: Axis,
    y: Axis,
    series: Sequence[Series],
    size: tuple[int, int] = SIZE,
) -> str:
    """Draw lines over two axes, with a legend above them."""
    width, height = size
    left, right = 52, width - 24
    legend, top = _legend([line for line in series if line.legend], left, right)
    bottom = height - 44

    def place(point: Sequence[float]) -> tuple[float, float]:
        across = (point[0] - x.low) / (x.high - x.low)
        up = (point[1] - y.low) / (y.high - y.low)
        return left + across * (right - left), bottom - up * (bottom - top)

    parts = []
    for tick in y.ticks():
        level = place((x.low, tick))[1]
        parts.append(f'<path class="grid" d="M{left} {level:.5g}H{right}"/>')
        parts.append(label(left - 6, level + 4, format(tick, y.form), "end", "muted"))
    for tick in x.ticks():
        at = place((tick, y.low))[0]
        parts.append(label(at, bottom + 16, format(tick, x.form), "middle", "muted"))
    parts.append(label((left + right) / 2, height - 8, x.label, "middle"))
    turned = f'<g transform="rotate(-90 13 {(top + bottom) / 2:g})">'
    parts.append(f"{turned}{label(13, (top + bottom) / 2, y.label, 'middle')}</g>")
    for line in series:
        parts.append(_line(line, [place(point) for point in line.points]))
    parts.append(legend)
    return picture(width, height, title, "".join(parts))


def _legend(series: Sequence[Series], left: float, right: float) -> tuple[str, float]:
    """Return the legend, in as many rows as it needs, and where it ends."""
    parts, x, y = [], left, 14
    for line in series:
        width = 50 + LETTER * len(line.name)
        if x > left and x + width > right:
            x, y = left, y + 18
        parts.append(f'<path class="line {line.style}" d="M{x:g} {y}h26"/>')
        parts.append(label(x + 32, y + 4, line.name))
        x += width
    return "".join(parts), y + 20


def _line(line: Series, places: Sequence[tuple[float, float]]) -> str:
    path = "M" + "L".join(f"{a:.5g} {b:.5g}" for a, b in places)
    dots = ""
    if line.marks:
        dots = "".join(
            f'<circle class="dot {line.style}" cx="{a:.5g}" cy="{b:.5g}" r="3.5">'
            f"<title>{escape(line.name)}: {point[0]:g}, {point[1]:.3g}</title></circle>"
            for (a, b), point in zip(places, line.points, strict=True)
        )
    return (
        f'<g><title>{escape(line.name)}</title><path class="line {line.style}" '
        f'd="{path}"/>{dots}</g>'
    )


def stacked(title: str, units: str, shares: np.ndarray, expected: np.ndarray) -> str:
    """Draw for every layer which share of its units each number of selections keeps.

    Args:
        title: what it shows.
        units: what they are, in words.
        shares: ``[L, N + 1]``, kept by exactly 0 … ``N`` selections.
        expected: ``[L]``, the share that all would keep by chance.
    """
    L, N = shares.shape[0], shares.shape[1] - 1
    left, top, width, height = 52, 10, 1000, 210
    bar = width / L
    parts = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        level = top + height * (1 - tick)
        parts.append(f'<path class="grid" d="M{left} {level:g}h{width}"/>')
        parts.append(label(left - 6, level + 4, f"{tick:.0%}", "end", "muted"))
    for layer, row in enumerate(shares):
        below = 0.0
        for count in range(N, 0, -1):
            part = height * row[count]
            said = f"layer {layer}: {row[count]:.1%} kept by {count} of {N}"
            parts.append(
                f'<rect x="{left + layer * bar:.5g}" width="{bar * 0.86:.4g}" '
                f'y="{top + height - below - part:.5g}" height="{part:.4g}" '
                f'class="{count_class(count, N)}" fill-opacity="{opacity(count, N):.3g}">'
                f"<title>{said}</title></rect>"
            )
            below += part
        if layer % max(1, L // 10) == 0:
            middle = left + (layer + 0.43) * bar
            parts.append(
                label(middle, top + height + 16, str(layer), "middle", "muted")
            )
    marks = "".join(
        f"M{left + layer * bar:.5g} {top + height * (1 - share):.5g}h{bar * 0.86:.4g}"
        for layer, share in enumerate(expected)
    )
    parts.append(f'<path class="chance-mark" d="{marks}"/>')
    parts.append(label(left + width / 2, top + height + 34, "layer", "middle"))
    turned = f'<g transform="rotate(-90 13 {top + height / 2:g})">'
    axis = label(13, top + height / 2, f"share of the {units}", "middle")
    parts.append(f"{turned}{axis}</g>")
    return picture(left + width + 8, top + height + 42, title, "".join(parts))


def count_class(count: int, of: int) -> str:
    """Return the class of a unit that ``count`` of ``of`` selections keep."""
    return "all" if count == of else "own" if count == 1 else "some"


def opacity(count: int, of: int) -> float:
    """Return the opacity of units that ``count`` of ``of`` selections keep: between one
    and all, more is stronger.
    """
    between = count_class(count, of) == "some"
    return 0.45 + 0.55 * (count - 1) / (of - 2) if between and of > 3 else 1.0
