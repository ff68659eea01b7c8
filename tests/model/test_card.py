"""A model's card: what it says of a keep, and whose it is."""

import json
import shutil
from dataclasses import asdict, replace

import pytest
from conftest import run_command, write_folder
from hypothesis import given
from hypothesis import strategies as st

from ifp_mlx import load, plan
from ifp_mlx.model import card as cards
from ifp_mlx.model.card import Card, Point, fingerprint_of, load_card, save_card
from ifp_mlx.model.export import write_compact

CURVE = {0.25: (0.4, 0.2), 0.5: (0.7, 0.5), 0.75: (0.9, 0.7)}


def card_with(curve, **changes):
    points = tuple(
        Point(kind, keep, 5, agreement, 0.1)
        for keep, values in curve.items()
        for kind, agreement in zip(("reading", "maths"), values, strict=True)
    )
    about = {"model": "tiny", "unit": "channel", "selector": "blend"}
    about |= {"fingerprint": "", "tokens": 90, "seconds": 1.5, "package": "0"}
    return Card(**about | changes, points=points, dense_right={"maths": 0.2})


CARD = card_with(CURVE)


def of(folder):
    """Return an opened model and a card of its weights."""
    model, _ = load(folder)
    return model, replace(CARD, fingerprint=fingerprint_of(model))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/ifp_mlx/cards"


@pytest.fixture
def read_only(monkeypatch, tiny_folder):
    """Let the model's folder be one that cannot be written."""
    stock = cards.new_file

    def refuse(path):
        if path.parent == tiny_folder:
            raise PermissionError(path)
        return stock(path)

    monkeypatch.setattr(cards, "new_file", refuse)


def test_a_promise_is_the_mean_over_kinds_and_a_line_between_keeps():
    assert CARD.keeps() == [0.25, 0.5, 0.75] and CARD.kinds == ["reading", "maths"]
    assert CARD.promise(0.5) == pytest.approx(0.6)
    assert CARD.promise(0.625) == pytest.approx(0.7)
    assert CARD.promise(0.875) == pytest.approx(0.9) and CARD.promise(1) == 1
    assert CARD.worst(0.5) == ("maths", 0.5)
    assert CARD.worst(0.875) == ("maths", pytest.approx(0.85))


def test_nothing_is_promised_below_the_smallest_keep():
    assert CARD.promise(0.2) is None and CARD.worst(0.2) is None
    assert CARD.promise(0.248) == CARD.promise(0.25), "a layer has whole units"
    assert "less than the card of tiny has measured (0.25)" in CARD.words(0.1)


def test_a_card_is_quoted_in_words():
    assert CARD.words(0.5) == (
        "by the card of tiny, keep 0.5 chooses the dense model's next token at 60% of "
        "answers' tokens (maths: 50%)"
    )


def test_the_smallest_keep_that_promises_enough():
    found = [CARD.smallest(least) for least in (0.1, 0.3, 0.31, 0.8, 0.81)]
    assert found == [0.25, 0.25, 0.5, 0.75, 1.0]


SHARES = st.floats(0, 1)


@given(st.lists(st.tuples(SHARES, SHARES), min_size=3, max_size=3), SHARES, SHARES)
def test_a_promise_lies_between_those_of_its_neighbours(values, one, other):
    card = card_with(dict(zip(CURVE, values, strict=True)))
    corners = [*card.keeps(), 1.0]
    for low, high in zip(corners, corners[1:], strict=False):
        ends = card.promise(low), card.promise(high)
        first, second = sorted(low + share * (high - low) for share in (one, other))
        found = card.promise(first), card.promise(second)
        slack = 1e-9
        assert all(min(ends) - slack <= x <= max(ends) + slack for x in found)
        rises = (ends[1] - ends[0]) * (found[1] - found[0])
        assert rises >= -slack, "it goes one way between two keeps"


def test_a_card_comes_back_from_its_file():
    assert Card.from_json(CARD.as_json()) == CARD


def test_a_card_is_kept_in_the_models_folder(tiny_folder, cache):
    model, card = of(tiny_folder)
    assert load_card(model) is None
    assert save_card(model, card) == tiny_folder / "ifp_card.json"
    assert load_card(load(tiny_folder)[0]) == card and not cache.exists()


@pytest.mark.usefixtures("read_only")
def test_a_card_of_a_folder_that_cannot_be_written_is_kept_in_the_cache(
    tiny_folder, cache
):
    model, card = of(tiny_folder)
    path = save_card(model, card)
    assert path.parent == cache and load_card(model) == card
    assert not (tiny_folder / "ifp_card.json").exists()


@pytest.mark.usefixtures("read_only")
def test_a_card_follows_its_weights_and_no_others(tiny_folder, tmp_path):
    model, card = of(tiny_folder)
    save_card(model, card)
    copied = shutil.copytree(tiny_folder, tmp_path / "copied")
    assert load_card(load(copied)[0]) == card
    write_folder(copied, seed=1)
    assert load_card(load(copied)[0]) is None


def test_a_card_that_was_copied_beside_other_weights_is_not_used(tiny_folder, tmp_path):
    model, card = of(tiny_folder)
    save_card(model, card)
    copied = shutil.copytree(tiny_folder, tmp_path / "copied")
    weights = bytearray((copied / "model.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1  # one bit of one weight
    (copied / "model.safetensors").write_bytes(weights)
    assert load_card(load(copied)[0]) is None


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "not json", '{"points": [{"kind": 1}]}']
)
def test_a_damaged_card_is_named_in_the_folder_and_passed_over_in_the_cache(
    text, tiny_folder, cache
):
    model, card = of(tiny_folder)
    cache.mkdir(parents=True)
    (cache / f"{card.fingerprint}.json").write_text(text)
    assert load_card(model) is None
    (tiny_folder / "ifp_card.json").write_text(text)
    with pytest.raises(ValueError, match=r"ifp_card.json is no card .* --card$"):
        load_card(model)


def test_a_card_of_another_version_is_not_read():
    text = json.dumps(asdict(CARD) | {"version": 2})
    with pytest.raises(ValueError, match="version 2"):
        Card.from_json(text)


# Who quotes it


def test_plan_quotes_the_card_where_there_is_one(tiny_folder, capsys):
    given = ["--model", tiny_folder, "--keep", 0.125, 0.5, "--json"]
    _, out, _ = run_command(plan.main, capsys, *given)
    assert "agreement" not in out.lower().replace('"agreement": null', "")
    save_card(*of(tiny_folder))
    _, out, _ = run_command(plan.main, capsys, *given)
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert [row["agreement"] for row in rows] == [None, pytest.approx(0.6), 1]
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert [line.split("|")[-2].strip() for line in table[-5:]] == [
        "agreement", "--------:", "-", "60%", "100%",
    ]  # fmt: skip
    assert "measured on 90 tokens" in out


def test_a_compact_folder_tells_the_curve_and_has_no_card_of_its_own(
    tiny_folder, tmp_path
):
    model, card = of(tiny_folder)
    selection = model.select("Hi", keep=0.5, allocation="uniform")
    write_compact(model, selection, tmp_path / "before")
    assert "has a card" not in (tmp_path / "before/README.md").read_text()
    save_card(model, card)
    out = write_compact(model, selection, tmp_path / "after")
    page = (out / "README.md").read_text()
    assert "| 0.5 | 60% | maths, 50% |" in page
    assert "keeps 0.5 and was not measured itself" in " ".join(page.split())
    assert not (out / "ifp_card.json").exists() and load_card(load(out)[0]) is None
