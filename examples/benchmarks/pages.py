"""Pages that people write, with tables that scripts put in."""

from collections.abc import Mapping
from pathlib import Path

from ifp_mlx.files.atomic import new_file

MARKS = "<!-- table: {} -->", "<!-- end of table: {} -->"


def filled(text: str, tables: Mapping[str, str]) -> str:
    """Return a page with each table between the two marks of its name; the page must
    have at least the first mark.
    """
    for name, table in tables.items():
        first, last = (mark.format(name) for mark in MARKS)
        before, found, rest = text.partition(first)
        if found:
            _, ended, after = rest.partition(last)
            text = f"{before}{first}\n\n{table}\n\n{last}{after if ended else rest}"
    return text


def fill(page: Path, tables: Mapping[str, str]) -> None:
    """Put tables into a page, or leave it as it was."""
    text = filled(page.read_text(encoding="utf-8"), tables)
    with new_file(page) as scratch:
        scratch.write_text(text, encoding="utf-8")
