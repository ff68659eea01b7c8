"""Judge answers: each kind of question has its own rule for what is right."""

import re
from typing import Any

from . import sandbox

Check = dict[str, Any]
NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
PROGRAM = "program"


def judge(check: Check, prompt: str, text: str) -> bool | None:
    """Whether an answer is right; ``None`` if no answer can be found in it.

    Args:
        check: what makes it right: ``kind``, one of :data:`KINDS`, and its details.
        prompt: the question.
        text: the answer.

    Raises:
        ValueError: if there is no such kind.
        ImportError: if the package that judges it is not installed.
    """
    if check.get("kind") not in KINDS:
        raise ValueError(
            f"An answer of the kind {check.get('kind')!r} cannot be checked; the kinds "
            f"are {', '.join(KINDS)}."
        )
    return KINDS[check["kind"]](check, prompt, text)


def chance(check: Check) -> float:
    """Return how often a blind guess is right."""
    if check["kind"] == "choice":
        return 1 / len(check["options"])
    return 0.5 if check["kind"] == "yes-no" else 0.0


def _number(check: Check, prompt: str, text: str) -> bool | None:
    """``expected``: the last number counts, or the first one after ####."""
    marked = re.search(rf"####\s*\$?({NUMBER})", text)
    numbers = [marked.group(1)] if marked else re.findall(NUMBER, text)
    if not numbers:
        return None
    return _value(numbers[-1]) == _value(check["expected"])


def _value(number: str) -> float:
    return float(number.replace(",", ""))


def _yes_no(check: Check, prompt: str, text: str) -> bool | None:
    """``expected``, yes or no: the first of the two words counts."""
    word = re.search(r"\b(yes|no)\b", text, re.IGNORECASE)
    return None if word is None else word.group(1).lower() == check["expected"]


def _choice(check: Check, prompt: str, text: str) -> bool | None:
    """``expected``, a number, of ``options``: a letter or the option itself counts."""
    letters = "".join(chr(ord("A") + n) for n in range(len(check["options"])))
    said = re.search(rf"answer is:?\s*\(?([{letters}])\b", text)
    # A sentence may begin with the word "A", so a lone letter needs its mark.
    first = re.match(rf"\W*([{letters}])(?:[).:,]|\s*\n|\s*$)", text)
    if found := said or first:
        return letters.index(found.group(1)) == check["expected"]
    begun = [text.strip().startswith(o.strip()) for o in check["options"]]
    return begun.index(True) == check["expected"] if any(begun) else None


def _program(check: Check, prompt: str, text: str) -> bool | None:
    """``start`` (imports and the function's head), ``test`` and ``entry``: the program
    with the answer in it passes the tests.
    """
    block = re.search(r"```(?:python|py)?\n(.*?)(?:```|\Z)", text, re.DOTALL)
    code = block.group(1) if block else text
    entry = check["entry"]
    if f"def {entry}(" not in code:
        if block is None and not re.match(r"\s+\S", text):
            return None  # neither a function nor the indented rest of one
        code = check["start"] + code
    else:  # the question's imports, above the function's head
        code = check["start"].split("def ")[0] + code
    return sandbox.passes(f"{code}\n\n{check['test']}\n\ncheck({entry})\n")


def _reasoning_gym(check: Check, prompt: str, text: str) -> bool | None:
    """``name`` and ``entry``: its own verifier gives the full score to what stands
    between answer tags, else to the last line.
    """
    try:
        from reasoning_gym import get_score_answer_fn
    except ImportError as error:
        raise _missing("reasoning-gym", error) from error
    tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    lines = tagged or text.strip().splitlines()
    if not lines:
        return None
    score = get_score_answer_fn(check["name"])
    return score(lines[-1].strip(), check["entry"]) >= 1.0


def _instructions(check: Check, prompt: str, text: str) -> bool | None:
    """``ids`` and ``details``: every instruction of IFBench is followed, to the word."""
    try:
        from if_verifiable.common import evaluate_instructions
        from if_verifiable.ifbench import INSTRUCTION_DICT
    except ImportError as error:
        raise _missing("if-verifiable", error) from error
    results, scores = evaluate_instructions(
        text, check["ids"], check["details"], prompt, INSTRUCTION_DICT
    )
    return scores.binary_strict == 1.0 if results else None


def _missing(package: str, error: ImportError) -> ImportError:
    return ImportError(
        f"These answers are judged by {package} ({error}): "
        "pip install 'ifp_mlx[evaluate]'."
    )


KINDS = {
    "number": _number,
    "yes-no": _yes_no,
    "choice": _choice,
    PROGRAM: _program,
    "reasoning-gym": _reasoning_gym,
    "instructions": _instructions,
}
