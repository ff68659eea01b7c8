"""Draw masks.svg: what three instructions keep of SmolLM2, layer by layer.

python -m examples.guides.pictures.picture

Every row is a layer. Its channels are sorted so that those all three instructions keep
come first, then those two keep, one keeps, and none; a cell is 16 channels.
"""

from itertools import groupby
from pathlib import Path

import numpy as np

from examples.fetch import fetch
from ifp_mlx import load
from ifp_mlx.pictures.tally import Tally

INSTRUCTIONS = (
    "Translate the sentence into French: Where is the station?",
    "Write a SQL query that lists the ten best customers.",
    "Tell me a bedtime story about a small dragon.",
)
KEEP, CELL, SIZE, GAP = 0.5, 16, (4.0, 7.0), 40
SHARED, OWN = np.array([38, 70, 83]), np.array([231, 111, 81])
PAPER, INK = np.array([238, 240, 242]), "#6b7785"


def main() -> None:
    model, _ = load(fetch("smollm2"))
    found = [model.select(t, keep=KEEP, selector="activation") for t in INSTRUCTIONS]
    tally = Tally(INSTRUCTIONS, found)
    masks = np.take_along_axis(tally.masks, tally.order[None], axis=2)
    shared = np.array(masks.all(axis=0))
    panels = [draw(mask, shared, number) for number, mask in enumerate(masks)]
    share = shared.sum() / masks[0].sum()
    Path(__file__).with_name("masks.svg").write_text(page(panels, masks.shape, share))


def draw(mask: np.ndarray, shared: np.ndarray, number: int) -> str:
    """Return one panel's rectangles; ``mask`` and ``shared`` are ``[L, F]``."""
    L, F = mask.shape
    kept = mask.reshape(L, F // CELL, CELL).mean(axis=2)
    common = (mask * shared).reshape(L, F // CELL, CELL).mean(axis=2)
    width, height = SIZE
    left = number * (F // CELL * width + GAP)
    shades: dict[str, str] = {}
    for layer in range(L):
        row = [shade(*pair) for pair in zip(kept[layer], common[layer], strict=True)]
        column = 0
        for colour, run in groupby(row):  # neighbours of one shade are one rectangle
            length = len(list(run))
            x, y = left + column * width, 40 + layer * height
            shape = (
                f"M{x:g} {y:g}h{length * width:g}v{height - 1:g}h-{length * width:g}z"
            )
            shades[colour] = shades.get(colour, "") + shape
            column += length
    paths = "".join(f'<path fill="{c}" d="{d}"/>' for c, d in shades.items())
    return f'<text x="{left:g}" y="24">{INSTRUCTIONS[number]}</text>{paths}'


def shade(kept: float, common: float) -> str:
    """Return a cell's colour from its kept share and the part all three keep."""
    part = round(4 * common / kept) / 4 if kept else 0
    colour = part * SHARED + (1 - part) * OWN
    strength = round(8 * kept) / 8
    r, g, b = (strength * colour + (1 - strength) * PAPER).astype(int)
    return f"#{r:02x}{g:02x}{b:02x}"


def page(panels: list[str], shape: tuple[int, ...], share: float) -> str:
    """Return the whole picture."""
    count, L, F = shape
    width = count * (F // CELL * SIZE[0] + GAP) - GAP
    height = 40 + L * SIZE[1]
    legend = (
        f"Each row is one of {L} layers; half of all channels are kept. Dark: kept by "
        f"all three instructions ({share:.0%} of what each keeps). Orange: kept for "
        "this instruction and not for all."
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-12 0 {width + 24:g} '
        f'{height + 40:g}" font-family="sans-serif" font-size="14" fill="{INK}">\n'
        + "\n".join(panels)
        + f'\n<text x="0" y="{height + 26:g}">{legend}</text>\n</svg>\n'
    )


if __name__ == "__main__":
    main()
