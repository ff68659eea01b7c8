"""What pages and comments point to is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLACES = ("ifp_mlx", "convert", "examples", "tests")
PAGES = sorted(
    [*ROOT.glob("*.md"), *(p for f in PLACES for p in ROOT.glob(f"{f}/**/*.md"))]
)
TEXTS = [path for path in PAGES if path.name != "CHANGELOG.md"]  # it tells the past
TEXTS += sorted(path for f in PLACES for path in ROOT.glob(f"{f}/**/*.py"))
TEXTS += [ROOT / "Makefile", ROOT / "pyproject.toml"]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_point_to_something(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


def test_paths_and_modules_of_examples_that_are_named_exist():
    missing = []
    for file in TEXTS:
        text = file.read_text(encoding="utf-8")
        named = re.findall(r"(?<![\w/.-])examples/[\w./-]*\w", text)
        modules = re.findall(r"-m\s+(examples(?:\.\w+)+)", text)
        named += [f"{module.replace('.', '/')}.py" for module in modules]
        missing += [(name_of(file), n) for n in named if not (ROOT / n).exists()]
    assert missing == []
