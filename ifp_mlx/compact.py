"""Write a compact model as a plain folder: the command."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import cli
from .files.atomic import refuse_existing
from .model.checkpoint import IFPModel, load
from .model.export import MASK_FILE, Quantisation, can_be_ragged, write_compact
from .selection.masks import COMPENSATED, Selection
from .selection.scores import READING

# The KL to the dense model of the default at keep 0.5, with the first layer whole and
# with uniform widths: examples/benchmarks/selectors/quality.md.
WIDTHS_KL = {"SmolLM2-135M": (0.92, 0.98), "Gemma-3-270m": (0.55, 0.52)}


def main(argv: list[str] | None = None) -> None:
    """Run ``python -m ifp_mlx.compact``."""
    cli.main(build_parser(), _command, argv)


def build_parser() -> cli.Parser:
    """Return the command's parser; names are mlx_lm's wherever it has one."""
    parser = cli.Parser(
        prog="ifp_mlx.compact",
        description="Write the channels an instruction needs as a plain model folder.",
    )
    cli.add_model_option(parser, shipped=True)
    cli.add_selection_options(parser)
    add_compensation_option(parser)
    add = parser.add_argument
    add("--mlx-path", required=True, help="the folder to make")
    add_quantisation_options(parser)
    add(
        "--json", action="store_true", help="print one line of JSON instead of the path"
    )
    return parser


def add_compensation_option(parser: cli.Parser) -> None:
    """Add the option that says whether a written model is compensated."""
    cli.add_compensate_option(
        parser, "for task masks, and where the instruction is read to select by it"
    )


def add_quantisation_options(parser: cli.Parser) -> None:
    """Add the options that say how the result is quantised."""
    add = parser.add_argument
    add("--quantize", "-q", action="store_true", help="quantise the result")
    add("--q-bits", type=int, default=4, help="default: %(default)s")
    add("--q-group-size", type=int, default=64, help="default: %(default)s")


def quantisation_of(args: Any) -> Quantisation | None:
    """Return what those options ask for; ``None`` leaves the weights as they are."""
    return Quantisation(args.q_bits, args.q_group_size) if args.quantize else None


def _command(args: Any) -> None:
    refuse_existing(Path(args.mlx_path))
    if args.instruction is None and args.mask_file is None:
        raise ValueError("Give --instruction or --mask-file: it says what is kept.")
    options = cli.selection_options(args)
    model, _ = load(args.model)
    progress = partial(tqdm, disable=None, leave=False)
    if args.mask_file:
        selection = Selection.load(args.mask_file)
    else:
        options["allocation"] = _writable_allocation(model, args.allocation)
        selection = model.select(args.instruction, progress=progress, **options)
    selection = with_text(args, selection, model)
    quantisation = quantisation_of(args)
    out = write_compact(
        model,
        selection,
        args.mlx_path,
        quantisation=quantisation,
        progress=progress,
    )
    written = Selection.load(out / MASK_FILE)
    if how := written.info.get(COMPENSATED):
        print(f"Compensated by {how}.", file=sys.stderr)
    cli.warn_of_low_keep(written)
    slicing = model.slicing(written)
    cli.say_slicing(slicing, written)
    about: dict[str, Any] = {"path": str(out), "mask_id": written.mask_id}
    about |= {"layers": written.sizes, "down_proj": slicing}
    about["requantisation_kl"] = _cost_of(written)
    print(json.dumps(about) if args.json else out)


def with_text(args: Any, selection: Selection, model: IFPModel) -> Selection:
    """Return a selection, compensated by a task's own examples, or by the instruction
    that the dense model read, unless asked otherwise.

    Args:
        args: with the options of :func:`add_compensation_option`, and ``instruction``.
        selection: made with this model.
        model: the large model.
    """
    if args.compensate is False:
        return selection.plain()
    reads = selection.info.get("selector") in READING
    if args.instruction is not None and (args.compensate or reads):
        tokens = model.instruction_tokens(args.instruction)
        return selection.compensated(tokens, "the instruction")
    if selection.compensates or selection.text is None:
        if args.compensate and selection.text is None:
            raise ValueError(
                "--compensate needs the text of an instruction, and this mask has "
                "none; give --instruction, or a task mask."
            )
        return selection
    return selection.compensated()


def _cost_of(written: Selection) -> float | None:
    cost = written.info.get("requantisation KL")
    return None if cost is None else float(cost.split()[0])


def _writable_allocation(model: IFPModel, wanted: str | None) -> Any:
    """Return the allocation a plain folder can have, and say what that costs."""
    if wanted in (None, "uniform") or can_be_ragged(model):
        return wanted or "uniform"
    seen = " and ".join(
        f"{name} from {first:.2f} to {uniform:.2f}"
        for name, (first, uniform) in WIDTHS_KL.items()
    )
    print(
        f"No stock architecture for {model.config['model_type']} has unequal widths per "
        f"layer: writing uniform ones. At keep 0.5 that takes {seen} nats per token of "
        "KL to the dense model.",
        file=sys.stderr,
    )
    return "uniform"


if __name__ == "__main__":
    main()
