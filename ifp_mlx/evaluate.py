"""What a selection costs in quality, beside the dense model and its alternatives.

Three kinds of evidence on selections, each from its own option:

- `--data`: teacher-forced. Every row is a conversation whose last message is the
  reference answer. The dense model and the pruned one read the same prompt and the
  same answer, token by token, and are compared at each answer token. The prompt is
  read by the pruned model too, or by the dense one (`--prefill dense`), as GRIFFIN does
  it. Kept channels make up for dropped ones where they do so in `generate`.
- `--harness`: tasks of lm-evaluation-harness, with one mask for each request or task;
  nothing is compensated there.
- `--answers`: questions whose answers can be judged: generated, then judged. With
  `--check` the whole model checks what the compact one drafts, and answers are compared
  with the dense model's own.

A fourth option, `--card`, measures the model itself: what its default way of selecting
costs on the package's own prompts, kind by kind and keep by keep. The card stays with the
model, and the other commands quote it.

With `--output` everything measured is kept row by row, and a stopped run goes on.
"""

import itertools
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from . import cli
from .evaluation import answers, card, checked, sandbox, shares
from .evaluation.log import Log
from .evaluation.measurement import about_run, evaluate
from .evaluation.picture import draw
from .evaluation.report import first_setting, report, summary
from .evaluation.rows import Row, read_rows
from .evaluation.teacher import Setting
from .files.atomic import new_file
from .files.paths import named_path
from .files.progress import SHOWN
from .model.card import save_card
from .model.checkpoint import IFPModel, open_model
from .model.decide import can_compensate
from .selection.request import Request
from .selection.scores import READING
from .selection.widths import Allocation

PAGE, DATA, PICTURE = "report.md", "results.json", "quality.png"
SPEED_TOKENS = 16
KEEP_HELP = "default: 0.75 0.5; --harness, --answers: 0.5; --card: 0.9 down to 1/3"
# Options that a card fixes itself, so that cards can be compared.
NOT_FOR_CARDS = ("selector", "allocation", "limit", "compensate", "max_tokens", "check")
MANY: dict[str, Any] = {"nargs": "+", "metavar": "X"}


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
    what = parser.add_mutually_exclusive_group(required=True)
    add: Any = what.add_argument
    add("--data", type=named_path, **MANY, help="JSONL files, one per family of tasks")
    add("--harness", **MANY, help="tasks of lm-evaluation-harness")
    add("--answers", **MANY, help="sets of questions: files, or names in a folder")
    add(
        "--card",
        action="store_true",
        help="measure on the package's own prompts how far compact models agree with the "
        "dense one, and keep that with the model; takes minutes, with the dense model "
        "in memory",
    )
    add = parser.add_argument
    add("--keep", type=float, **MANY, help=KEEP_HELP)
    add("--selector", **MANY, help="default: activation, and random with --data")
    add("--allocation", **MANY, help="default: first-layer, and uniform with --data")
    add("--limit", type=int, help="rows per file, documents or questions; default: all")
    add(
        "--output",
        type=named_path,
        metavar="FOLDER",
        help="keep results here; go on with them",
    )
    add("--seed", type=int, default=0, help="of the selector random")
    cli.add_compensate_option(
        parser,
        "with activation and blend, as generate does",
    )
    add("--json", action="store_true", help="end with one line of JSON on stdout")
    _add_data_options(parser)
    _add_task_options(parser)
    return parser


def _add_data_options(parser: cli.Parser) -> None:
    add = parser.add_argument_group("with --data").add_argument
    add("--answer-tokens", type=int, help="compare at most this many")
    add(
        "--prefill",
        choices=("compact", "dense"),
        nargs="+",
        default=["compact"],
        help="which model reads the prompt, or both in turn; default: compact",
    )
    add("--quantize", "-q", action="store_true", help="quantise the compact models")
    add("--q-bits", type=int, default=4, help="default: %(default)s")
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
        help="with --output: decode this many to time it, 0 for none; default %(default)s",
    )


def _add_task_options(parser: cli.Parser) -> None:
    add = parser.add_argument_group("with --harness or --answers").add_argument
    add(
        "--max-tokens", "-m", type=int, help="of an answer; default: the task's, or 128"
    )
    add(
        "--select-by",
        choices=("input", "task"),
        default="input",
        help="--harness: a mask for each request, or one for a task, from examples it "
        "does not evaluate or its description; default: %(default)s",
    )
    add("--num-shots", type=int, help="--harness: examples in the prompt")
    add(
        "--harness-path",
        type=named_path,
        metavar="FOLDER",
        help="with YAML files of tasks",
    )
    add(
        "--answers-folder",
        type=named_path,
        default=Path("models/answers"),
        help="of the sets; default: %(default)s, where "
        "examples/benchmarks/answers/answer_sets.py puts them",
    )
    add(
        "--check",
        type=cli.check_of,
        nargs="+",
        metavar="exact|T|off",
        help="--answers: as generate answers with these ways of checking",
    )
    add(
        "--run-generated-code",
        action="store_true",
        help="--answers: programs that the model wrote may be run here",
    )


def _command(args: Any) -> None:
    if "auto" in (args.selector or []):
        raise ValueError("--selector auto is no setting; name those to compare.")
    if args.check and not args.answers:
        raise ValueError(
            f"--check {args.check[0]} goes with --answers; leave it out, or give sets of "
            "questions."
        )
    for check in args.check or ():
        Request(check=check)  # refuses a wrong one before anything is loaded
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit {args.limit} leaves nothing; give at least 1.")
    if args.card:
        _card(args)
    elif args.data:
        _sweep(args)
    elif args.harness:
        _harness(args)
    else:
        _answers(args)


def _sweep(args: Any) -> None:
    bits = args.q_bits if args.quantize else None
    if bits is not None and args.prefill != ["compact"]:
        raise ValueError("With -q the prompt is read by the compact model alone.")
    model = open_model(args.model)
    files = _files(args, model.tokenizer)
    choices = itertools.product(
        args.prefill,
        args.selector or ["activation", "random"],
        args.keep or [0.75, 0.5],
        args.allocation or _allocations(model),
    )
    kept = args.output is not None
    arms = evaluate(
        model,
        files,
        [
            Setting(s, keep, a, prefill, bits, _compensates(args, model, s))
            for prefill, s, keep, a in choices
        ],
        folder=args.output,
        alternatives=kept and args.alternatives,
        smaller_model=args.smaller_model,
        speed_tokens=args.speed_tokens if kept else 0,
        seed=args.seed,
        progress=SHOWN,
    )
    about = {
        "model": model.name,
        "rows": {name: len(rows) for name, rows in files.items()},
        "tokens": args.speed_tokens if kept else 0,
        "device": str(mx.default_device()),
        "answer_tokens": args.answer_tokens,
        "seed": args.seed,
    }
    first = first_setting(arms)
    results = [summary(arm, first) | {"rows": arm.rows} for arm in arms]
    if kept:
        draw(arms, args.output / PICTURE)
    _publish(args, report(arms, about), about | {"results": results})


def _files(args: Any, tokenizer: Any) -> dict[str, list[Row]]:
    read = partial(
        read_rows,
        tokenizer=tokenizer,
        limit=args.limit,
        answer_tokens=args.answer_tokens,
    )
    files = {path.stem: read(path) for path in args.data}
    if empty := [name for name, rows in files.items() if not rows]:
        raise ValueError(f"{', '.join(empty)} hold no example; give other files.")
    return files


def _allocations(model: IFPModel) -> list[Allocation]:
    """Return the allocations to compare: a mixture has one width for all."""
    return ["uniform"] if model.plan.unit == "expert" else ["uniform", "first-layer"]


def _task_settings(args: Any, model: IFPModel) -> list[Setting]:
    choices = itertools.product(
        args.selector or ["activation"],
        args.keep or [0.5],
        args.allocation or _allocations(model)[-1:],
        args.check or [None],
    )
    return [
        Setting(
            selector,
            keep,
            allocation,
            prefill="compact" if check is None else "dense",
            compensate=_compensates(args, model, selector),
            check=check,
        )
        for selector, keep, allocation, check in choices
    ]


def _compensates(args: Any, model: IFPModel, selector: str) -> bool:
    """Whether a setting is compensated; by default as in generate."""
    request, reads = Request(compensate=args.compensate), selector in READING
    return can_compensate(request, model, None, reads=reads, lasting=False)


def _harness(args: Any) -> None:
    try:
        from .evaluation import harness
    except ImportError as error:
        raise ImportError(
            f"--harness needs lm-eval ({error}): pip install 'ifp_mlx[evaluate]'."
        ) from error
    model = open_model(args.model)
    tasks = harness.open_tasks(args.harness, args.harness_path)
    options: dict[str, Any] = {
        "by": args.select_by,
        "limit": args.limit,
        "shots": args.num_shots,
        "max_tokens": args.max_tokens,
    }
    about = about_run(model, args.seed) | options
    log = Log(args.output, about, harness.KEY)
    settings = _task_settings(args, model)
    harness.measure(model, tasks, settings, log, **options, seed=args.seed)
    found = harness.compare(tasks, settings, log, args.select_by)
    levels = {f"{name}, acc": harness.chance(task) for name, task in tasks.items()}
    how = {"input": "each request", "task": "each task"}[args.select_by]
    parts = [
        f"{model.name}; tasks of lm-evaluation-harness, a mask for {how}, the prompt "
        "read by the compact model",
        shares.table(found),
        *_chance_notes(found, levels),
    ]
    _publish(args, "\n\n".join(parts), about | {"results": found})


def _answers(args: Any) -> None:
    paths = [answers.find_set(name, args.answers_folder) for name in args.answers]
    sets = {path.stem: answers.read_questions(path, args.limit) for path in paths}
    if empty := [name for name, questions in sets.items() if not questions]:
        raise ValueError(f"{', '.join(empty)} hold no question; give other sets.")
    if answers.runs_programs(sets):
        _allow_programs(args.run_generated_code)
    model = open_model(args.model)
    max_tokens = args.max_tokens or answers.MAX_TOKENS
    settings = _task_settings(args, model)
    about = about_run(model, args.seed) | {"max_tokens": max_tokens}
    if compared := answers.checking(settings):
        about |= {"compared": "token by token"}
    log = Log(args.output, about, answers.KEY)
    options: dict[str, Any] = {"seed": args.seed, "progress": SHOWN}
    answers.measure(model, sets, settings, log, max_tokens=max_tokens, **options)
    found = answers.compare(sets, settings, log)
    counts = ", ".join(f"{name} {len(questions)}" for name, questions in sets.items())
    parts = [
        f"{model.name}; questions: {counts}; greedy, at most {max_tokens} tokens, each "
        f"question selects and is read by the {'dense' if compared else 'compact'} model. "
        "Where no result can be found in an answer, it is wrong.",
        shares.table(found, extra=("found",)),
        *([checked.table(found)] if compared else []),
        *_chance_notes(found, answers.chances(sets)),
    ]
    _publish(args, "\n\n".join(parts), about | {"results": found})


def _card(args: Any) -> None:
    given = [name for name in NOT_FOR_CARDS if getattr(args, name) is not None]
    if given:
        raise ValueError(
            f"--card measures the model's default way of selecting on the package's own "
            f"prompts; leave out --{given[0].replace('_', '-')}."
        )
    model = open_model(args.model)
    prompts, keeps = card.card_prompts(), card.measured_keeps(model, args.keep)
    log = Log(args.output, card.settings_of(model, prompts), card.KEY)
    found = card.measure(model, prompts, keeps, log, progress=SHOWN)
    path = save_card(model, found)
    page = f"{card.report(found)}\n\nKept in {path}."
    _publish(args, page, {"path": str(path), "card": asdict(found)})


def _allow_programs(allowed: bool) -> None:
    if not allowed:
        raise ValueError(
            "These answers are judged by running programs that the model wrote; give "
            "--run-generated-code if they may run here, best in a container."
        )
    net = "without a network" if sandbox.can_cut_off() else "WITH YOUR NETWORK"
    print(
        f"Warning: programs that the model wrote are run here, {net}, with limits of "
        "time and memory; they can read what you can read.",
        file=sys.stderr,
    )


def _chance_notes(
    found: dict[str, dict[str, Any]], chances: dict[str, float | None]
) -> list[str]:
    notes = []
    for what, arms in found.items():
        level = chances.get(what)
        note = None if level is None else shares.at_chance(what, arms["dense"], level)
        notes += [note] if note else []
    return notes


def _publish(args: Any, page: str, found: dict[str, Any]) -> None:
    print(page)
    if args.output is not None:
        for name, text in ((PAGE, page), (DATA, json.dumps(found, indent=1))):
            with new_file(args.output / name) as scratch:
                scratch.write_text(text + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
