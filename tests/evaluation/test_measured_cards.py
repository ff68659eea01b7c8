"""Measuring a model's card: the package's prompts, what is compared, and the command."""

import json
from collections import Counter
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from conftest import add_prior, fetch, run_command, swept, write_family, write_folder

from ifp_mlx import generate, load
from ifp_mlx.evaluate import main
from ifp_mlx.evaluation import card as cards
from ifp_mlx.evaluation.card import (
    CardPrompt,
    card_prompts,
    measure,
    measured_keeps,
    report,
    settings_of,
)
from ifp_mlx.evaluation.log import Log
from ifp_mlx.model.card import load_card

PROMPTS = [
    CardPrompt("reading 1", "reading", "Red door. Which colour?", ("red",)),
    CardPrompt("maths 1", "maths", "1 and 1?", ("2",)),
    CardPrompt("code 1", "code", "Print 1."),
]


@pytest.fixture(autouse=True)
def short_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cards, "MAX_TOKENS", 6)


@pytest.fixture
def opened(tmp_path):
    folder = write_folder(tmp_path / "tiny")
    model, _ = load(folder)
    add_prior(model)
    return load(folder)[0]


def measured(model, folder=None, prompts=PROMPTS, keeps=(0.75, 0.5)):
    log = Log(folder, settings_of(model, prompts), cards.KEY)
    return measure(model, prompts, measured_keeps(model, keeps), log), log.lines


def untimed(card):
    return replace(card, seconds=0.0)


# The prompts


def test_there_are_five_short_prompts_of_each_kind():
    prompts = card_prompts()
    kinds = Counter(prompt.kind for prompt in prompts)
    assert kinds == dict.fromkeys(
        ("reading", "instruction", "maths", "code", "long"), 5
    )
    assert len({p.prompt for p in prompts}) == len({p.name for p in prompts}) == 25
    for prompt in prompts:
        words = len(prompt.prompt.split())
        assert 60 <= words <= 120 if prompt.kind == "reading" else words <= 30
        assert prompt.max_tokens == (128 if prompt.kind == "long" else cards.MAX_TOKENS)


def test_what_is_expected_is_in_the_passage_and_in_no_other_prompt():
    for prompt in card_prompts():
        said = prompt.right(prompt.prompt)
        always = prompt.kind in ("reading", "maths")
        assert not (always and said is None), "these can always be checked"
        assert said in ((True,) if prompt.kind == "reading" else (None, False))


def test_an_answer_is_right_if_it_has_the_word_or_number():
    prompt = CardPrompt("maths 1", "maths", "?", ("1200", "twelve hundred"))
    for right in ("It is 1200.", "**1,200** in all", "Twelve hundred", "=1200!"):
        assert prompt.right(right) is True
    for wrong in ("12000", "1200.5", "0.1200", "112,00", "x1200", ""):
        assert prompt.right(wrong) is False
    assert CardPrompt("code 1", "code", "?").right("1200") is None


# What is compared


def by_hand(model, prompt, keep):
    """Return agreement and KL of one prompt from whole passes, all in memory."""
    dense, tokens = model.dense(), model.instruction_tokens(prompt)
    selection, small, kv = swept(model, prompt, keep=keep, compensate=None)
    ids: list[int] = []
    for _ in range(6):
        logits = dense(mx.array([tokens + ids]))[0, -1]
        ids.append(int(logits.argmax()))
        if ids[-1] in model.tokenizer.eos_token_ids:
            break
    said = dense(mx.array([tokens + ids[:-1]]))[0, len(tokens) - 1 :]
    for layer in kv:
        layer.trim(1)
    found = small(mx.array([tokens[-1:] + ids[:-1]]), cache=kv)[0]
    p, q = (
        np.array(x - mx.logsumexp(x, axis=-1, keepdims=True)) for x in (said, found)
    )
    kl = (np.exp(p) * (p - q)).sum(axis=-1).mean()
    same = (np.array(ids) == q.argmax(axis=-1)).mean()
    return same, kl, selection.origin, len(ids)


def test_a_line_is_what_both_models_say_on_the_dense_models_own_answer(opened):
    card, lines = measured(opened)
    for prompt in PROMPTS:
        for keep in (0.75, 0.5):
            line = lines[prompt.name, keep]
            same, kl, origin, count = by_hand(opened, prompt.prompt, keep)
            assert line["agreement"] == pytest.approx(same)
            assert line["kl"] == pytest.approx(kl, rel=1e-3)
            assert line["self_agreement"] == origin.agreement
            assert line["self_kl"] == origin.kl and line["compared"] == count
    assert card.selector == "blend" and card.keeps() == [0.5, 0.75]
    assert card.tokens == sum(lines[p.name, 1.0]["tokens"] for p in PROMPTS)


def test_a_model_without_a_prior_gets_it_first(tiny_folder):
    model, _ = load(tiny_folder)
    assert model.prior is None
    card, _ = measured(model, keeps=(0.5,))
    assert card.selector == "blend", "of every prompt"


def test_a_checkable_answer_is_the_one_that_generate_gives(opened):
    _, lines = measured(opened)
    for prompt in PROMPTS:
        said = generate(opened, opened.tokenizer, prompt.prompt, keep=0.5, max_tokens=6)
        assert lines[prompt.name, 0.5]["text"] == (said if prompt.expect else None)


def test_a_kinds_agreement_is_a_share_of_its_tokens(opened):
    prompts = [*PROMPTS, CardPrompt("maths 2", "maths", "2 and 2?", ("4",))]
    card, lines = measured(opened, prompts=prompts, keeps=(0.5,))
    some = [lines[name, 0.5] for name in ("maths 1", "maths 2")]
    same = sum(line["agreement"] * line["compared"] for line in some)
    point = next(point for point in card.points if point.kind == "maths")
    assert point.agreement == pytest.approx(
        same / sum(line["compared"] for line in some)
    )
    assert point.rows == 2 and point.right in (0, 0.5, 1)


def test_a_stopped_run_goes_on_to_the_same_card(opened, tmp_path):
    whole, lines = measured(opened, tmp_path / "whole")
    rows = (tmp_path / "whole/rows.jsonl").read_text().splitlines(keepends=True)
    for name in ("settings.json", "rows.jsonl"):
        (tmp_path / "cut").mkdir(exist_ok=True)
        (tmp_path / "cut" / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    (tmp_path / "cut/rows.jsonl").write_text("".join(rows[:5]) + rows[5][:20])
    again, _ = measured(opened, tmp_path / "cut")
    assert untimed(again) == untimed(whole)
    assert len((tmp_path / "cut/rows.jsonl").read_text().splitlines()) == len(lines)


def test_a_finished_run_reads_no_weights_again(opened, tmp_path, monkeypatch):
    card, _ = measured(opened, tmp_path / "out")
    monkeypatch.setattr(opened, "dense", lambda: pytest.fail("it was measured"))
    assert measured(opened, tmp_path / "out")[0] == card


def test_other_weights_need_another_folder(opened, tmp_path):
    measured(opened, tmp_path / "out")
    other, _ = load(write_folder(tmp_path / "other" / "tiny", seed=1))
    with pytest.raises(ValueError, match="was begun with"):
        measured(other, tmp_path / "out")


# The keeps


def test_only_keeps_that_a_mixture_runs_with_are_measured(tmp_path):
    model, _ = load(write_family(tmp_path / "moe", "qwen3_moe"))
    keeps = measured_keeps(model, None)
    sizes = [round(keep * model.channels) for keep in keeps]
    assert sizes == sorted({*sizes}, reverse=True)
    assert model.footprint.smallest <= min(sizes) and max(sizes) < model.channels
    assert [size / model.channels for size in sizes] == keeps
    card, _ = measured(model, keeps=keeps)
    assert card.unit == "expert" and all(
        0 <= p.self_agreement <= 1 for p in card.points
    )


def test_keeps_that_leave_nothing_out_are_refused(opened):
    with pytest.raises(ValueError, match="keep 1 leaves nothing out"):
        measured_keeps(opened, [1.0])


# The command


@pytest.fixture
def few_prompts(monkeypatch):
    monkeypatch.setattr(cards, "card_prompts", lambda: PROMPTS)


@pytest.mark.usefixtures("few_prompts")
def test_the_command_keeps_the_card_with_the_model(opened, tmp_path, capsys):
    given = ["--model", opened.path, "--card", "--keep", 0.75, 0.5, "--json"]
    status, text, err = run_command(main, capsys, *given, "--output", tmp_path / "out")
    assert status == 0, err
    found = json.loads(text.splitlines()[-1])
    card = load_card(opened)
    assert found["path"] == str(opened.path / "ifp_card.json")
    assert found["card"] == json.loads(card.as_json()) and report(card) in text
    assert card.keeps() == [0.5, 0.75] and card.kinds == ["reading", "maths", "code"]
    assert (tmp_path / "out/report.md").exists()


def test_a_report_has_a_row_for_each_kind_and_a_column_for_each_keep(opened):
    card, _ = measured(opened)
    table, right = report(card).split("\n\n")[1::2]
    lines = table.splitlines()
    assert lines[0].split() == ["|", "|", "0.75", "|", "0.5", "|"]
    assert [line.split()[1] for line in lines[2:]] == [
        "reading",
        "maths",
        "code",
        "mean",
    ]
    assert [line.split()[1] for line in right.splitlines()[2:]] == ["reading", "maths"]


@pytest.mark.parametrize(
    ("mistake", "sentence"),
    [
        (["--data", "x.jsonl"], "not allowed with argument"),
        (["--answers", "gsm8k"], "not allowed with argument"),
        (["--selector", "blend"], "leave out --selector"),
        (["--limit", 2], "leave out --limit"),
        (["--max-tokens", 2], "leave out --max-tokens"),
        (["--keep", 1], "keep 1 leaves nothing out"),
    ],
)
def test_what_a_card_decides_itself_is_refused(mistake, sentence, opened, capsys):
    given = ["--model", opened.path, "--card", *mistake]
    status, _, err = run_command(main, capsys, *given)
    assert status == 2 and sentence in err


# A real model


@pytest.mark.long
@pytest.mark.real
def test_a_real_model_bears_less_the_less_is_kept(monkeypatch):
    monkeypatch.setattr(cards, "MAX_TOKENS", 16)
    model, _ = load(fetch("smollm2"))
    prompts = [p for p in card_prompts() if p.name in ("instruction 1", "code 2")]
    card, lines = measured(model, prompts=prompts, keeps=(0.9, 1 / 3))
    assert lines["instruction 1", 1.0]["right"] is True
    assert card.promise(0.9) > card.promise(1 / 3) and card.promise(0.9) > 0.8
    for kind in card.kinds:
        little, much = (p for p in card.points if p.kind == kind)
        assert little.kl < much.kl
