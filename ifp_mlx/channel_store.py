"""Make a channel store from a model folder, or a folder from a store: the command."""

import json
from typing import Any

import numpy as np

from . import cli
from .files.atomic import refuse_existing
from .files.paths import named_path, path_of
from .files.progress import SHOWN
from .model.checkpoint import IFPModel, open_model
from .selection.masks import Selection
from .storage.layout import CHANNEL_FILE, read_layout
from .storage.writer import write_folder, write_store

PRIOR = "prior"


def main(argv: list[str] | None = None) -> None:
    """Run ``python -m ifp_mlx.channel_store``."""
    cli.main(build_parser(), _command, argv)


def build_parser() -> cli.Parser:
    """Return the command's parser."""
    parser = cli.Parser(prog="ifp_mlx.channel_store", description=__doc__)
    cli.add_model_option(parser)
    add = parser.add_argument
    add("--output", type=named_path, required=True, help="the folder to make")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--to-folder",
        action="store_true",
        help="MODEL is a store: write the folder it was made from, bit for bit",
    )
    what.add_argument(
        "--granularity",
        type=int,
        default=1,
        help="channels that lie together and are selected together; more of them are "
        "read faster and chosen less well; default: %(default)s, or the group of a "
        "quantised down_proj",
    )
    add(
        "--order-from",
        nargs="+",
        metavar="MASKS",
        help="mask files, or folders of them, by which channels that are picked "
        "together come to lie together; or 'prior' for the model's prior, computed "
        "if need be; default: the tasks in the model's folder, else its prior, else "
        "as they are",
    )
    add("--json", action="store_true", help="end with one line of JSON on stdout")
    return parser


def uses_of(
    model: IFPModel, order_from: list[str] | None
) -> tuple[np.ndarray | None, str]:
    """Return the masks that order the channels of a store, and what to call them.

    Args:
        model: an opened folder.
        order_from: mask files, folders of them, or ``prior``; ``None`` takes what is
            there.

    Returns:
        Float32 ``[n, L, F]`` for :func:`ifp_mlx.storage.order.order_units`, or ``None``
        to keep the order; and their name.

    Raises:
        FileNotFoundError: if there is no such mask.
        ValueError: if a mask is of another model.
    """
    if order_from is None:
        tasks = model.path / "tasks"
        if any(tasks.glob("*.safetensors")):
            return uses_of(model, [str(tasks)])
        prior = model.prior
        return (None, "none") if prior is None else (np.array(prior)[None], PRIOR)
    if order_from == [PRIOR]:
        prior = model.prior if model.prior is not None else model.compute_prior()
        return np.array(prior)[None], PRIOR
    masks = []
    for path in map(path_of, order_from):
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not files:
            raise FileNotFoundError(f"There is no mask file in {path}.")
        for file in files:
            selection = Selection.load(file)
            model.check_fits(selection)
            masks.append(np.array(selection.mask()) > 0)
    return np.stack(masks).astype(np.float32), f"{len(masks)} masks"


def _command(args: Any) -> None:
    refuse_existing(args.output)
    progress = SHOWN
    model = open_model(args.model)
    about: dict[str, Any] = {"path": str(args.output)}
    if args.to_folder:
        write_folder(model.path, args.output, progress=progress)
    else:
        uses, about["order"] = uses_of(model, args.order_from)
        options = {"granularity": args.granularity, "progress": progress}
        write_store(model.path, args.output, uses=uses, **options)
        layout = read_layout(args.output / CHANNEL_FILE)
        about |= {"granularity": layout.unit, "record_bytes": layout.record_bytes}
    print(json.dumps(about) if args.json else args.output)


if __name__ == "__main__":
    main()
