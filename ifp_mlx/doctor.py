"""Say whether everything here works, and what to do where it does not: the command."""

import argparse
import json
import sys
from dataclasses import asdict

from . import cli
from .installation.findings import lines_of
from .installation.machine import machine
from .installation.packages import packages
from .installation.places import places


def main(argv: list[str] | None = None) -> None:
    """Run ``python -m ifp_mlx.doctor``."""
    cli.main(build_parser(), _command, argv)


def build_parser() -> cli.Parser:
    """Return the command's parser."""
    parser = cli.Parser(
        prog="ifp_mlx.doctor",
        description="Look at the installation: versions, device, caches, environment. "
        "Exit status 0: commands work, whatever else is noted; 1: something must be fixed.",
    )
    parser.add_argument(
        "--json", action="store_true", help="end with one line of JSON on stdout"
    )
    return parser


def _command(args: argparse.Namespace) -> None:
    findings = [*packages(), *machine(), *places()]
    usable = not any(found.state == "fix" for found in findings)
    for line in lines_of(findings):
        print(line)
    print("Everything that is needed works." if usable else "Fix what is marked: fix.")
    if args.json:
        about = {"usable": usable, "findings": [asdict(found) for found in findings]}
        print(json.dumps(about))
    sys.exit(not usable)


if __name__ == "__main__":
    main()
