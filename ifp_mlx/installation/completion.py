"""The script by which a shell completes the commands: made once, so that completing
starts no Python.
"""

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

from ..files.paths import named_path

SHELLS = ("bash", "zsh", "fish")
# Which options name a file or folder; their names say it where their types do not.
ENDS = ("_path", "_file", "_folder")
PATHS = {"model", "output", "data", "predictor", "order_from"}
# Words for options without fixed choices.
WORDS = {"keep": ("auto",), "check": ("exact", "off")}
# Task masks lie in a folder here, unless another is named.
TASKS = "ls tasks 2>/dev/null | sed -n 's/[.]safetensors//p'"


def script(
    commands: Mapping[str, tuple[str, argparse.ArgumentParser]],
    shell: str,
    words: Mapping[str, tuple[str, ...]],
) -> str:
    """Return the script of a shell.

    Args:
        commands: name → what it does, and its parser, which is changed.
        shell: one of ``SHELLS``.
        words: option → the words it takes, beside ``WORDS``.

    Raises:
        ImportError: if shtab is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise ImportError(
            "Completion needs shtab: pip install 'ifp-mlx[completion]'."
        ) from error
    whole = argparse.ArgumentParser(prog="ifp_mlx")
    verbs = whole.add_subparsers()
    for name, (about, parser) in commands.items():
        for action in _actions(parser):
            _describe(action, WORDS | dict(words), shtab)
        verbs.add_parser(
            name,
            help=about,
            description=about,
            parents=[parser],
            conflict_handler="resolve",
        )
    return str(shtab.complete(whole, shell=shell))


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the actions of a parser and of its subparsers."""
    for action in parser._actions:
        yield action
        if isinstance(action.choices, dict):
            for below in action.choices.values():
                yield from _actions(below)


def _describe(action: Any, words: Mapping[str, tuple[str, ...]], shtab: Any) -> None:
    """Tell shtab what an option takes."""
    name = action.dest
    if action.nargs == 0 or action.choices:
        return
    if name in words:
        action.choices = words[name]
    elif name in ("task", "tasks"):
        action.complete = shtab.cmd(TASKS)
    elif action.type is named_path or name in PATHS or name.endswith(ENDS):
        action.complete = shtab.FILE
