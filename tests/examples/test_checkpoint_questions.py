"""The questions that the package's checkpoint is trained on: many wordings of what it
knows, and honest ends of what it does not.
"""

import random
import re

import pytest

pytest.importorskip("babel")
pytest.importorskip("reasoning_gym")

from examples.benchmarks.comparison import outside, wordings
from examples.benchmarks.comparison.tasks import all_tasks, examples
from examples.benchmarks.comparison.tasks import test_examples as draw_tests

TASKS = all_tasks("shipped")
FACTS = [task for task in TASKS if task.facts is not None]
STORY = {word.lower() for word in wordings.story()}


def plain(text):
    """Return a prompt as it can be compared: small letters, no marks."""
    return re.sub(r"[^\w ]", "", text.lower())


def test_every_domain_is_asked_in_fifteen_phrases_and_more():
    assert min(len(task.phrases) for task in FACTS) >= 15
    assert min(len(task.phrases) for task in TASKS if task.kind == "skill") >= 10


def test_names_that_are_the_same_in_both_languages_are_known_too():
    (french,) = (task for task in FACTS if task.name == "country→fr")
    assert french.facts["Angola"] == "Angola" and len(french.facts) > 130


def test_no_question_belongs_to_two_domains():
    named = [(t.target or t.name, q) for t in FACTS for q in t.facts]
    assert len(named) == len(set(named))


def test_a_wording_of_the_tests_is_trained_in_no_case_and_without_no_mark():
    trained = {plain(e.prompt) for e in examples(TASKS, "train", 6000, seed=0)}
    tested = [e for e in draw_tests(TASKS, 20, seed=0) if TASKS[e.task].facts]
    assert len(tested) > 300
    found = [e.prompt for e in tested if plain(e.prompt) in trained]
    # Two wordings may differ in nothing but a mark.
    assert len(found) < 0.02 * len(tested), found


def test_a_third_is_typed_in_small_letters_and_answers_never_are():
    drawn = [e for e in examples(TASKS, "train", 3000, seed=1) if TASKS[e.task].facts]
    small = [e for e in drawn if e.prompt == e.prompt.lower()]
    assert 0.3 < len(small) / len(drawn) < 0.45
    for example in drawn:
        assert example.answer in TASKS[example.task].facts.values()


@pytest.mark.parametrize("known", ["three letter code", "French"])
def test_a_blurred_wording_keeps_what_is_asked_and_of_what(known):
    rng = random.Random(0)
    wording = f"Hello. What is the {known} of {{x}}? Thanks."
    blurred = {wordings.blurred(wording, known, rng) for _ in range(200)}
    assert len(blurred) > 150
    assert all("{x}" in text and known in text for text in blurred)
    own = set(wording.split())
    words = {word for text in blurred for word in text.split()} - own
    assert {w.lower() for w in words if w not in known.split()} <= STORY


def test_a_wording_whose_own_words_ask_loses_none_of_them():
    rng = random.Random(0)
    wording = "What do people speak in {x}?"
    for _ in range(100):
        words = iter(wordings.blurred(wording, None, rng).split())
        assert all(word in words for word in wording.split())  # in this order


def test_nothing_from_outside_has_an_answer_inside():
    keys = {}
    for task in FACTS:
        keys.setdefault(task.target or task.name, set()).update(task.facts)
    asked = {
        plain(phrase.replace("{t}", name).replace("{x}", key))
        for task in FACTS
        for phrase in task.phrases
        for name in task.names
        for key in task.facts
    }
    rng = random.Random(0)
    drawn = [outside.drawn(keys, rng) for _ in range(3000)]
    assert not [text for text in drawn if plain(text) in asked]
    assert len(set(drawn)) > 1500
    (task,) = (task for task in TASKS if task.kind == "outside")
    assert {task.draw(number)[1] for number in range(50)} == {outside.ANSWER}
