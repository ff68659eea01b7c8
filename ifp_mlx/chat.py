"""A conversation in the terminal: the command."""

import argparse
from typing import Any

from . import cli
from .engine import Engine
from .engine.sampling import DEFAULT_MAX_TOKENS
from .files.paths import named_path
from .terminal.bars import Bars
from .terminal.conversation import Conversation, Source
from .terminal.reading import reader_of
from .terminal.talk import hold
from .terminal.visible import say

# The options by which an engine selects; None means that one was not given.
CHOOSING = (
    "keep",
    "target_size",
    "allocation",
    "granularity",
    "compensate",
    "min_agreement",
    "chat_template_config",
)
EPILOG = """In the conversation, /help lists the commands; Ctrl-C stops an answer, Ctrl-D
ends. Where standard input is no terminal, each of its lines is a message or a command."""


def main(argv: list[str] | None = None) -> None:
    """Run ``python -m ifp_mlx.chat``."""
    cli.main(build_parser(), _command, argv)


def build_parser() -> cli.Parser:
    """Return the command's parser; names are those of ``ifp_mlx.generate``."""
    parser = cli.Parser(
        prog="ifp_mlx.chat",
        description="Talk to the part of a model that an instruction needs.",
        epilog=EPILOG,
    )
    cli.add_model_option(parser, shipped=True)
    cli.add_adapter_option(parser)
    add = parser.add_argument
    add("--system-prompt", help="the system message")
    cli.add_selection_options(parser)
    cli.add_compensate_option(parser, "where it is read anyway, to select")
    add(
        "--memory-gb",
        type=float,
        help="refuse what needs more memory, in 10^9 bytes; default: no limit",
    )
    turn = "turn: each message selects anew, as if it were the first; "
    cli.add_check_options(parser, turn)
    add(
        "--max-tokens",
        "-m",
        type=int,
        help=f"longest answer; default: {DEFAULT_MAX_TOKENS}, or what the context leaves",
    )
    cli.add_decoding_options(parser, prefill_step=256)
    cli.add_kv_options(parser)
    add(
        "--history",
        type=named_path,
        metavar="FILE",
        help="keep what is typed in this file, for the next time; default: forget it",
    )
    return parser


def _command(args: argparse.Namespace) -> None:
    asked, bars = _asked(args), Bars()
    how: dict[str, Any] = {"memory_limit": cli.bytes_of(args.memory_gb)}
    how |= {"prefill_step": args.prefill_step_size, "adapter_path": args.adapter_path}
    how |= cli.kv_of(args)
    with Engine.open(args.model, progress=bars, **how) as engine:
        talk = Conversation(engine, cli.tasks_folders(args), report=bars, **asked)
        if (source := _source(args)) is not None:
            talk.select_by(source)
        bars.close()
        reader = reader_of(talk, args.history)
        if reader.typed:
            say(f"{engine.name}: /help lists the commands, Ctrl-D ends.")
        hold(talk, reader, bars)


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the options ask of a conversation, or refuse it."""
    cli.request_of(args)
    choosing: dict[str, Any] = {name: getattr(args, name) for name in CHOOSING}
    choosing = {name: asked for name, asked in choosing.items() if asked is not None}
    choosing |= {"check": cli.check_of(args.check), "draft_tokens": args.draft_tokens}
    decoding = cli.decoding_of(args)
    return {
        "system": args.system_prompt or None,
        "reselect": args.reselect,
        "choosing": choosing | {"selector": args.selector},
        "decoding": decoding | {"max_tokens": args.max_tokens, "seed": args.seed},
    }


def _source(args: argparse.Namespace) -> Source | None:
    """Return what selects before the first message, if an option names it."""
    if args.mask_file is not None:
        words = f"the task {args.task}" if args.task else f"the mask {args.mask_file}"
        return Source(words, mask_file=args.mask_file)
    if args.instruction is not None:
        words = f"the instruction {args.instruction!r}"
        return Source(words, instruction=args.instruction)
    return None


if __name__ == "__main__":
    main()
