"""Tables go between the marks of their name, again and again."""

from examples.benchmarks.pages import fill, filled

PAGE = "# A page\n\n<!-- table: one -->\n\nProse.\n"


def test_a_table_is_put_where_its_mark_is_and_replaced_later():
    once = filled(PAGE, {"one": "| a |", "two": "| b |"})
    assert once == (
        "# A page\n\n<!-- table: one -->\n\n| a |\n\n<!-- end of table: one -->\n\nProse.\n"
    )
    assert filled(once, {"one": "| a |"}) == once
    assert filled(once, {"one": "| c |"}) == once.replace("| a |", "| c |")


def test_a_page_that_cannot_be_filled_stays(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    fill(page, {"one": "| a |"})
    assert page.read_text() == filled(PAGE, {"one": "| a |"})
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]
