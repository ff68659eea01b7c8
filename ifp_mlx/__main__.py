"""The console command ``ifp_mlx``: one word for each of the package's commands."""

import argparse
import difflib
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from . import __version__, cli

# What a person wants to do, and the commands for it, in the order of the help; a
# command whose module is missing is left out.
GROUPS = {
    "talk to a model": {
        "chat": "hold a conversation in the terminal",
        "generate": "select, load, answer",
    },
    "make it small and keep it": {
        "compact": "write a compact model as a plain model folder",
        "tasks": "make, list, merge and compare task masks",
        "channel-store": "lay a model out so that only chosen channels are read",
        "convert": "make a model folder from PyTorch or GGUF",
    },
    "see and measure": {
        "plan": "say what fits into the memory there is",
        "visualize": "draw selections",
        "evaluate": "compare selections with the dense model",
        "benchmark": "time dense, compact and stock models in turns",
        "sensitivity": "measure how much each layer can lose",
    },
    "train": {
        "train": "train a model that selects for itself",
    },
    "serve and build apps": {
        "server": "serve a model over the OpenAI API",
        "bundle": "put tasks into one folder for an app",
        "to-coreml": "export to Core ML",
    },
    "look after the installation": {
        "doctor": "say what works here, and what to fix",
        "completion": "write the completion script of a shell",
    },
}
# The modules of commands whose module has another name.
MODULES = {
    "channel-store": "ifp_mlx.channel_store",
    "convert": "ifp_mlx.convert.from_pytorch",
    "to-coreml": "ifp_mlx.convert.to_coreml",
}


def main(argv: list[str] | None = None) -> None:
    """Run ``ifp_mlx VERB ...``, which is ``python -m ifp_mlx.VERB ...``."""
    arguments = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    split = next((n for n, a in enumerate(arguments) if not a.startswith("-")), None)
    if split is None:
        parser.parse_args(arguments or ["--help"])
        return
    parser.parse_args(arguments[:split])
    verb, rest = arguments[split], arguments[split + 1 :]
    modules = available()
    if verb not in modules:
        near = difflib.get_close_matches(verb, modules, 1)
        hint = f"did you mean {near[0]}?" if near else "see ifp_mlx --help."
        cli.fail(parser.prog, f"there is no command {verb!r}; {hint}")
    _module_of(verb, modules[verb]).main(rest)


def _module_of(verb: str, name: str) -> Any:
    """Import a command's module; a missing package ends with one sentence."""
    try:
        return import_module(name)
    except ImportError as error:
        cli.fail(f"ifp_mlx {verb}", f"{error}; ifp_mlx doctor says what is missing.")


def available() -> dict[str, str]:
    """Return the module of every command that is there; none is imported."""
    verbs = (verb for group in GROUPS.values() for verb in group)
    modules = {verb: MODULES.get(verb, f"ifp_mlx.{verb}") for verb in verbs}
    return {verb: name for verb, name in modules.items() if _is_there(name)}


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even its package
        return False


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the options before the command."""
    parser = cli.Parser(
        prog="ifp_mlx",
        usage="ifp_mlx COMMAND [OPTIONS]",
        description="Big model on disk, small model in memory, chosen by the "
        "instruction.",
        epilog="\n".join([*_listing(), "", "ifp_mlx COMMAND --help says more."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ifp_mlx {__version__}")
    return parser


def _listing() -> list[str]:
    """Return the lines that list the commands, by group."""
    modules, lines = available(), []
    width = max(map(len, modules)) + 2
    for title, group in GROUPS.items():
        there = {verb: about for verb, about in group.items() if verb in modules}
        lines += ["", f"{title}:"] if there else []
        lines += [f"  {verb:<{width}}{about}" for verb, about in there.items()]
    return lines[1:]


if __name__ == "__main__":
    main()
