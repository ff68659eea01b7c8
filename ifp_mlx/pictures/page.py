"""One page that needs nothing else: what selections keep, share and cost."""

import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

import numpy as np

from . import svg
from .measured import Point
from .tally import Tally

COUNTED = {"kl": "KL to dense", "agreement": "agreement", "nll": "NLL", "rows": "rows"}


def page(
    model: str, tally: Tally, quality: Sequence[Point], speed: Sequence[Point]
) -> str:
    """Return the whole page.

    Args:
        model: its name.
        tally: the selections, counted.
        quality: from an evaluation; empty if there is none.
        speed: from benchmarks; empty if there are none.
    """
    room = files(__package__)
    style, script = (
        (room / f"page.{kind}").read_text("utf-8") for kind in ("css", "js")
    )
    sections = [_head(model, tally), _strips(tally)]
    if len(tally.names) > 1:
        sections += [_overlap(tally), _always(tally)]
    sections += [
        _quality(tally, quality),
        _speed(tally, [*quality, *speed]),
        _made(tally),
    ]
    title = escape(f"What {model} keeps")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + f'\n<script type="application/json" id="data">{_data(tally)}</script>\n'
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _data(tally: Tally) -> str:
    """Return the data of the page's script, and every figure of the page, as JSON."""
    data = {
        "names": list(tally.names),
        "layers": int(tally.sizes.shape[1]),
        "unit": tally.units.removesuffix("s"),
        "channels": tally.channels,
        "overlaps": tally.overlaps[..., 0].tolist(),
        "chance": tally.overlaps[..., 1].tolist(),
        "always": tally.always.tolist(),
        "bits": tally.bits(),
    }
    return json.dumps(data).replace("<", "\\u003c").replace("&", "\\u0026")


def _head(model: str, tally: Tally) -> str:
    L = tally.sizes.shape[1]
    kept = tally.sizes.sum(axis=1) / (L * tally.channels)
    several = len(tally.names) > 1
    tiles = [(_range(kept), f"of the {tally.units} are kept by a mask")]
    if several:
        pruned = tally.by_depth[:, tally.pruned].reshape(-1, 2)
        found = pruned.mean(axis=0) if len(pruned) else np.ones(2)
        tiles += [
            (
                f"{found[0]:.0%}",
                f"of them are shared by two masks; chance {found[1]:.0%}",
            ),
            (
                f"{tally.always.mean():.0%}",
                f"of all {tally.units} are kept by every mask; chance "
                f"{tally.always_by_chance.mean():.0%}",
            ),
        ]
    never = tally.shares[:, 0].mean()
    tiles.append((f"{never:.0%}", "are kept by none" if several else "are dropped"))
    boxes = "".join(
        f'<div class="tile"><b>{number}</b><span>{escape(text)}</span></div>'
        for number, text in tiles
    )
    what = f"{len(tally.names)} masks" if several else f"the mask {tally.names[0]}"
    whole = L - len(tally.pruned)
    aside = ""
    if several and whole:
        aside = (
            f" {_layers(whole)} kept whole by all; the shared part counts the other "
            "layers."
        )
    return (
        f"<header><h1>What {escape(what)} keep{'' if several else 's'} of "
        f"{escape(model)}</h1><p class='muted'>{L} layers of {tally.channels} "
        f"{tally.units}.{aside}</p><div class='tiles'>{boxes}</div></header>"
    )


def _layers(count: int) -> str:
    return "One layer is" if count == 1 else f"{count} layers are"


def _range(shares: np.ndarray) -> str:
    low, high = f"{shares.min():.0%}", f"{shares.max():.0%}"
    return low if low == high else f"{low} – {high}"


def _strips(tally: Tally) -> str:
    several = len(tally.names) > 1
    cards, close = [], []
    for number, (name, selection) in enumerate(
        zip(tally.names, tally.selections, strict=True)
    ):
        kept = sum(selection.sizes)
        alone = tally.masks[number] & (tally.kept_by == 1)
        aside = f", {alone.sum() / kept:.0%} of them by no other" if several else ""
        said = f"{name}: {kept} {tally.units} kept{aside}"
        cards.append(
            f'<div class="panel"><h3>{escape(name)} <small>{kept:,} {tally.units}{aside}'
            f'</small></h3><canvas class="strips" data-task="{number}" role="img" '
            f'aria-label="{escape(said)}"></canvas></div>'
        )
        close.append(
            f'<span>{escape(svg.shorten(name))}</span><canvas class="close" '
            f'data-task="{number}" role="img" aria-label="{escape(name)}, one layer">'
            "</canvas>"
        )
    L = tally.sizes.shape[1]
    middle = tally.shown_layers[len(tally.shown_layers) // 2]
    return (
        f"<section><h2>Which {tally.units}</h2><p>A strip is a layer, the first on top; "
        f"its columns are {tally.units}. Sorted, every layer has the {tally.units} of "
        "most masks first, in the same order for all masks.</p>"
        f'<div class="controls">{_ORDER}{_key(len(tally.names))}</div>'
        f'<figure><div class="panels">{"".join(cards)}</div></figure>'
        '<div class="controls"><label>One layer up close: <input type="range" '
        f'id="layer" min="0" max="{L - 1}" value="{middle}" aria-label="layer"/></label>'
        '<span>layer <b id="layer-number"></b></span></div>'
        f'<div class="up-close">{"".join(close)}</div>'
        '<output id="said">Point at one of them to see who keeps it; a click shows its '
        "layer up close.</output><noscript><p>The strips are drawn by this page's "
        "script; everything below needs none.</p></noscript></section>"
    )


_ORDER = (
    '<label><input type="radio" name="order" value="sorted" checked="checked"/> sorted'
    '</label><label><input type="radio" name="order" value="model"/> as in the model'
    "</label>"
)


def _key(count: int, own: str = "by this one alone", none: str = "dropped") -> str:
    """Return what the colours mean for this many masks."""
    kinds = {"all": "kept by all", "some": "by some", "own": own, "none": none}
    if count < 3:
        del kinds["some"]
    if count < 2:
        kinds = {"all": "kept", "none": none}
    return "".join(
        f'<span class="key"><i class="{kind}"></i>{text}</span>'
        for kind, text in kinds.items()
    )


def _overlap(tally: Tally) -> str:
    chance = float(tally.by_depth[:, tally.shown_layers, 1].mean())
    squares = []
    for layer in tally.shown_layers:
        title = f"Shared {tally.units} of every two masks in layer {layer}, in percent"
        drawn = svg.matrix(tally.names, tally.overlaps[:, :, layer], title)
        squares.append(f'<div class="panel"><h3>Layer {layer}</h3>{drawn}</div>')
    L = tally.sizes.shape[1]
    return (
        "<section><h2>Overlap between tasks</h2><p>The share of a mask's "
        f"{tally.units} that another one keeps too, in percent, in the first, the middle and the "
        "last layer that is pruned. Two random masks of this size share "
        f"{chance:.0%}: there the colour fades out.</p>"
        f'<figure><div class="trio">{"".join(squares)}</div>'
        f'<div class="scale">{svg.scale(chance, tally.units)}</div></figure>'
        f"<figure>{_depth(tally)}<figcaption>The same for every layer. Thin lines are "
        f"pairs.</figcaption></figure>{_pairs(tally)}</section>"
        if L > 1
        else ""
    )


def _depth(tally: Tally) -> str:
    L = tally.sizes.shape[1]
    layers = np.arange(L)
    lines = [
        svg.Series(
            f"{one} and {other}",
            np.stack([layers, pair[:, 0]], axis=1),
            "pair",
            legend=False,
        )
        for one, other, pair in tally.pairs()
    ]
    mean = tally.by_depth.mean(axis=0)
    lines += [
        svg.Series("mean of all pairs", np.stack([layers, mean[:, 0]], axis=1), "mean"),
        svg.Series("chance", np.stack([layers, mean[:, 1]], axis=1), "chance"),
    ]
    y = svg.Axis(f"shared {tally.units}", 0, 1, ".0%")
    title = f"Shared {tally.units} of every two masks by layer"
    return svg.chart(title, svg.Axis("layer", 0, L - 1), y, lines)


def _pairs(tally: Tally) -> str:
    rows = []
    for one, other, pair in tally.pairs():
        thirds = [pair, *np.array_split(pair, 3)]
        cells = [f"{s:.0%} (chance {c:.0%})" for s, c in (t.mean(0) for t in thirds)]
        rows.append([f"{one}, {other}", *cells])
    head = ["masks", "all layers", "first third", "middle third", "last third"]
    return f"<details><summary>As a table</summary>{table(head, rows)}</details>"


def _always(tally: Tally) -> str:
    title = f"Share of {tally.units} kept by how many masks, by layer"
    drawn = svg.stacked(title, tally.units, tally.shares, tally.always_by_chance)
    mean, chance = tally.always.mean(), tally.always_by_chance.mean()
    return (
        "<section><h2>Which are always on</h2><p>How much of every layer is kept by "
        f"all {len(tally.names)} masks, by some, by one; the rest is kept by none. "
        f"Kept by all: {mean:.0%} of the {tally.units}; random masks of these sizes would "
        f"have {chance:.0%} in common, the marks.</p><div class='controls'>"
        f"{_key(len(tally.names), 'by one', 'by none')}"
        f"</div><figure>{drawn}</figure></section>"
    )


def _quality(tally: Tally, points: Sequence[Point]) -> str:
    rows = []
    for name, selection in zip(tally.names, tally.selections, strict=True):
        if found := selection.origin.evaluation:
            rows.append(
                [
                    name,
                    f"{sum(selection.sizes) / tally.masks[0].size:.0%}",
                    f"{found['kl']:.3f}",
                    f"{found['agreement']:.1%}",
                    f"{found['nll']:.3f}",
                    str(found["rows"]),
                ]
            )
    text = ["<section><h2>Quality</h2>"]
    if rows:
        head = ["mask", "kept", *COUNTED.values()]
        text.append(
            "<p>Measured on examples that the masks were not made from: KL from the "
            "dense model's next-token distribution in nats per answer token; how often "
            "both would choose the same token.</p>" + table(head, rows)
        )
    if missing := len(tally.names) - len(rows):
        text.append(
            f"<p class='note'>{missing} of {len(tally.names)} masks carry no "
            "measurement; <code>python -m ifp_mlx.tasks make --held-out</code> makes "
            "one.</p>"
        )
    drawn = _by_keep(points, "kl", "KL to the dense model, nats per token", tally.units)
    text.append(drawn or _absent("Quality by keep", "--evaluation"))
    return "".join(text) + "</section>"


def _speed(tally: Tally, points: Sequence[Point]) -> str:
    drawn = _by_keep(points, "speed", "decoding, tokens/s", tally.units)
    if not drawn:
        return f"<section><h2>Speed</h2>{_absent('Speed', '--benchmark')}</section>"
    note = (
        "<p>As measured on the machine that the evaluation or the benchmark ran on, at "
        "batch 1. The dense model is at 100 %.</p>"
    )
    return f"<section><h2>Speed</h2>{note}{drawn}</section>"


def _absent(what: str, option: str) -> str:
    return (
        f"<p class='note'>{what} was not measured for this page; give a result with "
        f"<code>{option}</code>.</p>"
    )


def _by_keep(points: Sequence[Point], value: str, name: str, units: str) -> str:
    """Draw a measured value of every setting against keep; nothing if there is none."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        if (found := getattr(point, value)) is not None:
            lines.setdefault(point.line, []).append((point.keep, found))
            if value == "speed" and point.dense_speed is not None:
                lines[point.line].append((1.0, point.dense_speed))
    if not lines:
        return ""
    series = [
        svg.Series(line, np.array(sorted(set(pairs))), f"c{n % svg.LINES}", marks=True)
        for n, (line, pairs) in enumerate(lines.items())
    ]
    high = max(float(one.points[:, 1].max()) for one in series)
    x, y = (
        svg.Axis(f"kept share of the {units}", 0, 1, ".0%"),
        svg.Axis(name, 0, 1.1 * high),
    )
    drawn = svg.chart(f"{name} by keep", x, y, series)
    return f"<figure>{drawn}</figure>"


def _made(tally: Tally) -> str:
    rows = []
    for name, selection in zip(tally.names, tally.selections, strict=True):
        origin = selection.origin
        made = origin.made or {}
        source = " + ".join(made.get("merged", [])) or origin.instruction or ""
        if "examples" in made:
            source = f"{made['examples']} examples, {made['tokens']} tokens"
        rows.append(
            [
                name,
                origin.selector or "",
                "" if origin.keep is None else f"{origin.keep:.4g}",
                origin.allocation or "",
                source,
                selection.mask_id,
            ]
        )
    head = ["mask", "selector", "keep", "allocation", "made from", "mask id"]
    return f"<section><h2>How they were made</h2>{table(head, rows, numbers=False)}</section>"


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = True
) -> str:
    """Return a table; all columns except the first are numbers, or none are."""
    kinds = ["", *[' class="number"' if numbers else ""] * (len(head) - 1)]
    columns = "".join(
        f'<th scope="col"{kind}>{escape(name)}</th>'
        for kind, name in zip(kinds, head, strict=True)
    )
    lines = "".join(
        "<tr>"
        + "".join(
            f"<td{kind}>{escape(cell)}</td>"
            for kind, cell in zip(kinds, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="table"><table><thead><tr>{columns}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )
