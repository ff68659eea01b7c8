"""Speed and memory, beside the dense model and a stock one: the command.

With `--check`, a compact model whose drafts the whole model checks is timed, beside
streaming the dense model from the disk (:mod:`ifp_mlx.evaluation.checked_speed`).
"""

import itertools
import json
import platform
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import mlx.core as mx

from . import cli
from .evaluation import checked_speed
from .evaluation.runners import Contest, forget_files
from .evaluation.speed import Case, draw, measure, table
from .files.paths import named_path
from .files.progress import SHOWN
from .model.checkpoint import IFPModel, open_model
from .selection.calibration import calibration_chats
from .selection.masks import Selection
from .selection.request import MOST_DRAFTED, Request
from .selection.widths import target_size

INSTRUCTION = "Answer the question in one sentence."


def main(argv: list[str] | None = None) -> None:
    """Run ``python -m ifp_mlx.benchmark``."""
    cli.main(build_parser(), _command, argv)


def build_parser() -> cli.Parser:
    """Return the command's parser."""
    parser = cli.Parser(
        prog="ifp_mlx.benchmark",
        description="Time the compact model beside the dense one and a stock one of "
        "its shape, and weigh them; or, with --check, one that the whole model checks.",
    )
    cli.add_model_option(parser, shipped=True)
    add = parser.add_argument
    many: dict[str, Any] = {"nargs": "+", "metavar": "N"}
    add("--keep", type=float, default=[0.5], **many, help="kept shares; default: 0.5")
    add("--mask-file", help="time this selection of equal widths, instead of a keep")
    add("--instruction", default=INSTRUCTION, help="the text that selects")
    add("--prompt-tokens", type=int, default=[128], **many, help="default: 128")
    add("--max-tokens", "-m", type=int, default=64, help="default: %(default)s")
    add("--turns", type=int, default=5, help="counted turns, default: %(default)s")
    add("--cold", action="store_true", help="also load with nothing in the file cache")
    add("--plot", type=named_path, metavar="FILE", help="draw it, as .png or .svg")
    add("--json", action="store_true", help="end with one line of JSON on stdout")
    add = parser.add_argument_group("checking").add_argument
    add(
        "--check",
        type=cli.check_of,
        nargs="+",
        metavar="exact|T|off",
        help="time these ways of checking instead, beside streaming the dense model and "
        "the compact one alone; the prompt selects",
    )
    add(
        "--read-gb-per-s",
        type=float,
        default=[],
        **many,
        help="also limit reading to this many 10^9 bytes a second",
    )
    add(
        "--draft-tokens",
        type=int,
        default=MOST_DRAFTED,
        metavar="N",
        help="most tokens drafted for one check; default: %(default)s",
    )
    return parser


def _command(args: Any) -> None:
    if min(*args.prompt_tokens, args.max_tokens - 1, args.turns) < 1:
        raise ValueError(
            f"--prompt-tokens {min(args.prompt_tokens)} and --turns {args.turns} must "
            f"be at least 1, --max-tokens {args.max_tokens} at least 2."
        )
    if args.read_gb_per_s and not args.check:
        raise ValueError(
            f"--read-gb-per-s {min(args.read_gb_per_s):g} limits what checks read; give "
            "--check too."
        )
    if args.check and (args.cold or args.plot):
        raise ValueError(
            f"--check {args.check[0]} has no cold runs and no picture; leave out --cold "
            "and --plot."
        )
    model = open_model(args.model)
    if args.cold:
        forget_files(model.path)  # fails now, not after the first turn
    texts = (model.tokens_of(chat[-2:]) for chat in calibration_chats())
    text = [token for tokens in texts for token in tokens]
    if args.check:
        _check(args, model, text)
        return
    masks = [Selection.load(args.mask_file)] if args.mask_file else _masks(model, args)
    cases = []
    for mask, length in itertools.product(masks, args.prompt_tokens):
        contest = _contest(model, args, mask, text[:length])
        cases.append(measure(contest, turns=args.turns, cold=args.cold, progress=SHOWN))
    _print(args, cases)


def _check(args: Any, model: IFPModel, text: list[int]) -> None:
    """Time the ways of checking, beside models that are not checked."""
    keeps: list[dict[str, Any]] = [{"keep": keep} for keep in args.keep]
    if args.mask_file:
        keeps = [{"mask_file": args.mask_file}]
    bandwidths = [speed * 1e9 for speed in args.read_gb_per_s]
    if bandwidths and min(bandwidths) <= 0:
        raise ValueError(
            f"--read-gb-per-s {min(args.read_gb_per_s):g} reads nothing; give more "
            "than 0."
        )
    checks = [check for check in args.check if check != "off"]  # which is a row anyway
    for check in checks:
        Request(check=check)  # refuses a wrong one before anything is timed
    cases = []
    for keep, length in itertools.product(keeps, args.prompt_tokens):
        about = model, keep, text[:length], args.max_tokens, args.draft_tokens
        contest = checked_speed.CheckedContest(*about)
        more: dict[str, Any] = {"turns": args.turns, "progress": SHOWN}
        cases.append(checked_speed.measure(contest, checks, bandwidths, **more))
    about_run = _about(args) | {"draft_tokens": args.draft_tokens}
    print(checked_speed.table(cases))
    if args.json:
        print(json.dumps(about_run | {"cases": [case.report() for case in cases]}))


def _masks(model: IFPModel, args: Any) -> list[Selection]:
    """Return a selection for each keep: the predictor's, or the prior's, whose choice
    costs no pass of the dense model.
    """
    selector = "prior" if model.predictor is None else "predictor"
    step = model.footprint.granularity
    sizes = [target_size(model.channels, keep, step) for keep in args.keep]
    options: dict[str, Any] = {"selector": selector, "allocation": "uniform"}
    return [
        model.select(args.instruction, target_size=size, **options) for size in sizes
    ]


def _contest(model: IFPModel, args: Any, mask: Selection, prompt: list[int]) -> Contest:
    size = mask.target_size
    if size is None:
        raise ValueError(
            f"{args.mask_file} keeps different widths per layer, and no stock model "
            "does; make the mask with the allocation uniform."
        )
    options: dict[str, Any] = {"target_size": size, "allocation": "uniform"}
    if args.mask_file:
        choose: Callable[[], Selection] = partial(Selection.load, args.mask_file)
    else:
        selector = mask.origin.selector
        selector = "auto" if selector == "all" else selector
        choose = partial(model.select, args.instruction, selector=selector, **options)
    # As generate does by itself.
    sweep = options | {"selector": "activation"}
    sweep["compensate"] = model.plan.unit == "channel"
    return Contest(model, choose, sweep, prompt, args.max_tokens, size)


def _about(args: Any) -> dict[str, Any]:
    """Print, and return, what was measured where."""
    about = {
        "model": args.model,
        "turns": args.turns,
        "max_tokens": args.max_tokens,
        "device": str(mx.default_device()),
        "machine": f"{platform.system()} {platform.machine()}",
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
        "python": platform.python_version(),
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()), end="\n\n")
    return about


def _print(args: Any, cases: Sequence[Case]) -> None:
    about = _about(args)
    print(table(cases), end="\n\n")
    for case in cases:
        print(f"keep {case.keep:.3g}, {case.prompt_tokens} prompt tokens:")
        for name, values in case.ratios().items():
            spread = f"{min(values):.3f} to {max(values):.3f}"
            print(f"- {name}: median {statistics.median(values):.3f} ({spread})")
    if args.plot is not None:
        draw(cases, args.plot)
    if args.json:
        print(json.dumps(about | {"cases": [case.report() for case in cases]}))


if __name__ == "__main__":
    main()
