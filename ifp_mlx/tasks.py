"""Task masks and their library: the command."""

import json
import sys
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from . import cli
from .evaluation.rows import Row, read_rows
from .evaluation.tasks import (
    TaskMask,
    adopt,
    check_name,
    library,
    make,
    measure,
    merge,
    overlap,
)
from .files.atomic import new_file, refuse_existing
from .files.paths import named_path
from .files.progress import SHOWN
from .files.texts import read_text
from .model.checkpoint import IFPModel, open_model
from .selection import profiles
from .selection.masks import Selection, find_mask
from .selection.prompts import as_messages
from .selection.request import SAFE_KEEP

EXAMPLES = 16


def main(argv: list[str] | None = None) -> None:
    """Run ``python -m ifp_mlx.tasks``."""
    cli.main(build_parser(), lambda args: args.verb(args), argv)


def build_parser() -> cli.Parser:
    """Return the command's parser, with a parser for each verb."""
    parser = cli.Parser(
        prog="ifp_mlx.tasks",
        description="Make, list, merge and compare masks for tasks.",
    )
    names = "make|list|merge|overlap|import|export"
    verbs = parser.add_subparsers(required=True, metavar=names)
    making = verbs.add_parser(
        "make", help="make a mask from examples; by the predictor where there is one"
    )
    what = making.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--examples", type=named_path, help="a JSONL file, as for evaluate"
    )
    what.add_argument("--instruction", help="a text, in place of examples")
    what.add_argument("--instruction-file", type=named_path, help="the same, in a file")
    merging = verbs.add_parser("merge", help="make one mask for several tasks")
    merging.add_argument("--tasks", nargs="+", required=True, help="their names")
    importing = verbs.add_parser("import", help="take over a profile of experts")
    help = "JSON of another tool: which experts a layer keeps, or how they rank"
    importing.add_argument("--profile", type=named_path, required=True, help=help)
    exporting = verbs.add_parser("export", help="write a profile of experts")
    help = "which tool it is for: %(choices)s"
    exporting.add_argument(
        "--format", required=True, choices=profiles.FORMS, help=help, metavar="TOOL"
    )
    exporting.add_argument(
        "--output", type=named_path, required=True, help="a new file"
    )
    masks = ((making, _make), (merging, _merge), (importing, _import))
    for verb, command in (*masks, (exporting, _export)):
        verb.set_defaults(verb=command)
        cli.add_model_option(verb)
        cli.add_adapter_option(verb)
        verb.add_argument("--name", required=True, help="the task's name")
    for verb, _ in masks:
        size = verb.add_mutually_exclusive_group()
        size.add_argument(
            "--keep", type=float, help=f"kept share; default {SAFE_KEEP:g}"
        )
        size.add_argument("--target-size", type=int, help="kept units per layer")
        if verb is not importing:
            verb.add_argument("--allocation", help="see ifp_mlx.generate")
        verb.add_argument("--held-out", type=named_path, help="JSONL to measure it on")
        help = "rows to make it from, and to measure it on; default: %(default)s"
        verb.add_argument("--limit", type=int, default=EXAMPLES, help=help)
    listing = verbs.add_parser("list", help="say what is in the library")
    comparing = verbs.add_parser("overlap", help="how much tasks share, by depth")
    for verb, command in ((listing, _list), (comparing, _overlap)):
        verb.set_defaults(verb=command)
        verb.add_argument("--model", help="the model whose folder has the library")
    for verb in (making, merging, importing, exporting, listing, comparing):
        cli.add_tasks_folder_option(verb)
        verb.add_argument("--json", action="store_true", help="one line of JSON")
    return parser


def _make(args: Any) -> None:
    check_name(args.name)
    model = open_model(args.model, args.adapter_path)
    examples = _examples(args, model)
    task = make(
        model,
        args.name,
        examples,
        keep=args.keep,
        target_size=args.target_size,
        allocation=args.allocation,
        progress=SHOWN,
    )
    _measure_and_save(args, model, task, examples)


def _examples(args: Any, model: IFPModel) -> list[Row]:
    if args.examples is not None:
        how = {"limit": args.limit, "vocabulary": model.vocabulary}
        return read_rows(args.examples, model.tokenizer, **how)
    text = args.instruction
    if args.instruction_file is not None:
        text = read_text(args.instruction_file)
    return [Row(model.tokens_of(as_messages(text)), [])]


def _merge(args: Any) -> None:
    model = open_model(args.model, args.adapter_path)
    folders = cli.tasks_folders(args)
    task = merge(
        model,
        args.name,
        [TaskMask.load(find_mask(name, folders)) for name in args.tasks],
        keep=args.keep,
        target_size=args.target_size,
        allocation=args.allocation,
    )
    _measure_and_save(args, model, task, [])


def _import(args: Any) -> None:
    if not args.profile.is_file():
        raise FileNotFoundError(f"There is no profile {args.profile}.")
    text = args.profile.read_bytes()
    model = open_model(args.model, args.adapter_path)
    task = adopt(model, args.name, text, keep=args.keep, target_size=args.target_size)
    made, size = task.selection.origin.made or {}, task.selection.target_size
    print(
        f"{args.profile} is a profile of the form {made['form']}: it keeps {size} of "
        f"{model.channels} experts in each of {model.layers} layers.",
        file=sys.stderr,
    )
    _measure_and_save(args, model, task, [])


def _export(args: Any) -> None:
    refuse_existing(args.output)
    model = open_model(args.model, args.adapter_path)
    selection = Selection.load(find_mask(args.name, cli.tasks_folders(args)))
    model.check_fits(selection)
    text = profiles.write(selection, model.plan.paths, args.format)
    with new_file(args.output) as scratch:
        scratch.write_text(text, encoding="utf-8")
    said = {"name": args.name, "format": args.format, "output": str(args.output)}
    print(json.dumps(said) if args.json else args.output)


def _measure_and_save(
    args: Any, model: IFPModel, task: TaskMask, seen: list[Row]
) -> None:
    if args.held_out is not None:
        rows = read_rows(args.held_out, model.tokenizer, vocabulary=model.vocabulary)
        others = [row for row in rows if row not in seen]
        progress = partial(tqdm, disable=None, leave=False)
        task = measure(model, task, others[: args.limit], progress=progress)
    path = task.save(cli.tasks_folders(args)[0])
    print(json.dumps(_about(task)) if args.json else path)


def _about(task: TaskMask) -> dict[str, Any]:
    origin = task.selection.origin
    return {
        "name": task.name,
        "model": origin.model,
        "keep": origin.keep,
        "allocation": origin.allocation,
        "mask_id": task.selection.mask_id,
        "layers": task.selection.sizes,
        "made": origin.made,
        "evaluation": task.evaluation,
    }


def _list(args: Any) -> None:
    tasks = [_about(task) for task in library(cli.library_folder(args))]
    print(
        "| task | keep | allocation | made from | KL to dense | agreement "
        "| KL compensated | mask |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for task in tasks:
        made, card = task["made"], task["evaluation"]
        source = f"{made.get('examples')} examples, {made.get('tokens')} tokens"
        if "merged" in made:
            source = " + ".join(made["merged"])
        if "form" in made:
            source = f"a profile ({made['form']})"
        cost = f"{card['kl']:.3f} | {card['agreement']:.1%}" if card else " | "
        better = card.get("compensated") if card else None
        cost += f" | {better['kl']:.3f}" if better else " | "
        print(
            f"| {task['name']} | {task['keep']:g} | {task['allocation']} | {source} "
            f"| {cost} | {task['mask_id']} |"
        )
    if args.json:
        print(json.dumps(tasks))


def _overlap(args: Any) -> None:
    tasks = library(cli.library_folder(args))
    pairs = []
    units = f"{tasks[0].selection.unit}s"
    print(f"What two tasks share of their {units}, and what chance would give (k/F):\n")
    print("| tasks | all layers | first third | middle third | last third |")
    print("|---|---|---|---|---|")
    for number, one in enumerate(tasks):
        for other in tasks[number + 1 :]:
            shares = overlap(one.selection, other.selection)
            parts = [shares, *np.array_split(shares, 3)]
            cells = [_share(part) for part in parts]
            print(f"| {one.name}, {other.name} | {' | '.join(cells)} |")
            names = {"tasks": [one.name, other.name]}
            pairs.append(
                names | dict(zip(("overlap", "chance"), shares.T.tolist(), strict=True))
            )
    if args.json:
        print(json.dumps(pairs))


def _share(part: np.ndarray) -> str:
    if not len(part):  # a model of two layers has no last third
        return "–"
    return "{:.0%} (chance {:.0%})".format(*part.mean(axis=0))


if __name__ == "__main__":
    main()
