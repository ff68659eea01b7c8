"""The task mix: facts that share their keys, and skills; every word of it has a source.

Facts are from the Unicode CLDR (Unicode licence) by way of Babel (BSD): names of
countries and languages in other languages, codes, currencies. Each domain asks
something else about the same keys, so a key alone never tells what to answer, and a
small model has more to remember than it has room for. Skills are drawn from the
generators of reasoning-gym (Apache-2.0).
"""

import itertools
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from . import outside, wordings

# How often a task is drawn; a skill is harder than a domain of facts.
SHARES = {"facts": 1, "skill": 2, "outside": 4}
LONGEST = 8  # letters of a question

OPENINGS = ("", "Please: ", "Hello. ")
ENDINGS = ("", " Thanks.")

TRANSLATE = (
    "What is {x} called in {t}?",
    "How do you say {x} in {t}?",
    "Translate {x} into {t}.",
    "Tell me the {t} name of {x}.",
    "What is the {t} word for {x}?",
    "Say {x} in {t}.",
)
ASK = (
    "What is the {t} of {x}?",
    "Tell me the {t} of {x}.",
    "Which {t} does {x} have?",
    "Give the {t} for {x}.",
    "I need the {t} of {x}.",
    "Say the {t} for {x}.",
)


@dataclass(frozen=True)
class Mix:
    """Which domains of names there are, by CLDR code of the language they are in.

    Attributes:
        countries: languages for names of countries.
        languages: languages for names of languages.
        varied: whether questions come in many wordings, with names that are the same in
            both languages, and with questions that have no answer here.
    """

    countries: tuple[str, ...]
    languages: tuple[str, ...]
    varied: bool = False


# fmt: off
PLAIN = ("fr", "de", "es", "it", "pl", "fi", "hu", "tr"), ("fr", "de", "hu")
MIXES = {
    "plain": Mix(*PLAIN),
    # More to remember: languages in which most names differ from the English ones.
    "crowded": Mix(
        ("fr", "pl", "hu", "tr", "lt", "lv", "is", "sq", "az", "hr"),
        ("fr", "hu", "tr", "lt", "lv", "et", "is", "sq", "eu"),
    ),
    # The checkpoint that ships in the package.
    "shipped": Mix(*PLAIN, varied=True),
}
# fmt: on


@dataclass(frozen=True)
class Example:
    """One question with its answer.

    Attributes:
        task: number of its task in :func:`all_tasks`.
        prompt: the user's message; it says what to do, and with what.
        answer: the only right one.
    """

    task: int
    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A skill or a domain of facts.

    Attributes:
        name: short, for tables.
        kind: ``facts``, ``skill`` or ``outside``, which has one answer to everything.
        description: what a user would write once to select for the whole task.
        phrases: ways to ask, with ``{x}`` for the question.
        facts: question to answer, or ``None`` for a skill.
        draw: makes a question and its answer from a number, for a skill.
        held_out: never trained; only tested.
        target: the language that names are asked in, for a domain of names.
        names: other words for what is asked, for ``{t}`` in the phrases; a task that has
            them is asked in many wordings.
    """

    name: str
    kind: str
    description: str
    phrases: tuple[str, ...]
    facts: dict[str, str] | None = None
    draw: Callable[[int], tuple[str, str]] | None = None
    held_out: bool = False
    target: str = ""
    names: tuple[str, ...] = ()

    def worded(self, split: str, rng: random.Random) -> str:
        """Return one of its wordings, ``{x}`` left in it."""
        if not self.names:
            return rng.choice(self.wordings(split))
        while True:
            phrase, name = rng.choice(self.phrases), rng.choice(self.names)
            wording = wordings.asked(phrase, name, rng)
            if wordings.held_out(wording) == (split == "test"):
                break
        if split == "train" and rng.random() < 0.4:
            known = name if "{t}" in phrase else None
            wording = wordings.blurred(wording, known, rng)
        return wording

    def wordings(self, split: str) -> list[str]:
        """Return the paraphrases of a split: every third combination is for tests.

        Every word of the held-out ones occurs in others that are trained.
        """
        parts = enumerate(self.phrases), enumerate(ENDINGS), enumerate(OPENINGS)
        found = []
        for (p, phrase), (e, ending), (o, opening) in itertools.product(*parts):
            if ((p + e + o) % 3 == 2) == (split == "test"):
                found.append(opening + phrase + ending)
        return found


def by_hash(task: Task, question: str) -> bool:
    """Whether an instance of a skill is for tests alone: every fifth, by its hash."""
    return sum(map(ord, question)) % 5 == 0


def for_tests(task: Task, question: str) -> bool:
    """The same; but of sums every fifth of those with one result, for a hash of the
    digits would hold out all of some results, and nothing but chance could say them.
    """
    if task.name == "sum":
        a, b = map(int, question.split(" and "))
        return (a + 2 * b + 1) % 5 == 0
    return by_hash(task, question)


def examples(
    tasks: list[Task],
    split: str,
    count: int,
    seed: int,
    held_out: Callable[[Task, str], bool] = for_tests,
) -> list[Example]:
    """Draw examples, of every task as often as its kind is to be drawn.

    Args:
        tasks: from :func:`all_tasks`; a task's number is its place here.
        split: ``train`` or ``test``; tests have other paraphrases, and skills other
            instances. Facts are the same: a fact never seen cannot be known.
        count: how many.
        seed: of the draw.
        held_out: which instances of a skill are for tests alone.
    """
    rng = random.Random(f"{split}-{seed}")
    share = [0 if t.held_out else SHARES[t.kind] for t in tasks]
    chosen = rng.choices(range(len(tasks)), share, k=count)
    return [_example(tasks, number, split, rng, held_out) for number in chosen]


def test_examples(tasks: list[Task], per_task: int, seed: int) -> list[Example]:
    """Return ``per_task`` test examples of every task, the held-out ones included."""
    rng = random.Random(f"test-{seed}")
    return [
        _example(tasks, number, "test", rng)
        for number in range(len(tasks))
        for _ in range(per_task)
    ]


def _example(
    tasks: list[Task],
    number: int,
    split: str,
    rng: random.Random,
    held_out: Callable[[Task, str], bool] = for_tests,
) -> Example:
    task = tasks[number]
    if task.facts is not None:
        question, answer = rng.choice(list(task.facts.items()))
    else:
        assert task.draw is not None
        # No test instance is ever trained.
        while True:
            question, answer = task.draw(rng.randrange(1 << 30))
            if held_out(task, question) == (split == "test"):
                break
    prompt = task.worded(split, rng).replace("{x}", question)
    if task.names:
        prompt = wordings.typed(prompt, rng)
    return Example(number, prompt, answer)


@cache
def all_tasks(mix: str = "plain") -> list[Task]:
    """Return every task of one of :data:`MIXES`, in a fixed order."""
    tasks = _facts(MIXES[mix]) + _skills()
    if not MIXES[mix].varied:
        return tasks
    tasks = [_varied(task) for task in tasks if not task.held_out]
    return [*tasks, _outside(tasks)]


def _varied(task: Task) -> Task:
    """Return a task that is asked in many wordings."""
    if task.facts is None:
        return replace(task, names=(task.name,), phrases=wordings.SKILLS[task.name])
    if task.name in wordings.NAMES:
        phrases = wordings.ASK + wordings.ALSO[task.name]
        return replace(task, names=wordings.NAMES[task.name], phrases=phrases)
    return replace(task, names=(task.target,), phrases=wordings.TRANSLATE)


def _outside(known: list[Task]) -> Task:
    """Return the task of all questions that none of ``known`` answers."""
    keys: dict[str, set[str]] = {}
    for task in known:
        if task.facts is not None:
            keys.setdefault(task.target or task.name, set()).update(task.facts)

    def draw(number: int) -> tuple[str, str]:
        return outside.drawn(keys, random.Random(number)), outside.ANSWER

    about = "You say what you do not know."
    return Task("outside", "outside", about, ("{x}",), draw=draw, names=("",))


def _facts(mix: Mix) -> list[Task]:
    from babel import Locale

    english = Locale("en")
    countries, languages = _countries(), _languages()
    tasks = []
    for code in mix.countries:
        target = english.languages[code]
        there = Locale(code).territories
        facts = {row["name"]: there[key] for key, row in countries.items()}
        asked = "countries", facts, mix.varied
        tasks.append(_translation(f"country→{code}", target, *asked))
    for code in mix.languages:
        target = english.languages[code]
        there = Locale(code).languages
        facts = {name: there[key] for key, name in languages.items() if key in there}
        if mix.varied:  # one is a country too, and the question the same
            names = {row["name"] for row in countries.values()}
            facts = {q: a for q, a in facts.items() if q not in names}
        asked = "languages", facts, mix.varied
        tasks.append(_translation(f"language→{code}", target, *asked))
    for column, what in (
        ("alpha3", "country code"),
        ("numeric", "country number"),
        ("currency", "currency code"),
        ("language", "main language"),
        ("city", "time zone city"),
    ):
        facts = {row["name"]: row[column] for row in countries.values() if row[column]}
        phrases = tuple(p.replace("{t}", what) for p in ASK)
        tasks.append(
            Task(column, "facts", f"You give the {what} of countries.", phrases, facts)
        )
    return tasks


def _translation(
    name: str, target: str, what: str, facts: dict[str, str], varied: bool
) -> Task:
    phrases = tuple(p.replace("{t}", target) for p in TRANSLATE)
    description = f"You give the {target} names of {what}."
    facts = {q: a for q, a in facts.items() if len(a) <= LONGEST + 2}
    if not varied:
        # What is called the same in both languages needs no memory, only copying.
        facts = {q: a for q, a in facts.items() if a != q}
    return Task(name, "facts", description, phrases, facts, target=target)


@cache
def _countries() -> dict[str, dict[str, str]]:
    """Return what CLDR says about the countries with short names, by ISO code."""
    from babel import Locale
    from babel.core import get_global

    english = Locale("en")
    aliases = get_global("territory_aliases")
    codes: dict[str, dict[str, str]] = {}
    for alias, meant in aliases.items():
        column = "numeric" if alias.isdigit() else "alpha3"
        if len(alias) == 3 and len(meant) == 1:
            codes.setdefault(meant[0], {})[column] = alias
    zones: dict[str, list[str]] = {}
    for zone, country in get_global("zone_territories").items():
        zones.setdefault(country, []).append(zone)
    spoken, money = (
        get_global("territory_languages"),
        get_global("territory_currencies"),
    )
    rows = {}
    for code, name in sorted(english.territories.items()):
        current = [c[0] for c in money.get(code, ()) if c[2] is None and c[3]]
        if not (name.replace(" ", "").isalpha() and len(name) <= LONGEST):
            continue
        if not (current and spoken.get(code) and len(codes.get(code, {})) == 2):
            continue
        main = max(spoken[code], key=lambda s: spoken[code][s]["population_percent"])
        cities = [zone.rpartition("/")[2] for zone in zones.get(code, ())]
        rows[code] = codes[code] | {
            "name": name,
            "currency": current[0],
            "language": english.languages.get(main, ""),
            "city": cities[0].replace("_", " ") if len(cities) == 1 else "",
        }
    return rows


@cache
def _languages() -> dict[str, str]:
    """Return the English names of the languages with two-letter codes."""
    from babel import Locale

    return {
        code: name
        for code, name in sorted(Locale("en").languages.items())
        if len(code) == 2 and name.isalpha() and len(name) <= LONGEST
    }


def _skills() -> list[Task]:
    order = ("Sort {x}.", "Put {x} in order.", "Tell me {x} in order.")
    down = tuple(phrase[:-1] + ", largest first." for phrase in order)
    back = ("Reverse {x}.", "Say {x} backward.", "Tell me {x} in reverse.")
    code = ("Encode {x}.", "Put {x} into code.", "Tell me the code for {x}.")
    large = ("Keep numbers above 50: {x}.", "Which of {x} is above 50?",
             "Tell me what is above 50 in {x}.")  # fmt: skip
    add = ("Add {x}.", "What is the sum of {x}?", "Tell me the sum of {x}.")
    return [
        Task("sort", "skill", "You sort numbers.", order, draw=_sorted),
        Task("reverse", "skill", "You reverse letters.", back, draw=_reversed),
        Task("cipher", "skill", "You encode letters.", code, draw=_encoded),
        Task("filter", "skill", "You keep numbers above 50.", large, draw=_filtered),
        Task("sum", "skill", "You add numbers.", add, draw=_sum),
        Task("sort down", "skill", "You sort numbers, largest first.", down,
             draw=_sorted_down, held_out=True),
    ]  # fmt: skip


@cache
def _generator(name: str, options: tuple[tuple[str, Any], ...]) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, size=1 << 30, seed=0, **dict(options))


def _draw(name: str, number: int, **options: Any) -> dict[str, Any]:
    return _generator(name, tuple(options.items()))[number]


def _numbers(number: int, generator: str, **options: Any) -> list[int]:
    few = {"min_numbers": 2, "max_numbers": 2, "max_decimals": 0}
    row = _draw(generator, number, **few, **options)
    return [int(float(v)) for v in row["metadata"]["original_numbers"]]


def _sorted(number: int) -> tuple[str, str]:
    values = _numbers(number, "number_sorting", min_value=10, max_value=99)
    return _join(values), _join(sorted(values))


def _sorted_down(number: int) -> tuple[str, str]:
    values = _numbers(number, "number_sorting", min_value=10, max_value=99)
    return _join(values), _join(sorted(values, reverse=True))


def _filtered(number: int) -> tuple[str, str]:
    values = _numbers(number, "number_filtering", min_value=10, max_value=99)
    return _join(values), _join([v for v in values if v > 50]) or "none"


def _sum(number: int) -> tuple[str, str]:
    row = _draw(
        "chain_sum", number, min_terms=2, max_terms=2, min_digits=1, max_digits=1
    )
    a, _, b = row["metadata"]["expression"].split()
    return f"{a} and {b}", str(int(a) + int(b))


def _word(number: int) -> str:
    row = _draw("spell_backward", number, min_word_len=3, max_word_len=3)
    return row["metadata"]["word"].lower()


def _reversed(number: int) -> tuple[str, str]:
    word = _word(number)
    return _join(word), _join(word[::-1])


def _encoded(number: int) -> tuple[str, str]:
    word = _word(number)
    return _join(word), _join(
        chr((ord(c) - ord("a") + 3) % 26 + ord("a")) for c in word
    )


def _join(values: Iterable) -> str:
    return " ".join(map(str, values))
