"""All the Swift that we ship is Swift: as far as a parser can tell."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path
    for room in ("ifp_mlx", "examples")
    for path in ROOT.glob(f"{room}/**/*.swift")
    if ".build" not in path.parts
)
LINUX = ROOT / "ifp_mlx/bundling/swift"


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="module")
def parse():
    swift = pytest.importorskip("tree_sitter_swift", reason="pip install '.[test]'")
    from tree_sitter import Language, Parser

    parser = Parser(Language(swift.language()))
    # The grammar has no version in canImport; Swift has.
    known = re.compile(r"(canImport\(\w+), _version: \d+\)")

    def parsed(text: str):
        return parser.parse(known.sub(r"\1)", text).encode()).root_node

    return parsed


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_swift_file_can_be_parsed(path, parse):
    assert not parse(path.read_text(encoding="utf-8")).has_error


def test_the_parser_finds_a_mistake(parse):
    text = (LINUX / "Sources/IFPBundle/ModelBundle.swift").read_text()
    assert parse(text.replace("public func missing(", "public fun missing(")).has_error


def test_files_that_nobody_compiled_say_so():
    def is_plain(path: Path) -> bool:
        return path.is_relative_to(LINUX) and "IFPProvider" not in path.parts

    for path in (path for path in FILES if path.name != "Package.swift"):
        head = " ".join(path.read_text().split()[:60]).lower()
        said = "not compiled" in head or "neither compiled" in head
        assert said != is_plain(path), name_of(path)
