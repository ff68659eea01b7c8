"""What the commands share: how they end, and the options that select."""

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from .selection.masks import Selection, find_mask
from .selection.request import Check, Request
from .selection.scores import SELECTORS
from .selection.widths import ALLOCATIONS
from .storage.folder import SHIPPED

if TYPE_CHECKING:
    from .model.export import Quantisation

# How often SmolLM2-135M-Instruct, untrained, still chooses the dense model's next
# token, by keep: "activation, first-layer", which is the default where no prior was
# computed, in examples/benchmarks/selectors/quality.md.
# Below this share of an instruction's tokens a selection is warned of: see
# examples/guides/experts.md.
LOW_AGREEMENT = 0.7
AGREEMENT = {0.75: 0.74, 0.5: 0.54, 1 / 3: 0.44}


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Print ``message`` and exit with status 2."""
        fail(self.prog, message)


def main(
    parser: argparse.ArgumentParser,
    command: Callable[[argparse.Namespace], None],
    argv: list[str] | None = None,
) -> None:
    """Parse ``argv`` (default: the process's) and :func:`run` the command on it."""
    args = parser.parse_args(argv)
    run(lambda: command(_with_task(args)), parser.prog)


def run(command: Callable[[], None], prog: str) -> None:
    """Run ``command`` so that a user's mistake is one line and exit status 2.

    ``ValueError``, ``OSError`` and ``ImportError`` carry the sentence for the user;
    anything else is a fault of ours and keeps its traceback. A terminated run still
    cleans up after itself.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        command()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
    except (ValueError, OSError, ImportError) as error:
        fail(prog, str(error))


def fail(prog: str, message: str) -> NoReturn:
    """Print ``message`` as one line on standard error and exit with status 2."""
    sentence = " ".join(message.split())
    print(f"{prog}: error: {sentence}", file=sys.stderr)
    sys.exit(2)


def add_model_option(parser: argparse.ArgumentParser, *, shipped: bool = False) -> None:
    """Add ``--model``.

    Args:
        parser: takes the option.
        shipped: whether the small checkpoint inside the package is the default.
    """
    about = "a model folder or a Hugging Face Hub id"
    if shipped:
        about += "; default: the small trained checkpoint inside the package"
        parser.add_argument("--model", default=str(SHIPPED), help=about)
    else:
        parser.add_argument("--model", required=True, help=about)


def add_selection_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which units are kept."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--instruction", help="what selects; default: the first user message"
    )
    what.add_argument("--mask-file", help="use the selection in this mask file")
    what.add_argument("--task", help="use this task of the library, see --tasks-folder")
    add_tasks_folder_option(parser)
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--keep",
        type=float,
        help="kept share of a layer's units, 0 to 1; a unit is an FFN channel, or of a "
        "mixture an expert; default 0.5",
    )
    size.add_argument("--target-size", type=int, help="kept units per layer")
    parser.add_argument(
        "--selector", default="auto", help=f"one of {', '.join(SELECTORS)}"
    )
    parser.add_argument("--allocation", help=f"one of {', '.join(ALLOCATIONS)}")
    parser.add_argument(
        "--granularity",
        type=int,
        help="units selected together; below a model's quantisation group, "
        "down_proj is quantised again",
    )
    parser.add_argument(
        "--min-agreement",
        type=float,
        help="refuse a selection whose compact model chooses the dense model's next "
        "token at a smaller share of the instruction's tokens, 0 to 1",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")


def add_compensate_option(parser: argparse.ArgumentParser, default: str) -> None:
    """Add ``--compensate``, ``None`` where neither it nor its opposite is given.

    Args:
        parser: takes the option.
        default: says when it is done then.
    """
    parser.add_argument(
        "--compensate",
        action=argparse.BooleanOptionalAction,
        help="let kept channels make up for dropped ones, by the dense model's reading "
        "of a task's examples, else of the instruction: closer to the dense model; "
        f"default: {default}",
    )


# When a compact model that is written for good is compensated.
LASTING = "for task masks, and where the instruction is read to select by it"


def check_of(text: str) -> Check:
    """Return what ``--check`` asks for; a :class:`Request` knows it, or refuses it."""
    try:
        return float(text)
    except ValueError:
        return cast(Check, text)


def add_quantisation_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how the result is quantised."""
    add = parser.add_argument
    add("--quantize", "-q", action="store_true", help="quantise the result")
    add("--q-bits", type=int, default=4, help="default: %(default)s")
    add("--q-group-size", type=int, default=64, help="default: %(default)s")


def quantisation_of(args: argparse.Namespace) -> "Quantisation | None":
    """Return what those options ask for; ``None`` leaves the weights as they are."""
    from .model.export import Quantisation

    return Quantisation(args.q_bits, args.q_group_size) if args.quantize else None


def add_tasks_folder_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--tasks-folder``, where task masks are."""
    parser.add_argument(
        "--tasks-folder",
        type=Path,
        help="the library of task masks; default: tasks in the model's folder, or here",
    )


def tasks_folders(args: argparse.Namespace) -> list[Path]:
    """Return where task masks are looked for, first come first served."""
    if args.tasks_folder is not None:
        return [args.tasks_folder]
    model = Path(args.model) / "tasks" if getattr(args, "model", None) else None
    here = Path("tasks")
    # A hub id is no folder of the user's.
    return [model, here] if model and model.parent.is_dir() else [here]


def library_folder(args: argparse.Namespace) -> Path:
    """Return the library there is, the first of :func:`tasks_folders`."""
    folders = tasks_folders(args)
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def warn_of_low_keep(selection: Selection) -> None:
    """Say on stderr what to expect when fewer units are kept than an untrained
    model bears: as measured for this task mask, else for a small model.
    """
    share, origin = selection.share, selection.origin
    if share >= max(AGREEMENT) - 0.005 or origin.selector == "predictor":
        return
    if origin.agreement is not None:  # which says more
        return
    if measured := origin.evaluation:
        found = measured
        if selection.compensates:
            found = measured.get("compensated", measured)
        expect = (
            f"this task mask chose the dense model's next token "
            f"{found['agreement']:.0%} of the time on {measured['rows']} other examples"
        )
    elif selection.unit == "expert":
        expect = (
            "some mixtures bear half of their experts, others next to none, and this one "
            "was not compared with the whole model; the selectors activation and blend "
            "do that"
        )
    else:
        keep = min(k for k in AGREEMENT if k >= share - 0.005)
        at_most = "" if abs(keep - share) < 0.005 else f"with {keep:.0%} "
        expect = (
            f"SmolLM2-135M {at_most}chooses the dense model's next token "
            f"{AGREEMENT[keep]:.0%} of the time, {AGREEMENT[max(AGREEMENT)]:.0%} at "
            f"--keep {max(AGREEMENT):g}; larger models bear more"
        )
    print(
        f"Note: {share:.0%} of the {selection.unit}s, without training for it: {expect}.",
        file=sys.stderr,
    )


def say_agreement(selection: Selection) -> None:
    """Say on stderr how far the compact model agrees with the dense one on the text that
    selected, if that was measured, and warn where it is little.
    """
    origin = selection.origin
    if origin.agreement is None:
        return
    mass = ""
    if origin.router_mass is not None:
        mass = f"the kept experts had {origin.router_mass:.0%} of the gate weights; "
    print(
        f"On the instruction's own tokens: {mass}the compact model chooses the dense "
        f"model's next token at {origin.agreement:.0%} (KL {origin.kl:.2f} nats).",
        file=sys.stderr,
    )
    if origin.agreement < LOW_AGREEMENT - 1e-6:  # float32
        print(
            f"Warning: below {LOW_AGREEMENT:.0%} the compact model is another than the "
            f"dense one on the very text that selected; keep more {selection.unit}s, or "
            "measure a task mask on examples.",
            file=sys.stderr,
        )


def say_slicing(slicing: str, selection: Selection) -> None:
    """Say on stderr whether slicing a quantised model lost anything.

    Args:
        slicing: from :meth:`IFPModel.slicing`.
        selection: what was sliced.
    """
    if slicing == "whole groups":
        print(
            "down_proj: sliced by whole quantisation groups, nothing is lost.",
            file=sys.stderr,
        )
    elif selection.compensates and slicing == "requantised":
        print("down_proj: compensated, and quantised again.", file=sys.stderr)
    elif slicing == "requantised":
        cost = selection.origin.requantisation_kl
        measured = "compact measures the cost"
        if cost is not None:
            measured = f"that costs a KL of {cost:.4g} nats per token"
        print(
            f"down_proj: the mask {selection.mask_id} cuts its quantisation groups, so "
            f"it was dequantised, sliced and quantised again; {measured}.",
            file=sys.stderr,
        )


def _with_task(args: argparse.Namespace) -> argparse.Namespace:
    """``--task NAME`` is ``--mask-file`` with the library's file of that name."""
    if getattr(args, "task", None) is not None:
        args.mask_file = str(find_mask(args.task, tasks_folders(args)))
    return args


def request_of(args: argparse.Namespace, **more: Any) -> Request:
    """Return what the options of :func:`add_selection_options` ask for.

    Args:
        args: parsed.
        more: fields of the request that have no option here.

    Raises:
        ValueError: if they contradict each other.
    """
    names: tuple[str, ...] = ("instruction", "mask_file", "keep", "target_size")
    names += ("selector", "allocation", "granularity", "seed", "compensate")
    names += ("min_agreement",)
    asked = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return Request(**asked | more)
