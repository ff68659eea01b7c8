"""The commands of a conversation: lines that begin with /."""

import difflib
import json
from collections.abc import Callable
from typing import Any, NamedTuple

from ..files.atomic import new_file, refuse_existing
from ..files.paths import path_of
from .conversation import Conversation, Source
from .figures import selected, statistics

# What a saved conversation says about its last answer's selection.
SELECTION = (
    "mask_id",
    "identity",
    "kept_channels",
    "total_channels",
    "unit",
    "agreement",
    "promise",
)
OFF = "off"  # takes back what was chosen


class Command(NamedTuple):
    """One command.

    Attributes:
        argument: what follows its name.
        about: for ``/help``.
        run: does it; returns the text to show.
    """

    argument: str
    about: str
    run: Callable[[Conversation, str], str]


def obey(talk: Conversation, line: str) -> str:
    """Do what a line asks for; return the text to show, maybe empty.

    Args:
        talk: the conversation, which it may change.
        line: ``/NAME``, and what follows.

    Raises:
        EOFError: if the line asks to end.
        ValueError: if there is no such command.
        IFPError, OSError: if it cannot be done.
    """
    name, argument = [*line.split(maxsplit=1), ""][:2]
    command = COMMANDS.get(name)
    if command is None:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else "/help lists them."
        raise ValueError(
            f"There is no command {name}; {hint} A message that begins with / is "
            "written with two of them."
        )
    return command.run(talk, argument.strip())


def _task(talk: Conversation, name: str) -> str:
    if not name:
        names = ", ".join(talk.tasks()) or "none; python -m ifp_mlx.tasks makes them"
        return f"Tasks: {names}. {selected(talk)}"
    if name == OFF:
        talk.select_by(None)
    else:
        talk.select_by_task(name)
    return selected(talk)


def _select(talk: Conversation, instruction: str) -> str:
    if instruction == OFF:
        talk.select_by(None)
    elif instruction:
        words = f"the instruction {instruction!r}"
        talk.select_by(Source(words, instruction=instruction))
    return selected(talk)


def _keep(talk: Conversation, share: str) -> str:
    if not share:
        return selected(talk)
    talk.keep(_share_of(share))
    return selected(talk) if talk.source else f"The next answer keeps {share}."


def _share_of(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:  # auto; the engine refuses other words
        return text


def _system(talk: Conversation, text: str) -> str:
    if text:
        talk.say_before(None if text == OFF else text)
    if talk.system is None:
        return "There is no system message."
    return f"The system message is: {talk.system}"


def _save(talk: Conversation, name: str) -> str:
    path = path_of(name)
    text = _FORMS.get(path.suffix.lower())
    if text is None:
        forms = " or ".join(_FORMS)
        raise ValueError(f"{name or '/save'} must name a file that ends in {forms}.")
    if path.resolve() not in talk.saved:
        refuse_existing(path)
    with new_file(path) as scratch:
        scratch.write_text(text(talk), encoding="utf-8")
    talk.saved.add(path.resolve())
    return f"Saved in {path}."


def _as_json(talk: Conversation) -> str:
    about: dict[str, Any] = {"model": talk.engine.name, "messages": talk.messages}
    if (done := talk.last) is not None:
        about["selection"] = {name: getattr(done, name) for name in SELECTION}
    return json.dumps(about, ensure_ascii=False, indent=1) + "\n"


def _as_markdown(talk: Conversation) -> str:
    who = {"system": "System", "user": "You", "assistant": talk.engine.name}
    parts = [f"**{who[m['role']]}:** {m['content']}" for m in talk.messages]
    title = f"# A conversation with {talk.engine.name}"
    return "\n\n".join([title, *parts, talk.status]).rstrip() + "\n"


_FORMS = {".json": _as_json, ".md": _as_markdown}


def _stats(talk: Conversation, _: str) -> str:
    return statistics(talk)


def _reset(talk: Conversation, _: str) -> str:
    talk.reset()
    return "What was said is forgotten; the next message is the first."


def _help(talk: Conversation, _: str) -> str:
    heads = [f"{name} {command.argument}" for name, command in COMMANDS.items()]
    width = max(map(len, heads)) + 2
    rows = zip(heads, COMMANDS.values(), strict=True)
    lines = [f"{head:<{width}}{command.about}" for head, command in rows]
    keys = "Ctrl-C stops an answer, Ctrl-D ends the conversation."
    return "\n".join([*lines, keys])


def _quit(talk: Conversation, _: str) -> str:
    raise EOFError


COMMANDS = {
    "/task": Command(
        "[NAME|off]", "select by a task of the library; or list them", _task
    ),
    "/keep": Command("SHARE|auto", "keep this share from the next answer on", _keep),
    "/select": Command(
        "[TEXT|off]", "select by this instruction; or say what is selected", _select
    ),
    "/system": Command("[TEXT|off]", "change the system message; or show it", _system),
    "/save": Command("FILE", "write the conversation as .json or .md", _save),
    "/stats": Command("", "figures of selection, speed and memory", _stats),
    "/reset": Command("", "forget what was said", _reset),
    "/help": Command("", "list the commands", _help),
    "/quit": Command("", "end", _quit),
}
