"""The page of auto says what its results say."""

import json

import numpy as np
import pytest

from examples.benchmarks import pages
from examples.benchmarks.auto import report
from ifp_mlx.selection.request import MIN_AGREEMENT

MEASURED = sorted(report.models())


def test_the_page_has_the_tables_of_the_results():
    page = report.PAGE.read_text(encoding="utf-8")
    tables = report.tables()
    assert pages.filled(page, tables) == page
    assert all(mark.format(name) in page for name in tables for mark in pages.MARKS)


@pytest.mark.parametrize("name", MEASURED)
def test_the_self_check_is_close_to_one_and_says_little_of_the_answer(name):
    lines = report.compared(name)
    assert np.mean([line["self_agreement"] for line in lines]) > 0.9
    assert np.mean([line["agreement"] for line in lines]) < 0.9
    for sign in report.SIGNS:
        assert abs(np.nanmean(report.within(lines, sign))) < 0.4


@pytest.mark.parametrize("name", MEASURED)
def test_auto_promises_what_answers_keep_within_ten_points(name):
    for way, card in report.cards_of(name).items():
        for least in (MIN_AGREEMENT, 0.8):
            keep = card.smallest(least)
            promised, had = card.promise(keep), report.agreements(name, keep)
            assert promised >= least and len(had) >= 8
            assert abs(promised - np.mean(had)) <= 0.1, (way, keep)


@pytest.mark.parametrize("name", MEASURED)
def test_no_everyday_answer_goes_round_in_circles_unless_the_dense_models_does(name):
    answers = {(a["question"], a["way"]): a for a in report.lines_of(name, "everyday")}
    for (question, way), answer in answers.items():
        if way == "auto" and report.loops(answer["text"]):
            assert report.loops(answers[question, "dense"]["text"]), (question, way)


@pytest.mark.parametrize("name", MEASURED)
def test_auto_keeps_what_its_card_promises_enough_for(name):
    first = report.cards_of(name)[report.FIRST].smallest(MIN_AGREEMENT)
    for answer in report.lines_of(name, "everyday"):
        if answer["way"] == "auto":
            assert answer["keep"] == pytest.approx(first, abs=0.01)


@pytest.mark.parametrize("name", MEASURED)
def test_the_self_check_takes_a_small_part_of_selecting(name):
    file = report.RESULTS / name / "seconds.json"
    if file.is_file():
        for one in json.loads(file.read_text())["selections"]:
            assert 0 < one["check"] <= 0.15 * one["select"]


def test_a_loop_is_four_words_that_keep_coming():
    assert report.loops("A language that is a language that is " * 3)
    assert not report.loops("The first, the second, the third and the fourth of them.")
