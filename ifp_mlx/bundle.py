"""Make a bundle for an app, verify one, or take a task out: the command."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import cli
from .bundling.layout import take
from .bundling.making import (
    Package,
    Wishes,
    bundle_folders,
    bundle_packages,
    check_wishes,
    find_package,
)
from .bundling.metadata import Bundle, read_bundle
from .bundling.sums import verify
from .files.atomic import refuse_existing, scratch_beside
from .files.paths import named_path, path_of
from .files.progress import SHOWN
from .model.checkpoint import open_model
from .model.export import MASK_FILE, write_requested
from .selection.masks import Selection, find_mask
from .selection.request import Request
from .storage.folder import SHIPPED

ONLY_TASK = "main"  # what an instruction's task is called without --name


def main(argv: list[str] | None = None) -> None:
    """Run ``python -m ifp_mlx.bundle``."""
    cli.main(build_parser(), _command, argv)


def build_parser() -> cli.Parser:
    """Return the command's parser."""
    parser = cli.Parser(
        prog="ifp_mlx.bundle",
        description="Put a model's tasks into one folder for an app: what they share "
        "once, what each needs beside it, metadata, checksums, Swift sources and the "
        "manifests of asset packs.",
    )
    add = parser.add_argument
    many: dict[str, Any] = {"nargs": "+", "default": []}
    add(
        "--output", type=named_path, help="the folder to make; its name is the bundle's"
    )
    add("--force", action="store_true", help="replace an existing bundle")
    source = parser.add_argument_group("from a model, as ifp_mlx.compact takes it")
    help = "a model folder or a Hugging Face Hub id; default: the shipped checkpoint"
    source.add_argument("--model", help=help)
    pairs: dict[str, Any] = {"metavar": "NAME=INSTRUCTION", "action": "append"}
    help = "a task and what selects for it; may be repeated"
    source.add_argument("--prepare", **pairs, default=[], help=help)
    source.add_argument("--tasks", **many, help="tasks of the library, by their names")
    source.add_argument(
        "--name", help=f"the name of a single task; default: {ONLY_TASK}"
    )
    cli.add_adapter_option(parser)
    kinds: dict[str, Any] = {"choices": ("mlx", "coreml"), "default": "mlx"}
    source.add_argument("--format", **kinds, help="of the model; default: %(default)s")
    help = "positions of a Core ML package; default: 2048 at most"
    source.add_argument("--context-length", type=int, help=help)
    cli.add_selection_options(parser)
    cli.add_compensate_option(parser, cli.LASTING)
    cli.add_quantisation_options(parser)
    made = parser.add_argument_group("from what was made before")
    paths: dict[str, Any] = {**many, "type": named_path}
    made.add_argument("--folders", **paths, help="compact folders; named as the tasks")
    help = (
        "packages of ifp_mlx to-coreml: one with a function for each task, or several"
    )
    made.add_argument("--coreml", **paths, help=help)
    said = parser.add_argument_group("what metadata.json says")
    said.add_argument("--bundle-version", default="1.0", help="default: %(default)s")
    said.add_argument("--license", help="of the base model; default: as its card says")
    said.add_argument(
        "--source", help="where the base model is from, such as an address"
    )
    help = "tasks that are fetched with the app; default: none, all on demand"
    said.add_argument("--prefetch", **many, help=help)
    there = parser.add_argument_group("with an existing bundle")
    there.add_argument(
        "--verify", type=named_path, metavar="BUNDLE", help="check all files"
    )
    help = "write one task to --output, as an ordinary model folder"
    there.add_argument("--take", nargs=2, metavar=("BUNDLE", "TASK"), help=help)
    add("--json", action="store_true", help="one line of JSON instead of the path")
    return parser


def _command(args: Any) -> None:
    _check_sources(args)
    if args.verify:
        return _say(args, verify(args.verify, progress=SHOWN), "all as it was made")
    if args.output is None:
        raise ValueError("Give --output: the folder to make.")
    if not args.force or args.take:
        refuse_existing(args.output)
    if args.take:
        bundle, task = args.take
        out = take(read_bundle(path_of(bundle)), task, args.output, progress=SHOWN)
        print(json.dumps({"path": str(out), "task": task}) if args.json else out)
        return
    wishes = Wishes(
        args.bundle_version, args.license, args.source, args.prefetch, args.force
    )
    if args.coreml or args.format == "coreml":
        with _packages(args, wishes) as packages:
            out = bundle_packages(packages, args.output, wishes)
    else:
        with _folders(args, wishes) as folders:
            out = bundle_folders(folders, args.output, wishes, progress=SHOWN)
    bundle = read_bundle(out)
    _say_licence(bundle)
    _say(args, bundle, "made")


def _check_sources(args: Any) -> None:
    """Check that just one option says what the bundle is made of."""
    names = ["instruction", "mask_file", "prepare", "tasks", "folders", "coreml"]
    given = [name for name in [*names, "verify", "take"] if getattr(args, name)]
    flags = [f"--{name.replace('_', '-')}" for name in given]
    if len(given) != 1:
        raise ValueError(
            f"{' and '.join(flags) or 'Nothing'} says what to do; give one of --prepare, "
            "--tasks, --instruction, --mask-file, --task, --folders, --coreml, --verify "
            "and --take."
        )
    if args.name and given[0] not in names[:2]:
        raise ValueError(
            f"--name {args.name} is the name of a single task, and {flags[0]} has its "
            "own; leave it out."
        )
    made = args.quantize or args.format != "mlx"
    sliced = (args.model, args.adapter_path, args.keep, args.target_size, made or None)
    if given[0] not in names[:4] and any(value is not None for value in sliced):
        raise ValueError(
            f"{flags[0]} takes what was made before; leave out --model, --adapter-path, "
            "--keep, --target-size, --format and -q."
        )
    if args.context_length is not None and args.format != "coreml":
        raise ValueError(
            f"--context-length {args.context_length} is for --format coreml, whose cache "
            "is allocated at once; leave it out."
        )


@contextmanager
def _folders(args: Any, wishes: Wishes) -> Iterator[dict[str, Path]]:
    """Yield the compact folder of every task, made now unless they are given."""
    if args.folders:
        named = {folder.absolute().name: folder for folder in args.folders}
        if len(named) < len(args.folders):
            raise ValueError(
                "Two of the --folders have the same name, which the task gets; rename one."
            )
        yield named
        return
    requests = _requests(args)
    check_wishes(args.output, requests, wishes)
    with scratch_beside(args.output) as scratch:
        model = open_model(args.model or SHIPPED, args.adapter_path)
        quantisation = cli.quantisation_of(args)
        made = {}
        for name, request in requests.items():
            asked, how = cli.writable(request, model), {"quantisation": quantisation}
            folder = write_requested(
                model, asked, scratch / name, **how, progress=SHOWN
            )
            print(f"{name}:", file=sys.stderr)
            kept = Selection.load(folder / MASK_FILE)
            cli.say_quality(kept, model.card, request)
            made[name] = folder
        yield made


@contextmanager
def _packages(args: Any, wishes: Wishes) -> Iterator[list[Package]]:
    """Yield the Core ML packages that are given, or one made now with all tasks."""
    if args.coreml:
        yield [find_package(path) for path in args.coreml]
        return
    from .convert.to_coreml import Options, check_coremltools, export, select

    check_coremltools()
    requests = _requests(args)
    check_wishes(args.output, requests, wishes)
    with scratch_beside(args.output) as scratch:
        model = open_model(args.model or SHIPPED, args.adapter_path)
        chosen = select(model, requests, progress=SHOWN)
        how = Options(cli.quantisation_of(args), context_length=args.context_length)
        export(model, chosen, scratch / "all", how, progress=SHOWN)
        yield [find_package(scratch / "all")]


def _requests(args: Any) -> dict[str, Request]:
    """Return the request for each task, by the task's name."""
    if args.prepare:
        texts = dict(map(_pair, args.prepare))
        if len(texts) < len(args.prepare):
            raise ValueError("--prepare names a task twice; give each its own name.")
        return {n: cli.request_of(args, instruction=text) for n, text in texts.items()}
    if args.tasks:
        folders = cli.tasks_folders(args)
        files = {name: str(find_mask(name, folders)) for name in args.tasks}
        return {n: cli.request_of(args, mask_file=file) for n, file in files.items()}
    return {args.name or args.task or ONLY_TASK: cli.request_of(args)}


def _pair(text: str) -> tuple[str, str]:
    name, equals, instruction = text.partition("=")
    if not (name and equals and instruction.strip()):
        raise ValueError(f"--prepare {text!r} is not of the form NAME=INSTRUCTION.")
    return name, instruction


def _say_licence(bundle: Bundle) -> None:
    base = bundle.about["base_model"]
    if base["license"] is None:
        print(
            f"Warning: the licence of {base['name'] or 'the base model'} is unknown; "
            "find out before you pass it on, and name it with --license.",
            file=sys.stderr,
        )


def _say(args: Any, bundle: Bundle, what: str) -> None:
    parts, tasks, size = bundle.parts, bundle.about["tasks"], bundle.about["bytes"]
    sizes = ", ".join(
        f"{part.name} {part.bytes / 1e6:.1f} MB" for part in parts.values()
    )
    words = f"{bundle.folder}: {what}; {sizes}"
    apart = None
    if len(parts) > 1:  # else there is nothing to compare: all is shared
        apart = sum(part.bytes for task in tasks for part in bundle.parts_of(task))
        words += f": {size / 1e6:.1f} MB, and {apart / 1e6:.1f} MB as separate folders"
    print(f"{words}.", file=sys.stderr)
    about: dict[str, Any] = {"path": str(bundle.folder), "bytes": size}
    about |= {"separate_bytes": apart, "tasks": list(tasks)}
    about["parts"] = {name: part.bytes for name, part in parts.items()}
    print(json.dumps(about) if args.json else bundle.folder)


if __name__ == "__main__":
    main()
