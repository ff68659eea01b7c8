"""Write examples/quality.md: what selection costs, in one table for each model.

    python examples/quality.py

From examples/selectors-*.csv, the rows that selectors_bench.py measured.
"""

from bench_report import DENSE, ONE_TOKEN, PAGES, interval, macro, read_rows, ways_of
from bench_ways import DEFAULT, STAGES

MODELS = {"smollm2": "SmolLM2-135M-Instruct", "gemma3": "Gemma-3-270m (base)"}
KEEPS = sorted({stage.keep for stage in STAGES}, reverse=True)

HEAD = """# What selection costs untrained models

Written by `python examples/quality.py` from the rows that `selectors_bench.py` measured:
ten families of tasks, float32 on a Linux CPU, not run on a Mac. In each cell: KL from the
dense model's next-token distribution in nats per answer token, its 95 % interval, and how
often both would choose the same token. Rows are few at some keeps, so compare ways within
a keep, and by the paired intervals on the page of each model, which also says how the
means are taken. Both models come from 4-bit files and are small; what larger ones bear is
not measured here.
"""

READING = """"""


def page() -> str:
    """Return the page, for all models that were measured."""
    text = [HEAD]
    for name, title in MODELS.items():
        if (PAGES / f"selectors-{name}.csv").exists():
            text += [f"## {title}", "", *model_table(name), ""]
    return "\n".join([*text, READING])


def model_table(name: str) -> list[str]:
    """Return a model's lines, a row of the table for each way."""
    cells, rows = cells_of(read_rows(name))
    ways = list(dict.fromkeys(way for way, _ in cells))
    counts = ", ".join(f"{rows[keep]} at keep {keep:.3g}" for keep in KEEPS)
    text = [
        f"Rows in the means: {counts} ([more about them](selectors-{name}.md)).",
        "",
        "| scores, allocation | " + " | ".join(f"{k:.3g}" for k in KEEPS) + " |",
        "|---" * (len(KEEPS) + 1) + "|",
    ]
    for way in ways:
        label = f"**{way}** (the default)" if way == DEFAULT.name else way
        row = [cells.get((way, keep), "") for keep in KEEPS]
        text.append(f"| {label} | {' | '.join(row)} |")
    return text


def cells_of(
    lines: list[dict],
) -> tuple[dict[tuple[str, float], str], dict[float, int]]:
    """Return each way's cell at each keep, from the stage with most rows, and how many
    rows that keep has.
    """
    cells: dict[tuple[str, float], str] = {}
    rows: dict[float, int] = {}
    for stage in STAGES:
        ways = ways_of(lines, stage)
        if not ways[DENSE]:
            continue
        dense = ways[DENSE].items()
        count = sum(len(found) for name, found in dense if name not in ONE_TOKEN)
        rows.setdefault(stage.keep, count)
        for way in stage.ways:
            found = ways[way.name]
            low, high = interval(found)
            text = f"{macro(found, 'kl'):.2f} [{low:.2f}, {high:.2f}]"
            text += f", {macro(found, 'agreement'):.0%}"
            text += "" if count == rows[stage.keep] else f" ({count} rows)"
            cells.setdefault((way.name, stage.keep), text)
    return cells, rows


if __name__ == "__main__":
    (PAGES / "quality.md").write_text(page(), encoding="utf-8")
