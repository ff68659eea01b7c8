"""What a selection costs in quality, beside the dense model and its alternatives.

Three kinds of evidence, each from its own option:

- `--data`: teacher-forced. Every row is a conversation whose last message is the
  reference answer. The dense model and the pruned one read the same prompt and the
  same answer, token by token, and are compared at each answer token. The prompt is
  read by the pruned model too, as `generate` does it, or by the dense one
  (`--prefill dense`), as GRIFFIN does it.
- `--harness`: tasks of lm-evaluation-harness, with one mask for each request or task.
- `--answers`: questions whose answers can be checked: generated, then judged.

With `--output` everything measured is kept row by row, and a stopped run goes on.
"""

import itertools
import json
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from . import cli
from .atomic import new_file
from .evaluation.log import Log
from .evaluation.picture import draw
from .evaluation.report import first_setting, report, summary
from .evaluation.rows import Row, read_rows
from .evaluation.sweep import KEY, Arm, arms_of, measure, rivals_of, time_arms
from .evaluation.teacher import METRICS, Evaluator, Setting
from .model import IFPModel, load

__all__ = ["METRICS", "Evaluator", "Row", "Setting", "evaluate", "main", "read_rows"]

PAGE, DATA, PICTURE = "report.md", "results.json", "quality.png"
SPEED_TOKENS = 16


def evaluate(
    model: IFPModel,
    files: dict[str, list[Row]],
    settings: list[Setting],
    *,
    folder: Path | None = None,
    alternatives: bool = False,
    smaller_model: str | None = None,
    speed_tokens: int = 0,
    seed: int = 0,
    progress: Any = iter,
) -> list[Arm]:
    """Measure every setting on every row, and the alternatives to selecting.

    Args:
        model: from :func:`ifp_mlx.load`.
        files: rows by the name of their file.
        settings: what to compare.
        folder: where results are kept, so that a stopped run goes on.
        alternatives: measure the dense model quantised to about each setting's size.
        smaller_model: measure this model too, a folder or hub id.
        speed_tokens: decode so many for the speed; 0 measures none.
        seed: of the selector ``random``.
        progress: wraps the iterations over rows and over turns.

    Returns:
        The dense model, the settings and the alternatives, measured.

    Raises:
        ValueError: if ``folder`` was begun with other settings.
    """
    about = {
        "model": model.name,
        "fingerprint": [round(float(x), 4) for x in model.fingerprint[:8]],
        "seed": seed,
        "versions": {name: version(name) for name in ("ifp_mlx", "mlx", "mlx-lm")},
    }
    log = Log(folder, about, KEY)
    row = next(iter(files.values()))[0]
    arms = arms_of(model, settings, [], row)
    sizes = {arm.bytes for arm in arms[1:]} if alternatives else ()
    rivals = rivals_of(model, sizes, smaller_model)
    arms = arms_of(model, settings, rivals, row)
    measure(model, files, arms, rivals, log, seed=seed, progress=progress)
    time_arms(model, arms, rivals, row, speed_tokens, progress=progress)
    return arms


def main(argv: list[str] | None = None) -> None:
    """Run ``python -m ifp_mlx.evaluate``."""
    cli.main(build_parser(), _command, argv)


def build_parser() -> cli.Parser:
    """Return the command's parser."""
    parser = cli.Parser(
        prog="ifp_mlx.evaluate",
        description="Compare selectors, keeps and allocations with the dense model: on "
        "reference answers, on tasks of lm-evaluation-harness, or on answers that can "
        "be checked.",
    )
    cli.add_model_option(parser)
    add = parser.add_argument
    many: dict[str, Any] = {"nargs": "+", "metavar": "X"}
    add("--data", required=True, **many, help="JSONL files, one per family of tasks")
    add("--keep", type=float, default=[0.75, 0.5], **many, help="default: 0.75 0.5")
    add("--selector", default=["activation", "random"], **many)
    add("--allocation", default=["uniform", "first-layer"], **many)
    add("--limit", type=int, help="rows per file; default: all")
    add("--answer-tokens", type=int, help="compare so many of an answer at most")
    add(
        "--prefill",
        choices=("compact", "dense"),
        nargs="+",
        default=["compact"],
        help="which model reads the prompt, or both in turn; default: compact",
    )
    add("--quantize", "-q", action="store_true", help="quantise the compact models")
    add("--q-bits", type=int, default=4, help="default: %(default)s")
    add("--output", type=Path, metavar="FOLDER", help="keep results here, and go on")
    add(
        "--no-alternatives",
        dest="alternatives",
        action="store_false",
        help="with --output: leave out the dense model quantised to the same sizes",
    )
    add("--smaller-model", metavar="M", help="a smaller dense model to measure beside")
    add(
        "--speed-tokens",
        type=int,
        default=SPEED_TOKENS,
        help="with --output: decode so many to time it, 0 for none; default %(default)s",
    )
    add("--seed", type=int, default=0, help="of the selector random")
    add("--json", action="store_true", help="end with one line of JSON on stdout")
    return parser


def _command(args: Any) -> None:
    if "auto" in args.selector:
        raise ValueError("--selector auto is no setting; name those to compare.")
    model, tokenizer = load(args.model)
    files = _files(args, tokenizer)
    choices = itertools.product(args.prefill, args.selector, args.keep, args.allocation)
    bits = args.q_bits if args.quantize else None
    if bits is not None and args.prefill != ["compact"]:
        raise ValueError("With -q the prompt is read by the compact model alone.")
    kept = args.output is not None
    arms = evaluate(
        model,
        files,
        [Setting(s, keep, a, prefill, bits) for prefill, s, keep, a in choices],
        folder=args.output,
        alternatives=kept and args.alternatives,
        smaller_model=args.smaller_model,
        speed_tokens=args.speed_tokens if kept else 0,
        seed=args.seed,
        progress=partial(tqdm, disable=None, leave=False),
    )
    about = {
        "model": model.name,
        "rows": {name: len(rows) for name, rows in files.items()},
        "tokens": args.speed_tokens if kept else 0,
        "device": str(mx.default_device()),
        "answer_tokens": args.answer_tokens,
        "seed": args.seed,
    }
    _publish(arms, about, args)


def _files(args: Any, tokenizer: Any) -> dict[str, list[Row]]:
    read = partial(
        read_rows,
        tokenizer=tokenizer,
        limit=args.limit,
        answer_tokens=args.answer_tokens,
    )
    files = {path.stem: read(path) for path in map(Path, args.data)}
    if empty := [name for name, rows in files.items() if not rows]:
        raise ValueError(f"{', '.join(empty)} hold no example; give other files.")
    return files


def _publish(arms: list[Arm], about: dict[str, Any], args: Any) -> None:
    page = report(arms, about)
    first = first_setting(arms)
    found = about | {
        "results": [summary(arm, first) | {"rows": arm.rows} for arm in arms]
    }
    print(page)
    if args.output is not None:
        for name, text in ((PAGE, page), (DATA, json.dumps(found, indent=1))):
            with new_file(args.output / name) as scratch:
                scratch.write_text(text + "\n", encoding="utf-8")
        draw(arms, args.output / PICTURE)
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
