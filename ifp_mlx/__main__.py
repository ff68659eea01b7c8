"""The console command ``ifp_mlx``: one word for each of the package's commands."""

import argparse
import difflib
import sys
from importlib import import_module
from importlib.util import find_spec

from . import __version__, cli

# The order in which help lists them; those whose module is not there are left out.
VERBS = {
    "chat": "hold a conversation in the terminal",
    "generate": "select, load, answer",
    "compact": "write a compact model as a plain model folder",
    "tasks": "make, list, merge and compare task masks",
    "server": "serve a model over the OpenAI API",
    "benchmark": "time dense, compact and stock models in turns",
    "evaluate": "compare selections with the dense model",
    "train": "train a model that selects for itself",
    "plan": "say what fits into the memory there is",
    "visualize": "draw selections",
}
SCRIPTS = {
    "channel-store": (
        "ifp_mlx.channel_store",
        "lay a model out so that few channels are read alone",
    ),
    "convert": (
        "ifp_mlx.convert.from_pytorch",
        "make a model folder from PyTorch or GGUF",
    ),
    "to-coreml": ("ifp_mlx.convert.to_coreml", "export to Core ML"),
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
    import_module(modules[verb]).main(rest)


def available() -> dict[str, str]:
    """Return the module of every command that is there; none is imported."""
    modules = {verb: f"ifp_mlx.{verb}" for verb in VERBS}
    modules |= {verb: module for verb, (module, _) in SCRIPTS.items()}
    return {verb: name for verb, name in modules.items() if _is_there(name)}


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even its package
        return False


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of what stands before the command."""
    about = VERBS | {verb: text for verb, (_, text) in SCRIPTS.items()}
    width = max(map(len, about)) + 2
    lines = [f"  {verb:<{width}}{about[verb]}" for verb in available()]
    parser = cli.Parser(
        prog="ifp_mlx",
        usage="ifp_mlx COMMAND [OPTIONS]",
        description="Big model on disk, small model in memory, chosen by the "
        "instruction.",
        epilog="\n".join(
            ["commands:", *lines, "", "ifp_mlx COMMAND --help says more."]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ifp_mlx {__version__}")
    return parser


if __name__ == "__main__":
    main()
