"""How much is kept where nothing is said: the smallest share that the card promises enough
for, which is measured first if there is none.
"""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from conftest import run_command, write_family, write_folder

from ifp_mlx import load
from ifp_mlx.generate import main as answer
from ifp_mlx.model import trial
from ifp_mlx.model.card import CARD_FILE, GIVEN, Card, Point
from ifp_mlx.model.compact_cache import CompactCache, prepare_once
from ifp_mlx.model.decide import decide
from ifp_mlx.model.fit import Limits
from ifp_mlx.selection.calibration import calibration_chats
from ifp_mlx.selection.config import IFPConfig
from ifp_mlx.selection.request import MIN_AGREEMENT, Request

TEXT = "Say hello to everyone."


@pytest.fixture
def model(tiny_folder):
    return load(tiny_folder)[0]


def card_of(**agreements):
    """Return a card of promises by keep in per cent: ``k75=0.9``."""
    points = [
        Point("reading", int(name[1:]) / 100, 5, agreement, 0.1)
        for name, agreement in agreements.items()
    ]
    return Card("tiny", "channel", "blend", "", 90, 1.5, "0", tuple(points), {})


def decided(model, *, limits=None, **options):
    return decide(Request(instruction=TEXT, **options), model, limits=limits)


# What the card decides


@pytest.mark.parametrize("keep", [None, "auto"])
@pytest.mark.parametrize(
    ("least", "size"), [(None, 40), (0.5, 16), (0.9, 40), (0.96, 64), (1.0, 64)]
)
def test_the_smallest_that_the_card_promises_enough_for_is_kept(
    model, keep, least, size
):
    model.card = card_of(k25=0.5, k50=MIN_AGREEMENT - 0.01, k62=0.95)
    decision = decided(model, keep=keep, min_agreement=least)
    assert decision.size == size  # of 64
    assert decision.selector == ("all" if size == 64 else "blend")


def test_what_a_card_promised_is_not_asked_of_the_instruction_too(model):
    model.card = card_of(k25=0.9)
    assert decided(model, min_agreement=0.9).least is None
    assert decided(model, keep=0.5, min_agreement=0.9).least == 0.9


def test_a_size_that_is_given_needs_no_card(model, monkeypatch):
    monkeypatch.setattr(trial, "tried", None)
    for given in ({"keep": 0.5}, {"target_size": 32}):
        assert decided(model, **given).size == 32
    assert not (model.path / CARD_FILE).exists()


def test_a_word_that_is_no_share_is_refused():
    with pytest.raises(ValueError, match="keep='most' is not a share .* or auto"):
        Request(instruction=TEXT, keep="most")


def test_the_folders_own_size_is_taken_unless_auto_is_asked_for(tiny_folder):
    IFPConfig(target_size=24).save(tiny_folder)
    model, _ = load(tiny_folder)
    model.card = card_of(k75=1)
    assert decided(model).size == 24
    assert decided(model, keep="auto").size == 48


@pytest.mark.parametrize(
    "options", [{"selector": "random"}, {"selector": "prior"}, {"check": "exact"}]
)
def test_where_a_card_says_nothing_three_quarters_are_kept(model, options):
    assert decided(model, **options).size == 48
    assert not (model.path / CARD_FILE).exists()


# Its first card


def test_a_model_without_a_card_is_tried_once(tiny_folder, monkeypatch):
    model, _ = load(tiny_folder)
    decision = decided(model)
    card = Card.from_json((tiny_folder / CARD_FILE).read_text())
    assert card == model.card and card.answers == GIVEN
    assert card.keeps() == [48 / 64, 58 / 64] and card.selector == "blend"
    promised = [*card.keeps(), 1.0]
    enough = [k for k in promised if card.promise(k) >= MIN_AGREEMENT]
    assert decision.size == enough[0] * 64
    monkeypatch.setattr("ifp_mlx.model.decide.tried", None)
    again, _ = load(tiny_folder)
    assert decided(again).size == decision.size


def test_where_the_folder_cannot_be_written_the_cache_has_it(
    tiny_folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tiny_folder / CARD_FILE).mkdir()  # nothing can be put there
    model, _ = load(tiny_folder)
    size = decided(model).size
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 1
    (tiny_folder / CARD_FILE).rmdir()
    monkeypatch.setattr("ifp_mlx.model.decide.tried", None)
    assert decided(load(tiny_folder)[0]).size == size


def test_a_coarse_granularity_leaves_the_card_as_it_is(model):
    assert decided(model, granularity=16).size in (48, 64)
    assert model.card.keeps() == [48 / 64, 58 / 64], "as any other request tries them"


def test_of_experts_whole_ones_are_tried(tmp_path):
    model, _ = load(write_family(tmp_path / "m", "qwen3_moe"))
    decision = decided(model)
    units = model.channels
    assert model.card.keeps() == sorted({round(s * units) / units for s in (0.75, 0.9)})
    assert "tokens of given answers" in model.card.sample
    assert model.card.unit == "expert" and decision.size <= units
    assert not decision.compensate


def test_two_experts_are_too_few_to_try(tmp_path):
    folder = write_family(tmp_path / "m", "qwen3_moe", num_experts=2)
    model, _ = load(folder)
    assert decided(model).size == 2 and not (folder / CARD_FILE).exists()


def by_hand(model, dense, share):
    """Return what a card should say of a share, from whole models and no cache."""
    same, kl = [], []
    for dialogue in trial.dialogues():
        question, answer = trial.parts_of(model, dialogue)
        text = mx.array([*question, *answer[:-1]])[None]
        at = slice(len(question) - 1, None)
        made = model.prepare(decide(Request(instruction=question, keep=share), model))
        # The answer is read after what the dense model made of the question.
        cache = made.kv
        for layer in cache:
            layer.trim(1)
        found = made.model(text[:, at], cache=cache)[0]
        said = dense(text)[0, at]
        p, q = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (said, found))
        same += (p.argmax(-1) == q.argmax(-1)).tolist()
        kl += (mx.exp(p) * (p - q)).sum(-1).tolist()
    return np.mean(same), np.mean(kl)


def tried(model, *shares):
    def how(tokens, share):
        return decide(Request(instruction=tokens, keep=share), model)

    return trial.tried(model, shares, how)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe"])
def test_a_card_says_what_whole_models_would(family, tmp_path):
    model, _ = load(write_family(tmp_path / "m", family))
    card = tried(model, 0.5, 0.75)
    for point in card.points:
        agreement, kl = by_hand(model, model.dense(), point.keep)
        assert point.agreement == pytest.approx(agreement, abs=1e-6)
        assert point.kl == pytest.approx(kl, rel=1e-3, abs=1e-6)


def test_everything_agrees_with_itself(model):
    (point,) = tried(model, 1.0).points
    assert point.agreement == 1 and point.kl == pytest.approx(0, abs=1e-5)


def test_the_dialogues_select_nothing_else():
    known = json.dumps(calibration_chats())
    for question, reply in trial.dialogues():
        assert (question["role"], reply["role"]) == ("user", "assistant")
        assert question["content"] not in known and reply["content"] not in known


# Memory


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


def test_what_does_not_fit_is_refused_with_the_cards_figures(model):
    model.compute_prior()
    model.card = card_of(k50=0.5, k75=0.7, k90=0.9)
    least = {"min_agreement": 0.85}
    assert decided(model, limits=limits_for(model, 60), **least).size == 58
    tight = limits_for(model, 40)
    wanted = (
        r"No more than 62% of the channels of .* fit\. by the card of tiny, keep 0\.62 "
        r"chooses .* at 60% of .*; min_agreement=0\.85 is asked for, which takes 90%\."
    )
    with pytest.raises(ValueError, match=wanted):
        decided(model, limits=tight, **least)
    assert decided(model, limits=tight, min_agreement=0.5).size == 32
    assert decided(model, limits=tight, keep=0.62).size == 40
    with pytest.raises(ValueError, match=r"are allowed; --keep 0\.\d+ fits"):
        decided(model, limits=tight, target_size=41)


def test_of_a_first_card_no_more_is_tried_than_fits(model):
    model.compute_prior()
    found = decided(model, limits=limits_for(model, 40), min_agreement=0.01)
    assert found.size == 40
    assert not (model.path / CARD_FILE).exists(), "who has more memory tries more"


def test_memory_is_filled_where_a_card_says_nothing(model):
    model.compute_prior()
    for most in (20, 60):
        limits = limits_for(model, most, selector="random")
        assert decided(model, limits=limits, selector="random").size == most


def test_the_machine_bounds_it_too(model, monkeypatch):
    least = model.footprint.total_bytes(decided(model, keep=0.6).sizes, 32)
    monkeypatch.setattr("ifp_mlx.model.fit.physical_memory", lambda: least)
    assert decided(model, limits=Limits(32), min_agreement=0.01).size == 38
    found = decided(model, limits=Limits(32), selector="random")
    assert found.size == 38, "no more than fits, if less than three quarters"


# What comes of it


def test_a_given_share_that_agrees_too_little_is_refused(tmp_path):
    model, _ = load(write_folder(tmp_path / "m", "qwen3"))
    agreement = model.select(TEXT, target_size=48).origin.agreement
    assert agreement < 1
    more = (1 + agreement) / 2
    how = {"target_size": 48, "compensate": False, "min_agreement": more}
    with pytest.raises(ValueError, match=f"min_agreement={more} is asked for"):
        model.prepare(decided(model, **how))
    with pytest.raises(ValueError, match=f"min_agreement={more} is asked for"):
        model.select(TEXT, target_size=48, min_agreement=more)


def test_auto_and_the_same_share_given_are_one_entry_of_the_cache(tmp_path):
    model, _ = load(write_folder(tmp_path / "m", "qwen3"))
    model.card = card_of(k75=0.7, k90=0.99)
    cache = CompactCache(tmp_path / "cache")

    def made(**options):
        decision = decided(model, compensate=False, **options)
        return prepare_once(model, decision, cache, iter)

    first, again, given = made(), made(), made(keep=58 / 64)
    assert (first.cache, again.cache, given.cache) == ("miss", "hit", "hit")
    assert first.selection.mask_id == given.selection.mask_id
    assert made(min_agreement=0.7).cache == "miss"
    with pytest.raises(ValueError, match="min_agreement=1 is asked for"):
        made(target_size=32, min_agreement=1)
    assert made(target_size=32).selection.origin.agreement < 1


@pytest.mark.parametrize("keep", [(), ("--keep", "auto")])
def test_the_command_takes_auto(tiny_folder, capsys, keep):
    given = ("--model", tiny_folder, *keep, "-p", TEXT, "-m", 2, "--no-compensate")
    status, _, err = run_command(answer, capsys, *given)
    expected = load(tiny_folder)[0].select(TEXT)
    assert status == 0 and f"{sum(expected.sizes)} of 192 channels" in err
    assert replace(expected.origin, agreement=None, kl=None).keep * 64 in (48, 58, 64)
