"""Write the script by which a shell completes these commands: the command."""

import argparse
from importlib import import_module

from . import cli
from .__main__ import GROUPS, available
from .installation.completion import SHELLS, script

PLACES = """where shells look for it:
  bash  mkdir -p ~/.local/share/bash-completion/completions
        ifp_mlx completion bash > ~/.local/share/bash-completion/completions/ifp_mlx
  zsh   mkdir -p ~/.zfunc
        ifp_mlx completion zsh > ~/.zfunc/_ifp_mlx
        # and in ~/.zshrc, once: fpath+=~/.zfunc; autoload -Uz compinit && compinit
  fish  mkdir -p ~/.config/fish/completions
        ifp_mlx completion fish > ~/.config/fish/completions/ifp_mlx.fish

Write it again after an upgrade: it knows the commands of the version that wrote it."""


def main(argv: list[str] | None = None) -> None:
    """Run ``python -m ifp_mlx.completion``."""
    cli.main(build_parser(), _command, argv)


def build_parser() -> cli.Parser:
    """Return the command's parser."""
    parser = cli.Parser(
        prog="ifp_mlx.completion",
        description="Print the script by which a shell completes ifp_mlx.",
        epilog=PLACES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=SHELLS, help="which shell: %(choices)s")
    return parser


def _command(args: argparse.Namespace) -> None:
    from .selection.scores import SELECTORS
    from .selection.widths import ALLOCATIONS

    about = {verb: text for group in GROUPS.values() for verb, text in group.items()}
    commands = {
        verb: (about[verb], import_module(module).build_parser())
        for verb, module in available().items()
    }
    words = {"selector": tuple(SELECTORS), "allocation": tuple(ALLOCATIONS)}
    print(script(commands, args.shell, words))


if __name__ == "__main__":
    main()
