"""Draw selections as a page: the command."""

import json
from typing import Any

from . import cli
from .evaluation.tasks import library
from .files.paths import named_path
from .model.checkpoint import open_model
from .pictures.assemble import visualize
from .pictures.measured import read_benchmarks, read_evaluation
from .pictures.tally import Tally
from .selection.masks import Selection


def main(argv: list[str] | None = None) -> None:
    """Run ``python -m ifp_mlx.visualize``."""
    cli.main(build_parser(), _command, argv)


def build_parser() -> cli.Parser:
    """Return the command's parser."""
    parser = cli.Parser(
        prog="ifp_mlx.visualize",
        description="Draw the masks of a task library, or of mask files, as one HTML "
        "page: which units they keep, what they share, quality and speed.",
    )
    cli.add_model_option(parser)
    cli.add_tasks_folder_option(parser)
    add = parser.add_argument
    many: dict[str, Any] = {"nargs": "+", "metavar": "F", "default": []}
    many["type"] = named_path
    add("--mask-file", **many, help="draw these masks instead of the library")
    add("--output", type=named_path, required=True, help="the HTML page to write")
    add("--png-folder", type=named_path, help="write the pictures there as PNG too")
    add("--evaluation", type=named_path, help="results.json of evaluate --output")
    add("--benchmark", **many, help="files with what benchmark --json printed")
    add("--json", action="store_true", help="print one line of JSON, not the files")
    return parser


def _command(args: Any) -> None:
    if args.mask_file and args.tasks_folder:
        raise ValueError(
            f"--mask-file and --tasks-folder {args.tasks_folder} both say what to draw; "
            "give one."
        )
    tally = _tally(args)
    model = open_model(args.model)
    for selection in tally.selections:
        model.check_fits(selection)
    written = visualize(
        model.name,
        tally,
        args.output,
        quality=read_evaluation(args.evaluation) if args.evaluation else (),
        speed=read_benchmarks(args.benchmark),
        png_folder=args.png_folder,
    )
    if args.json:
        pairs = tally.by_depth
        found = {
            "files": [str(path) for path in written],
            "masks": {
                name: selection.mask_id
                for name, selection in zip(tally.names, tally.selections, strict=True)
            },
            "always_on": float(tally.always.mean()),
            "overlap": float(pairs[..., 0].mean()) if len(pairs) else None,
            "chance": float(pairs[..., 1].mean()) if len(pairs) else None,
        }
        print(json.dumps(found))
        return
    for path in written:
        print(path)


def _tally(args: Any) -> Tally:
    """Return what is to be drawn."""
    if args.mask_file:
        found = {path: Selection.load(path) for path in args.mask_file}
        names = [s.origin.task or path.stem for path, s in found.items()]
        return Tally(names, list(found.values()))
    tasks = library(cli.library_folder(args))
    return Tally([task.name for task in tasks], [task.selection for task in tasks])


if __name__ == "__main__":
    main()
