"""The page on checked answers says what its results say, and what must hold does."""

import json
import re

import pytest

from examples.benchmarks import pages
from examples.benchmarks.checking import measure, report
from ifp_mlx.evaluation import checked

TEXT = report.PAGE.read_text(encoding="utf-8")
ANSWERS = report.load_answers()


def test_every_table_is_on_the_page_as_the_results_give_it():
    tables = report.tables()
    assert pages.filled(TEXT, tables) == TEXT
    assert all(mark.format(name) in TEXT for name in tables for mark in pages.MARKS)


def test_no_measured_figure_stands_outside_the_tables():
    prose = re.sub(r"<!-- table: .*?<!-- end of table: .*? -->", "", TEXT, flags=re.S)
    assert not re.findall(r"\d*\.\d+|\d+ ?%", prose)


@pytest.mark.parametrize("arm", report.EXACT)
def test_exact_answers_are_the_dense_models_but_for_ties(arm):
    lines = ANSWERS[arm]
    assert len(lines) == len(measure.PROMPTS) == 20
    assert all(line["gap"] <= report.TIE for line in report.other(lines))


@pytest.mark.parametrize(("keep", "most"), [("0.75", 0.10), ("0.5", 0.25)])
def test_little_is_read_beside_streaming(keep, most):
    lines = ANSWERS[f"{report.STORE}, keep {keep}, check exact, 8 drafted"]
    assert report.read_share(lines) <= most


def test_the_tighter_the_tolerance_the_nearer_the_answer():
    found = [checked.summary(ANSWERS[arm]) for arm in report.NEARLY]
    before = [values["before"] for values in found]
    assert before == sorted(before) and before[-1] == 1
    free, *middle, _, exact = (values["nats"] for values in found)
    assert [free, *middle] == sorted([free, *middle], reverse=True) > [exact]
    checks = [report.tokens_per_check(ANSWERS[arm]) for arm in report.NEARLY[1:]]
    assert checks == sorted(checks, reverse=True)


def test_channels_that_follow_the_answer_bring_more_tokens_a_check():
    for keep in ("0.75", "0.5"):
        arm = f"{report.STORE}, keep {keep}, check exact"
        follow = ANSWERS[f"{arm}, reselect drift"]
        assert report.tokens_per_check(follow) > report.tokens_per_check(ANSWERS[arm])


def test_the_peak_of_memory_is_what_is_needed():
    found = json.loads((report.RESULTS / "memory.json").read_text(encoding="utf-8"))
    for keep, most in {"0.5": 1.15, "0.25": 1.3}.items():
        case = found[keep]
        needed = case["compact"] + case["rest"] + case["kv"]
        assert found["dense"] > case["limit"]
        for name in ("plain", "store"):
            assert case[name]["same"]
            assert case[name]["peak"] - case["idle"] <= most * needed
