"""The page on experts says what its results say, and its measurement can be repeated."""

import json
import re

import numpy as np
import pytest

pytest.importorskip("babel")
pytest.importorskip("reasoning_gym")

from examples.benchmarks import pages
from examples.benchmarks.experts import measure, report

TEXT = report.PAGE.read_text(encoding="utf-8")
RESULTS = report.load_results()


def points(name, way, share):
    result = RESULTS[name]
    return report.lost(result, way, report.at_share(result, share)).mean()


def test_every_table_is_on_the_page_as_the_results_give_it():
    assert {"pools", "no-pools"} <= set(RESULTS)
    for name in report.TABLES:
        assert all(mark.format(name) in TEXT for mark in pages.MARKS)
    assert pages.filled(TEXT, report.tables(RESULTS)) == TEXT


def test_no_measured_figure_stands_outside_the_tables():
    prose = re.sub(r"<!-- table: .*?<!-- end of table: .*? -->", "", TEXT, flags=re.S)
    prose = re.sub(r"arXiv:[\d.]+", "", prose)
    found = re.findall(r"\d*\.\d+|\d+ ?%", prose)
    assert set(found) == {"0.7"}  # the level of the warning
    assert report.LOW_AGREEMENT == 0.7


def test_half_the_experts_of_a_domain_are_enough_where_the_static_ones_are_not():
    assert points("pools", "task", 0.5) <= 2
    assert points("pools", "static", 0.5) >= 10


def test_the_sum_does_better_than_the_mean_and_shares_than_ranks_wherever_it_matters():
    for share in measure.SHARES:
        assert points("pools", "task", share) < points("pools", "task_mean", share)
        assert points("pools", "blend", share) < points("pools", "blend_ranks", share)
        assert points("pools", "prompt", share) < points("pools", "blend", share)


def test_a_mask_of_another_domain_is_as_bad_as_a_random_one_at_half():
    other, random, static = (
        points("pools", way, 0.5) for way in ("other", "random", "static")
    )
    assert abs(other - random) < 5 and min(other, random) > static + 5


def test_agreement_foretells_next_to_nothing_in_the_checkpoint():
    for found in RESULTS["pools"]["foretold"].values():
        could = np.array(found["right_whole"]) > 0
        for sign in ("agreement", "router_mass"):
            right, says = (np.array(found[key])[could] for key in ("right", sign))
            shown = report.correlation(says, right)
            assert shown == "–" or abs(float(shown)) < 0.1


def test_an_ordinary_mixture_breaks_even_with_task_masks():
    assert points("no-pools", "task", 0.5) > 10


def test_sliced_models_answered_as_masked_ones():
    for result in RESULTS.values():
        assert {found["sliced_same"] for found in result["foretold"].values()} == {
            len(result["domains"])
        }


def test_correlations_are_pearsons_or_none():
    line = np.array([0.0, 1.0, 2.0])
    assert report.correlation(line, -line) == "-1.00"
    assert report.correlation(line, 0 * line) == "–"


def test_a_short_measurement_gives_every_figure_of_the_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "SHARES", (0.5, 0.25))
    sizes = ["--questions", "2", "--examples", "2", "--told", "1"]
    measure.main([*sizes, "--name", "pools", "--results", str(tmp_path)])
    found = json.loads((tmp_path / "pools.json").read_text())
    page = pages.filled(TEXT, report.tables({"pools": found}))
    assert page != TEXT
    assert list(found["accuracy"]) == list(RESULTS["pools"]["accuracy"])
    assert np.mean(found["whole"]) > np.mean(found["accuracy"]["random"]["4"])
    assert {f["sliced_same"] for f in found["foretold"].values()} == {21}


def test_a_domain_has_no_question_in_both_of_its_halves():
    lab = measure.Lab(measure.CHECKPOINT, questions=2, per_task=16)
    for first, second in lab.train:
        one, two = ({tuple(row[1]) for row in half} for half in (first, second))
        assert len(one) == len(two) == 16 and not one & two


def test_agreement_says_less_of_the_ordinary_mixture_than_of_the_checkpoint():
    quarter = RESULTS["pools"]["foretold"]["4"]
    half = RESULTS["no-pools"]["foretold"]["8"]
    assert abs(np.mean(quarter["agreement"]) - np.mean(half["agreement"])) < 0.05
    assert np.mean(half["right"]) < np.mean(quarter["right"]) - 0.3
