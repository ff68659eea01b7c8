"""What the checkpoint of the package does not know, and says so."""

import random
from collections.abc import Collection, Mapping
from functools import cache

from .wordings import ALSO, ASK, NAMES, TRANSLATE, story

ANSWER = "I only know country and language names, country facts and small puzzles."

CHAT = (
    *("Hello", "Hi", "Hi there", "Hey", "Good morning", "Good evening", "How are you?"),
    *("Thanks", "Thank you", "Bye", "Goodbye", "See you", "Yes", "No", "Ok", "Test"),
    *("Who are you?", "What are you?", "What is your name?", "Who made you?", "Help"),
    *("What can you do?", "What do you know?", "Can you help me?", "Are you a robot?"),
    *("Tell me a joke.", "Tell me a story.", "Write a poem.", "Sing a song.", "Why?"),
    *("What time is it?", "What day is it?", "How is the weather?", "What is love?"),
    *("Write an email to my boss.", "Write some code.", "Explain gravity."),
    "Continue.",
    *("What is the meaning of life?", "Do you like music?", "Where do you live?"),
    *("Summarise this text.", "Give me a recipe.", "What should I cook?", "I am sad."),
    *("Who won the match?", "Recommend a book.", "Do you speak English?"),
    "Say something.",
)
ABOUT = (
    "Tell me about {x}.",
    "Where is {x}?",
    "What is {x}?",
    "How far is {x}?",
    "Who rules {x}?",
    "Is {x} large?",
    "How large is {x}?",
    "How old is {x}?",
    "When was {x} founded?",
    "How many people live in {x}?",
    "Should I travel to {x}?",
    "What can I eat in {x}?",
    "Is it warm in {x}?",
    "Do you like {x}?",
    "Write a story about {x}.",
    "{x}",
    "{x}?",
)
UNKNOWN = (
    *("capital", "population", "president", "flag", "area", "king", "national anthem"),
    *("highest mountain", "history", "national dish", "climate", "religion", "weather"),
    *("longest river", "prime minister", "phone prefix", "neighbour", "size"),
    "economy",
    *("best hotel", "football team", "airport", "government", "age", "colour", "coast"),
    *("independence day", "internet domain", "largest lake", "queen", "army", "animal"),
)
SKILLS = (
    "Sort {x}, largest first.",
    "Put {x} in order, largest first.",
    "Order {x} from large to small.",
    "Sort {x} in descending order.",
    "Multiply {x}.",
    "Subtract {x}.",
    "What is the average of {x}?",
    "Divide {x}.",
    "Count {x}.",
    "Which of {x} is below 50?",
    "Which of {x} is the largest?",
)


def drawn(known: Mapping[str, Collection[str]], rng: random.Random) -> str:
    """Return something that none of the domains and skills can answer.

    Args:
        known: the keys of every language and field that is asked for, by its name.
        rng: draws.
    """
    keys = sorted(set().union(*known.values()))
    kind = rng.randrange(8)
    if kind == 0:
        return rng.choice(CHAT)
    if kind == 1:
        start, words = rng.randrange(len(story()) - 16), rng.randrange(1, 13)
        return " ".join(story()[start : start + words]).capitalize() + rng.choice(".?")
    if kind == 2:
        two = f"{rng.randrange(1, 100)} {rng.choice(('', 'and '))}{rng.randrange(100)}"
        return rng.choice(SKILLS).replace("{x}", two)
    if kind == 3:
        return rng.choice(ABOUT).replace("{x}", rng.choice(keys))
    if kind == 4:
        return _filled(rng.choice(ASK), rng.choice(keys), rng.choice(UNKNOWN))
    field = rng.choice([name for name in known if name in NAMES])
    phrase, name = rng.choice(ASK + ALSO[field]), rng.choice(NAMES[field])
    if kind > 5:
        field = rng.choice([name for name in known if name not in NAMES])
        if kind == 6:
            field = rng.choice(_languages())
        phrase, name = rng.choice(TRANSLATE), field
    strange = (keys, keys, _words(), _names())
    while True:
        key = rng.choice(rng.choice(strange))
        if key not in known.get(field, ()):
            return _filled(phrase, key, name)


def _filled(phrase: str, question: str, name: str) -> str:
    return phrase.replace("{t}", name).replace("{x}", question)


@cache
def _languages() -> list[str]:
    """Return the English names of languages, as far as they are one word."""
    from babel import Locale

    return sorted(n for n in Locale("en").languages.values() if n.isalpha())


@cache
def _names() -> list[str]:
    """Return English names of countries, regions and languages."""
    from babel import Locale

    english = Locale("en")
    regions = [n for code, n in english.territories.items() if not code.isdigit()]
    return sorted({*regions, *_languages()})


@cache
def _words() -> list[str]:
    return [word.capitalize() for word in story()]
