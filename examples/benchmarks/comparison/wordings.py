"""How people ask: the many wordings that the checkpoint of the package is trained on.

The comparison's own questions come in a few wordings of careful English, which is enough
to compare rows. Whoever types a question writes small letters, leaves out the question
mark and says "money" for "currency". Here every domain has some twenty phrases and several
names for what is asked, with openings, endings, words that have nothing to do with the
question, and in any order.
"""

import random
import re
from functools import cache
from pathlib import Path

OPENINGS = (
    *("", "", "", "", "Please: ", "Hello. ", "Hi, ", "Hey! ", "Quick question: "),
    *("Can you help me? ", "Sorry, ", "I have a question. ", "Just wondering: "),
    *("Good morning! ", "Ok, ", "So, ", "For my homework: ", "Please, "),
)
ENDINGS = (
    *("", "", "", "", " Thanks.", " Thank you!", " please", ", please", " I forgot."),
    *(" It is for school.", " Be quick.", " Do you know?", " I need it now."),
)

TRANSLATE = (
    "What is {x} called in {t}?",
    "What's {x} called in {t}?",
    "How do you say {x} in {t}?",
    "How do I say {x} in {t}?",
    "How would you say {x} in {t}?",
    "Translate {x} into {t}.",
    "Translate {x} to {t}.",
    "Can you translate {x} to {t}?",
    "Tell me the {t} name of {x}.",
    "What is the {t} name for {x}?",
    "What is the {t} word for {x}?",
    "What's the {t} for {x}?",
    "Say {x} in {t}.",
    "What is {x} in {t}?",
    "{x} in {t}",
    "{t} for {x}",
    "{t}: {x}",
    "How is {x} written in {t}?",
    "How do you write {x} in {t}?",
    "How do you spell {x} in {t}?",
    "What do {t} speakers call {x}?",
    "What do people call {x} in {t}?",
    "Give me the {t} translation of {x}.",
    "Give the name of {x} in {t}.",
    "I need {x} in {t}.",
    "I want to write {x} in {t}.",
    "I would like to know what {x} is in {t}.",
    "Could you put {x} into {t}?",
    "In {t}, what is {x}?",
    "Which name does {x} have in {t}?",
    "Which {t} word means {x}?",
)
ASK = (
    "What is the {t} of {x}?",
    "What's the {t} of {x}?",
    "What is the {t} for {x}?",
    "What is the {t} in {x}?",
    "What is {x}'s {t}?",
    "Tell me the {t} of {x}.",
    "Tell me {x}'s {t}.",
    "Which {t} does {x} have?",
    "Which {t} does {x} use?",
    "What {t} does {x} have?",
    "What {t} do they have in {x}?",
    "What {t} belongs to {x}?",
    "Give the {t} for {x}.",
    "Give me the {t} of {x}.",
    "I need the {t} of {x}.",
    "I would like to know the {t} of {x}.",
    "Say the {t} for {x}.",
    "{x} {t}",
    "{t} of {x}",
    "{x}: {t}?",
    "Do you know the {t} of {x}?",
    "Could you tell me the {t} for {x}?",
    "Look up the {t} of {x}.",
    "Show me the {t} for {x}.",
    "Find the {t} of {x}.",
    "For {x}, what is the {t}?",
)
# What is asked, in other words; and phrases that need none of these.
NAMES = {
    "alpha3": (
        *("country code", "three-letter code", "three letter code", "ISO code"),
        *("alpha-3 code", "abbreviation", "letter code", "three letters", "short form"),
        *("ISO country code", "3-letter code", "ISO abbreviation", "country letters"),
    ),
    "numeric": (
        *("country number", "numeric code", "numeric country code", "ISO number"),
        *("number", "three-digit code", "digits", "three digits", "code in digits"),
        *("number code", "UN number", "3-digit number", "ISO numeric code"),
    ),
    "currency": (
        *("currency code", "currency", "money", "currency abbreviation", "money code"),
        *("ISO currency code", "code of the currency", "legal tender", "cash"),
        *("code of the money", "national currency", "currency symbol"),
    ),
    "language": (
        *("main language", "language", "most spoken language", "principal language"),
        *("native language", "tongue", "official language", "common language"),
        *("first language", "primary language", "spoken language", "mother tongue"),
    ),
    "city": (
        *("time zone city", "time zone", "timezone", "city of the time zone"),
        *("tz city", "timezone city", "city for the clock", "clock city", "tz"),
        *("local time city", "zone city", "time city"),
    ),
}
ALSO = {
    "alpha3": (
        "How is {x} abbreviated?",
        "Which three letters stand for {x}?",
        "How do you abbreviate {x}?",
        "Which letters does {x} have in ISO 3166?",
        "What is {x} in three letters?",
    ),
    "numeric": (
        "Which number does {x} have?",
        "What number stands for {x}?",
        "Which three digits stand for {x}?",
        "What is {x} as a number?",
        "What is the number of the country {x}?",
    ),
    "currency": (
        "What do people pay with in {x}?",
        "How do you pay in {x}?",
        "Which money is used in {x}?",
        "What currency is used in {x}?",
        "Which currency do I need in {x}?",
        "What money do they use in {x}?",
        "With what money does one pay in {x}?",
        "I travel to {x}, which money do I need?",
    ),
    "language": (
        "What do people speak in {x}?",
        "What do they speak in {x}?",
        "Which language is spoken in {x}?",
        "What language do they speak in {x}?",
        "Which language do most people in {x} speak?",
        "What is spoken in {x}?",
        "Which language do people in {x} talk?",
        "I travel to {x}, which language will I hear?",
    ),
    "city": (
        "Which city names the time zone of {x}?",
        "Which city gives {x} its time zone?",
        "By which city are the clocks set in {x}?",
        "What city is the time of {x} named after?",
        "Which city stands for the time in {x}?",
        "Which city do I choose for the clock in {x}?",
    ),
}
SKILLS = {
    "sort": (
        *("Sort {x}.", "Put {x} in order.", "Tell me {x} in order.", "Order {x}."),
        *("Arrange {x} from small to large.", "Sort these numbers: {x}.", "sort {x}"),
        *("Which order do {x} have?", "Put {x} into ascending order.", "{x} sorted"),
        *("Smallest first: {x}.", "Sort the numbers {x}.", "Rank {x}, lowest first."),
    ),
    "reverse": (
        *(
            "Reverse {x}.",
            "Say {x} backward.",
            "Tell me {x} in reverse.",
            "{x} backward",
        ),
        *("Say {x} backwards.", "Turn {x} around.", "Write {x} from back to front."),
        *(
            "What is {x} in reverse?",
            "Spell {x} backwards.",
            "Reverse the letters {x}.",
        ),
        *("Read {x} from the end.", "What is {x} backwards?", "Flip {x}."),
    ),
    "cipher": (
        *(
            "Encode {x}.",
            "Put {x} into code.",
            "Tell me the code for {x}.",
            "Encrypt {x}.",
        ),
        *("Encode the letters {x}.", "Write {x} in code.", "What is {x} in code?"),
        *("Shift {x} by three.", "Cipher {x}.", "Use the secret code on {x}."),
        *("Make a secret of {x}.", "Turn {x} into code.", "Caesar cipher for {x}"),
    ),
    "filter": (
        *("Keep numbers above 50: {x}.", "Which of {x} is above 50?", "{x} above 50"),
        *("Tell me what is above 50 in {x}.", "Which of {x} are more than 50?"),
        *("What of {x} is larger than 50?", "Filter {x} for numbers over 50."),
        *("Only numbers over 50: {x}.", "Is any of {x} greater than 50?"),
        *("Which numbers of {x} exceed 50?", "Drop all up to 50 from {x}."),
    ),
    "sum": (
        *("Add {x}.", "What is the sum of {x}?", "Tell me the sum of {x}.", "Sum {x}."),
        *("What do {x} make?", "What is {x} together?", "Add up {x}.", "{x} added"),
        *("How much are {x}?", "Calculate the sum of {x}.", "Add {x} together."),
        *("What do you get from {x} added?", "The total of {x}?"),
    ),
}


@cache
def story() -> list[str]:
    """Return the words of "In the Year 2889" (Jules and Michel Verne, 1889), whose text
    comes with reasoning-gym and is in the public domain.
    """
    import reasoning_gym

    file = Path(reasoning_gym.__file__).parent / "data" / "in_the_year_2889.txt"
    text = file.read_text(encoding="utf-8")
    begins, ends = text.index("Little though they seem"), text.index("*** END OF")
    return re.findall(r"[A-Za-z]+(?:'[a-z]+)?", text[begins:ends])


def asked(phrase: str, name: str, rng: random.Random) -> str:
    """Return a phrase between an opening and an ending, ``{x}`` left in it."""
    phrase = phrase.replace("{t}", name)
    return rng.choice(OPENINGS) + phrase + rng.choice(ENDINGS)


def held_out(wording: str) -> bool:
    """Whether a wording is for tests alone: every sixth, by its letters."""
    return sum(map(ord, wording)) % 6 == 0


def blurred(wording: str, known: str | None, rng: random.Random) -> str:
    """Return a wording with words of a story put in.

    If the words that say what is asked are ``known``, some of the others are left out too,
    or all come in another order.
    """
    parts = wording.split()
    if known is not None:
        kept = (re.escape("{x}"), re.escape(known))
        parts = re.findall(rf"\S*(?:{'|'.join(kept)})\S*|\S+", wording)
        stays = [any(k in part for k in ("{x}", known)) for part in parts]
        if rng.random() < 0.5:
            parts = [
                p for p, s in zip(parts, stays, strict=True) if s or rng.random() < 0.6
            ]
    for _ in range(rng.randrange(5)):
        parts.insert(rng.randrange(len(parts) + 1), rng.choice(story()))
    if known is not None and rng.random() < 0.15:
        rng.shuffle(parts)
    return " ".join(parts)


def typed(text: str, rng: random.Random) -> str:
    """Return a text as it is typed: often in small letters, often without its last mark."""
    if rng.random() < 0.35:
        text = text.lower()
    if rng.random() < 0.3:
        text = text.rstrip(".?!")
    return text
