"""The plan's predictions beside the paper's own table."""

import pytest

from examples.benchmarks import plan_paper


def test_the_papers_table_is_met_by_the_same_model():
    for name, *cells in plan_paper.rows():
        for cell in filter(None, cells):
            found, paper = map(float, cell.split(" / "))
            assert found == pytest.approx(paper, rel=0.35), (name, cell)
    page = plan_paper.PAGE.read_text(encoding="utf-8")
    assert all(cell in page for row in plan_paper.rows() for cell in row)
