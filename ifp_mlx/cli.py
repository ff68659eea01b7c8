"""What the commands share: how they end, and the options that select."""

import argparse
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from .masks import ALLOCATIONS
from .selectors import SELECTORS


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Print ``message`` and exit with status 2."""
        fail(self.prog, message)


def main(
    parser: argparse.ArgumentParser,
    command: Callable[[argparse.Namespace], None],
    argv: list[str] | None = None,
) -> None:
    """Parse ``argv`` (default: the process's) and :func:`run` the command on it."""
    args = parser.parse_args(argv)
    run(lambda: command(args), parser.prog)


def run(command: Callable[[], None], prog: str) -> None:
    """Run ``command`` so that a user's mistake is one line and exit status 2.

    ``ValueError``, ``OSError`` and ``ImportError`` carry the sentence for the user;
    anything else is a fault of ours and keeps its traceback. A terminated run still
    cleans up after itself.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        command()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
    except (ValueError, OSError, ImportError) as error:
        fail(prog, str(error))


def fail(prog: str, message: str) -> NoReturn:
    """Print ``message`` as one line on standard error and exit with status 2."""
    sentence = " ".join(message.split())
    print(f"{prog}: error: {sentence}", file=sys.stderr)
    sys.exit(2)


def add_model_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--model``."""
    parser.add_argument(
        "--model", required=True, help="a model folder or a Hugging Face Hub id"
    )


def add_selection_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which channels are kept."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--instruction", help="what selects; default: the first user message"
    )
    what.add_argument("--mask-file", help="use the selection in this mask file")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--keep", type=float, help="kept share of the FFN channels, 0 to 1; default 0.5"
    )
    size.add_argument("--target-size", type=int, help="kept channels per layer")
    parser.add_argument(
        "--selector", default="auto", help=f"one of {', '.join(SELECTORS)}"
    )
    parser.add_argument("--allocation", help=f"one of {', '.join(ALLOCATIONS)}")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")


def selection_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the selection options as the arguments of :meth:`IFPModel.select`.

    Raises:
        ValueError: if a mask file comes with options that would make another one.
    """
    options = {
        name: getattr(args, name)
        for name in ("keep", "target_size", "selector", "allocation", "seed")
    }
    given = [n for n in ("keep", "target_size", "allocation") if options[n] is not None]
    if args.mask_file and (given or options["selector"] != "auto"):
        raise ValueError(
            f"--mask-file {args.mask_file} says which channels are kept; leave out "
            "--keep, --target-size, --selector and --allocation."
        )
    return options
