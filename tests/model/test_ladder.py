"""How much is kept where nothing is said: the smallest of a few that agrees."""

from dataclasses import replace

import mlx.core as mx
import pytest
from conftest import run_command, swept, write_family, write_folder
from mlx.utils import tree_flatten

from ifp_mlx import load
from ifp_mlx.generate import main as answer
from ifp_mlx.model.agreement import smallest_that_agrees
from ifp_mlx.model.card import Card, Point
from ifp_mlx.model.checkpoint import Compact
from ifp_mlx.model.compact_cache import CompactCache, prepare_once
from ifp_mlx.model.decide import decide
from ifp_mlx.model.fit import Limits
from ifp_mlx.selection.config import IFPConfig
from ifp_mlx.selection.request import MIN_AGREEMENT, Request
from ifp_mlx.selection.top_k import select

TEXT = "Say hello to everyone."


@pytest.fixture
def model(tiny_folder):
    return load(tiny_folder)[0]


def decided(model, *, limits=None, **options):
    return decide(Request(instruction=TEXT, **options), model, limits=limits)


def sizes_of(decision):
    return [rung.size for rung in decision.rungs]


# What is tried


@pytest.mark.parametrize("keep", [None, "auto"])
def test_three_quarters_then_nine_tenths_then_everything_are_tried(model, keep):
    decision = decided(model, keep=keep)
    assert sizes_of(decision) == [48, 58, 64]  # of 64
    assert [rung.selector for rung in decision.rungs] == ["blend", "blend", "all"]
    assert {rung.least for rung in decision.rungs} == {MIN_AGREEMENT}
    assert decision.rungs[-1].larger is None


def test_a_size_that_is_given_is_the_only_one(model):
    for given in ({"keep": 0.5}, {"target_size": 32}):
        decision = decided(model, **given)
        assert sizes_of(decision) == [32] and decision.least is None
        assert decided(model, **given, min_agreement=0.9).least == 0.9


def test_a_word_that_is_no_share_is_refused():
    with pytest.raises(ValueError, match="keep='most' is not a share .* or auto"):
        Request(instruction=TEXT, keep="most")


def test_the_folders_own_size_is_taken_unless_auto_is_asked_for(tiny_folder):
    IFPConfig(target_size=24).save(tiny_folder)
    model, _ = load(tiny_folder)
    assert sizes_of(decided(model)) == [24]
    assert sizes_of(decided(model, keep="auto")) == [48, 58, 64]


@pytest.mark.parametrize(
    "options", [{"selector": "random"}, {"selector": "prior"}, {"check": "exact"}]
)
def test_where_nothing_is_compared_or_all_is_checked_the_first_is_taken(model, options):
    decision = decided(model, **options)
    assert sizes_of(decision) == [48] and decision.least is None


def test_sizes_that_a_granularity_makes_equal_are_tried_once(model):
    assert sizes_of(decided(model, granularity=32)) == [64]
    assert sizes_of(decided(model, granularity=16)) == [48, 64]


def test_of_experts_whole_ones_are_tried_and_routed_alone(tmp_path):
    model, _ = load(write_family(tmp_path / "m", "qwen3_moe"))
    decision = decided(model)
    assert sizes_of(decision) == sorted(
        {round(s * model.channels) for s in (0.75, 0.9, 1)}
    )
    assert decision.selector == "activation" and not decision.compensate


def test_a_card_says_which_are_worth_trying(model):
    points = [
        Point("reading", keep, 5, agreement, 0.1)
        for keep, agreement in ((0.25, 0.5), (0.5, 0.85), (0.625, 0.95))
    ]
    card = Card("tiny", "channel", "blend", "", 90, 1.5, "0", tuple(points), {})
    model.card = card
    assert sizes_of(decided(model)) == [32, 40, 64]
    assert sizes_of(decided(model, min_agreement=0.9)) == [40, 64]
    assert sizes_of(decided(model, min_agreement=0.99)) == [64]
    assert decided(model, min_agreement=0.99).selector == "all"
    assert sizes_of(decided(model, selector="random")) == [32]


def limits_for(model, size, **options):
    """Return limits in which just so many channels a layer fit."""
    low, high = 10**4, 10**8
    while high - low > 1:
        middle = (low + high) // 2
        limits = Limits(32, middle)
        try:
            decided(model, limits=limits, target_size=size, **options)
            high = middle
        except ValueError:
            low = middle
    return Limits(32, high)


def test_memory_bounds_what_is_tried(model):
    model.compute_prior()
    for most, tried in ((63, [48, 58, 63]), (50, [48, 50]), (48, [48]), (20, [20])):
        limits = limits_for(model, most)
        assert sizes_of(decided(model, limits=limits)) == tried
        assert sizes_of(decided(model, limits=limits, keep="auto")) == tried
    with pytest.raises(ValueError, match=r"are allowed; --keep 0\.\d+ fits"):
        decided(model, limits=limits, target_size=most + 1)


def test_memory_is_filled_where_nothing_is_compared(model):
    model.compute_prior()
    for most in (20, 60):
        limits = limits_for(model, most, selector="random")
        assert sizes_of(decided(model, limits=limits, selector="random")) == [most]


def test_the_machine_bounds_it_too(model, monkeypatch):
    least = model.footprint.total_bytes(decided(model, keep=0.6).sizes, 32)
    monkeypatch.setattr("ifp_mlx.model.fit.physical_memory", lambda: least)
    assert sizes_of(decided(model, limits=Limits(32))) == [38]
    found = decided(model, limits=Limits(32), selector="random")
    assert sizes_of(found) == [38], "no more than fits, if less than the first"


def test_of_what_is_tried_next_only_what_fits_is_left(model):
    decision = decided(model)
    assert sizes_of(decision.within(lambda rung: rung.size < 60)) == [48, 58]
    assert sizes_of(decision.within(lambda rung: rung.size != 58)) == [48]
    assert sizes_of(decision) == [48, 58, 64]


# What stands


def tried_by(decision, agreements):
    """Return the sizes that are made, and what stands, if each agrees so far."""
    sizes = []

    def make(rung):
        sizes.append(rung.size)
        made = select(mx.zeros((3, 64)), [rung.size] * 3)
        agreement = agreements.get(rung.size)
        origin = replace(made.origin, agreement=agreement)
        return Compact(replace(made, origin=origin), None)

    return sizes, lambda: smallest_that_agrees(decision, make)


@pytest.mark.parametrize(
    "agreements, expected",
    [
        ({48: 0.8}, [48]),
        ({48: 0.79, 58: 1.0}, [48, 58]),
        ({48: 0.5, 58: 0.79}, [48, 58, 64]),  # everything needs no comparing
    ],
)
def test_the_first_that_agrees_stands(model, agreements, expected):
    sizes, run = tried_by(decided(model), agreements)
    assert run().selection.sizes == [expected[-1]] * 3 and sizes == expected


def test_where_the_largest_that_fits_does_not_agree_it_is_refused(model):
    model.compute_prior()
    decision = decided(model, limits=limits_for(model, 50))
    sizes, run = tried_by(decision, {48: 0.2, 50: 0.4})
    wanted = "keeps 78% of the channels, .* at 40.0% .* min_agreement=0.8 is asked for"
    with pytest.raises(ValueError, match=wanted):
        run()
    assert sizes == [48, 50]


def test_a_model_that_agrees_too_little_is_kept_larger(tmp_path):
    model, _ = load(write_folder(tmp_path / "m", "qwen3"))
    first, second = (model.select(TEXT, target_size=k) for k in (48, 58))
    assert first.origin.agreement < MIN_AGREEMENT <= second.origin.agreement
    found = model.select(TEXT)
    assert found.mask_id == second.mask_id and found.origin.keep == 58 / 64
    assert found.origin == second.origin
    less = first.origin.agreement
    assert model.select(TEXT, keep="auto", min_agreement=less).mask_id == first.mask_id
    everything = model.select(TEXT, min_agreement=1.0)
    assert everything.origin.selector == "all"


def test_one_is_gone_before_the_next_is_made(tmp_path):
    shape = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 2048}
    folder = write_folder(tmp_path / "wide", "qwen3", num_hidden_layers=8, **shape)
    model, _ = load(folder)
    options = {"selector": "activation", "min_agreement": 1.0, "allocation": "uniform"}
    tried = []
    attempt = model.attempt
    model.attempt = lambda rung, **how: tried.append(rung.size) or attempt(rung, **how)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    _, small, _ = swept(model, TEXT, **options)
    assert len(tried) > 1, "or nothing was given up"
    size = sum(w.nbytes for _, w in tree_flatten(small.parameters()))
    assert mx.get_peak_memory() - before < 1.3 * size


def test_the_one_that_stood_comes_from_the_cache(tmp_path):
    model, _ = load(write_folder(tmp_path / "m", "qwen3"))
    cache = CompactCache(tmp_path / "cache")

    def made(**options):
        decision = decided(model, compensate=False, **options)
        return prepare_once(model, decision, cache, iter)

    first, again, fixed = made(), made(), made(target_size=48)
    assert (first.cache, again.cache, fixed.cache) == ("miss", "hit", "miss")
    assert fixed.selection.origin.keep == 0.75 < first.selection.origin.keep
    assert first.selection.mask_id == again.selection.mask_id
    more = made(min_agreement=1.0)
    assert more.cache == "miss" and more.selection.origin.selector == "all"


@pytest.mark.parametrize("keep", [(), ("--keep", "auto")])
def test_the_command_takes_auto(tiny_folder, capsys, keep):
    given = ("--model", tiny_folder, *keep, "-p", TEXT, "-m", 2, "--no-compensate")
    status, _, err = run_command(answer, capsys, *given)
    expected = load(tiny_folder)[0].select(TEXT)
    assert status == 0 and f"{sum(expected.sizes)} of 192 channels" in err
