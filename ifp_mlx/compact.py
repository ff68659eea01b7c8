"""Write a compact model as a plain folder: the command."""

import json
import sys
from typing import Any

from . import cli
from .files.atomic import refuse_existing
from .files.paths import named_path
from .files.progress import SHOWN
from .model.checkpoint import open_model
from .model.export import MASK_FILE, write_requested
from .selection.masks import Selection


def main(argv: list[str] | None = None) -> None:
    """Run ``python -m ifp_mlx.compact``."""
    cli.main(build_parser(), _command, argv)


def build_parser() -> cli.Parser:
    """Return the command's parser; names are mlx_lm's wherever it has one."""
    parser = cli.Parser(
        prog="ifp_mlx.compact",
        description="Write a plain model folder with only the FFN channels, or experts of a "
        "mixture, that an instruction needs.",
    )
    cli.add_model_option(parser, shipped=True)
    cli.add_adapter_option(parser)
    cli.add_selection_options(parser)
    cli.add_compensate_option(parser, cli.LASTING)
    add = parser.add_argument
    add("--mlx-path", type=named_path, required=True, help="the folder to make")
    cli.add_quantisation_options(parser)
    add(
        "--json", action="store_true", help="print one line of JSON instead of the path"
    )
    return parser


def _command(args: Any) -> None:
    refuse_existing(args.mlx_path)
    if args.instruction is None and args.mask_file is None:
        raise ValueError("Give --instruction or --mask-file: it says what is kept.")
    request = cli.request_of(args)
    model = open_model(args.model, args.adapter_path)
    out = write_requested(
        model,
        cli.writable(request, model),
        args.mlx_path,
        quantisation=cli.quantisation_of(args),
        progress=SHOWN,
    )
    written = Selection.load(out / MASK_FILE)
    if how := written.compensation:
        print(f"Compensated by {how.tokens} tokens of {how.source}.", file=sys.stderr)
    cli.say_quality(written, model.card, request)
    slicing = model.slicing(written)
    cli.say_slicing(slicing, written)
    about: dict[str, Any] = {"path": str(out), "mask_id": written.mask_id}
    about |= {"identity": written.identity, "unit": written.unit}
    about |= {"layers": written.sizes, "down_proj": slicing}
    about |= {"agreement": written.origin.agreement, "kl": written.origin.kl}
    about["router_mass"] = written.origin.router_mass
    about["requantisation_kl"] = written.origin.requantisation_kl
    print(json.dumps(about) if args.json else out)


if __name__ == "__main__":
    main()
