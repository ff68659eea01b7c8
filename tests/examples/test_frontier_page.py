"""The page on the frontier says what its results say, and what must hold does."""

import re

import pytest

from examples.benchmarks.frontier import report
from examples.benchmarks.frontier.points import BASES, KEEPS, Point
from examples.benchmarks.pages import filled

TEXT = report.PAGE.read_text(encoding="utf-8")
MODELS = {model.name: model for model in report.models()}
each_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


def test_the_page_is_what_the_results_make():
    assert report.page(list(MODELS.values())) == TEXT


def test_no_measured_figure_stands_in_what_is_not_made_of_results():
    assert not re.findall(r"\d*\.\d+ ?(?:nats|MB|%)", report.HEAD + report.HOW)


@each_model
def test_every_point_has_all_rows(model):
    rows = {name: set(result.rows) for name, result in model.results.items()}
    assert len(set(map(frozenset, rows.values()))) == 1
    assert len({family for family, _ in rows["dense"]}) == 5


@each_model
def test_the_dense_model_is_no_distance_from_itself(model):
    dense = model.results["dense"]
    assert dense.mean() < 1e-5 and dense.mean("agreement") == 1


@each_model
def test_fewer_bits_take_fewer_bytes_and_are_further_away(model):
    found = [model.results.get(Point("affine", bits).name) for bits in (8, 4, 3, 2)]
    known = [result for result in found if result is not None]
    for more, fewer in zip(known, known[1:], strict=False):
        assert more.bytes > fewer.bytes and more.mean() < fewer.mean()


@each_model
@pytest.mark.parametrize("bits", BASES)
def test_fewer_channels_take_fewer_bytes(model, bits):
    found = [model.results.get(Point("select", bits, keep=k).name) for k in KEEPS]
    sizes = [result.bytes for result in found if result is not None]
    assert sizes == sorted(set(sizes), reverse=True)
    whole = model.results.get(Point("affine", bits).name)
    assert whole is None or all(size < whole.bytes for size in sizes)


@each_model
def test_the_frontier_is_monotone(model):
    every = [*model.whole, *model.selections]
    some = [r for r in every if r.point.name in model.frontier]
    some.sort(key=lambda result: result.bytes)
    distances = [result.mean() for result in some]
    assert some and distances == sorted(distances, reverse=True)


@each_model
def test_what_won_has_less_kl_than_every_whole_model_of_no_more_bytes(model):
    for bits in BASES:
        for one in model.won(bits):
            small = [r for r in model.whole if r.bytes <= one.bytes]
            assert one.mean() < min(map(report.Result.mean, small))


@each_model
def test_spans_are_where_the_best_that_fits_is_a_selection(model):
    every = [*model.whole, *model.selections]
    spans = model.ruled_by_selections()
    for budget in sorted(result.bytes for result in every):
        fits = [result for result in every if result.bytes <= budget]
        best = min(fits, key=report.Result.mean)
        inside = [s for s in spans if s[0] <= budget and (not s[1] or budget < s[1])]
        assert bool(inside) == (best.point.kind == "select")


def test_the_first_page_shows_the_results():
    text = report.README.read_text(encoding="utf-8")
    assert filled(text, {"frontier": report.short(MODELS["smollm2"])}) == text
    assert "affine 4/64" not in text, "it has words for every point"


def test_half_of_the_channels_is_nearer_than_three_bits_unless_these_are_distilled():
    found = MODELS["smollm2"].results
    three, half, distilled = (
        found[name] for name in ("affine 3/64", "select 4/64 keep 0.5", "dwq 3/64")
    )
    assert half.bytes < three.bytes == distilled.bytes
    assert half.less(three)[1] > 0 > half.less(distilled)[2]


@each_model
def test_the_first_page_is_right_about_fewer_bits(model):
    fitted = ("awq", "dwq", "gptq")
    selections = [one for one in model.selections if one.point.bits == 4]
    assert len(selections) > 5
    for one in selections:
        smaller = [w for w in model.whole if w.bytes <= one.bytes]
        rounded = [w.mean() for w in smaller if w.point.kind not in fitted]
        assert all(one.mean() < kl for kl in rounded)
    kl = {name: result.mean() for name, result in model.results.items()}
    keep = {"smollm2": 0.75, "gemma3": 0.4}[model.name]
    assert kl["dwq 3/64"] < kl[f"select 4/64 keep {keep}"]
