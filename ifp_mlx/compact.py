"""Write a compact model as a plain folder: the command."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import cli
from .files.atomic import refuse_existing
from .files.progress import SHOWN
from .model.checkpoint import IFPModel, open_model
from .model.decide import decide
from .model.export import (
    MASK_FILE,
    can_be_ragged,
    check_can_write,
    write_compact,
)
from .selection.masks import Selection


def main(argv: list[str] | None = None) -> None:
    """Run ``python -m ifp_mlx.compact``."""
    cli.main(build_parser(), _command, argv)


def build_parser() -> cli.Parser:
    """Return the command's parser; names are mlx_lm's wherever it has one."""
    parser = cli.Parser(
        prog="ifp_mlx.compact",
        description="Write what an instruction needs as a plain model folder: FFN channels, "
        "or experts of a mixture, and all else.",
    )
    cli.add_model_option(parser, shipped=True)
    cli.add_adapter_option(parser)
    cli.add_selection_options(parser)
    cli.add_compensate_option(parser, cli.LASTING)
    add = parser.add_argument
    add("--mlx-path", required=True, help="the folder to make")
    cli.add_quantisation_options(parser)
    add(
        "--json", action="store_true", help="print one line of JSON instead of the path"
    )
    return parser


def _command(args: Any) -> None:
    refuse_existing(Path(args.mlx_path))
    if args.instruction is None and args.mask_file is None:
        raise ValueError("Give --instruction or --mask-file: it says what is kept.")
    request = cli.request_of(args)
    model = open_model(args.model, args.adapter_path)
    if not request.given:
        request = replace(
            request, allocation=_writable_allocation(model, request.allocation)
        )
    quantisation = cli.quantisation_of(args)
    group = quantisation.group_size if quantisation else 1
    multiple = group if model.plan.unit == "channel" else 1
    options: dict[str, Any] = {"lasting": True, "multiple": multiple}
    decision = decide(request, model, **options, progress=SHOWN)
    check_can_write(model, decision.sizes, quantisation)
    made = model.prepare(decision, progress=SHOWN)
    out = write_compact(
        model,
        made.selection,
        args.mlx_path,
        compact=made.model,
        quantisation=quantisation,
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


def _writable_allocation(model: IFPModel, wanted: str | None) -> Any:
    """Return the allocation a plain folder can have, and say what that costs."""
    if wanted in (None, "uniform") or can_be_ragged(model):
        return wanted or "uniform"
    print(
        f"No stock architecture for {model.config['model_type']} has unequal widths per "
        "layer: writing uniform ones, for some models a little further from the dense "
        "one.",
        file=sys.stderr,
    )
    return "uniform"


if __name__ == "__main__":
    main()
