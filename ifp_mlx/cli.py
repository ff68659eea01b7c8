"""What the commands share: how they end, and the options that select.

What needs MLX is imported where it is used: the help, the doctor and a mistyped command do
without.
"""

import argparse
import json
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from .files.paths import named_path, path_of
from .terminal.visible import say, visible_output

if TYPE_CHECKING:
    from .model.card import Card
    from .model.checkpoint import IFPModel
    from .model.export import Quantisation
    from .selection.masks import Selection
    from .selection.request import Check, Keep, Request


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

    ``ValueError``, ``OSError``, ``ImportError`` and the engine's ``MemoryError`` carry the
    sentence for the user; anything else is a fault of ours and keeps its traceback. A
    terminated run still cleans up after itself.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with visible_output():
            command()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
    except (ValueError, OSError, ImportError, MemoryError) as error:
        fail(prog, str(error) or "There is not enough memory; close something.")


def fail(prog: str, message: str) -> NoReturn:
    """Print ``message`` as one line on standard error and exit with status 2."""
    say(f"{prog}: error: {' '.join(message.split())}")
    sys.exit(2)


def add_model_option(parser: argparse.ArgumentParser, *, shipped: bool = False) -> None:
    """Add ``--model``.

    Args:
        parser: takes the option.
        shipped: whether the small checkpoint inside the package is the default.
    """
    from .storage.folder import SHIPPED

    about = "a model folder or a Hugging Face Hub id"
    if shipped:
        about += "; default: the small trained checkpoint inside the package"
        parser.add_argument("--model", default=str(SHIPPED), help=about)
    else:
        parser.add_argument("--model", required=True, help=about)


def add_adapter_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--adapter-path``."""
    parser.add_argument(
        "--adapter-path",
        metavar="FOLDER",
        help="an adapter that mlx_lm.lora trained on the (dense) model, fused into the "
        "weights as they are read; masks have to be made with it too",
    )


def add_selection_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which units are kept."""
    from .selection.request import MIN_AGREEMENT
    from .selection.scores import SELECTORS
    from .selection.widths import ALLOCATIONS

    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--instruction",
        help="the text that selects; default: all up to the first user message",
    )
    what.add_argument("--mask-file", help="use the selection in this mask file")
    what.add_argument("--task", help="use this task of the library, see --tasks-folder")
    add_tasks_folder_option(parser)
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--keep",
        type=keep_of,
        metavar="SHARE|auto",
        help="kept share of a layer's units, 0 to 1; a unit is an FFN channel, or in a "
        "mixture an expert; auto: the smallest share for which the model's card, made by "
        "its first request, promises --min-agreement; default: a trained checkpoint's "
        "own, else auto",
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
        help="at which share of tokens the compact model is to choose the dense model's "
        f"next token, 0 to 1: what --keep auto asks of the model's card (default "
        f"{MIN_AGREEMENT:g}); with a given size, a selection that falls short on the "
        "instruction's last tokens is refused (default: nothing is asked)",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")


def add_compensate_option(parser: argparse.ArgumentParser, default: str) -> None:
    """Add ``--compensate`` and ``--no-compensate``; the value is ``None`` if neither is
    given.

    Args:
        parser: takes the option.
        default: in words for the help, when compensation is done if neither is given.
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


def keep_of(text: str) -> "Keep":
    """Return what ``--keep`` asks for; :class:`Request` checks it."""
    try:
        return float(text)
    except ValueError:
        return cast("Keep", text)


def check_of(text: str) -> "Check":
    """Return what ``--check`` asks for; :class:`Request` checks it."""
    try:
        return float(text)
    except ValueError:
        return cast("Check", text)


def add_check_options(parser: argparse.ArgumentParser, turn: str = "") -> None:
    """Add the options by which the whole model checks, and channels are chosen again.

    Args:
        parser: takes the options.
        turn: what ``--reselect turn`` does, where it can be asked for.
    """
    from .selection.request import MOST_DRAFTED, RESELECTS

    add = parser.add_argument
    add(
        "--check",
        default="off",
        metavar="exact|T|off",
        help="the whole model checks what the compact one drafts, its dropped channels "
        "read layer by layer; exact: the answer is the whole model's; T from 0 to 1: a "
        "token stands if the whole model gives it at least T of its best's probability; "
        "default: %(default)s",
    )
    add(
        "--draft-tokens",
        type=int,
        default=MOST_DRAFTED,
        metavar="N",
        help="most tokens drafted for one check; default: %(default)s",
    )
    add(
        "--reselect",
        choices=("turn", *RESELECTS) if turn else RESELECTS,
        default="off",
        help=f"{turn}drift: choose other channels in a check when those kept fit the "
        "latest tokens badly; default: %(default)s",
    )


def bytes_of(gigabytes: float | None) -> int | None:
    """Return what ``--memory-gb`` allows; ``None`` sets no limit."""
    if gigabytes is not None and not 0 < gigabytes < 1e6:
        raise ValueError(f"--memory-gb {gigabytes:g} must be more than 0.")
    return None if gigabytes is None else round(gigabytes * 1e9)


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


def add_decoding_options(
    parser: argparse.ArgumentParser,
    when: str | None = None,
    *,
    prefill_step: int | None = None,
) -> None:
    """Add the options that say how the prompt is read, how tokens are chosen and where
    the text ends, mlx_lm's names wherever it has one; :func:`decoding_of` and
    :func:`request_of` read them. ``--seed`` is with the options that select.

    Args:
        parser: takes the options.
        when: they apply, in words for the help; default: always.
        prefill_step: tokens of the prompt that are read at once, by default; ``None`` is
            what ``stream_generate`` reads.
    """
    from .decoding.options import Decoding
    from .slicing.stock import PREFILL_STEP

    add = parser.add_argument_group("decoding", when and f"{when}:").add_argument
    for option in fields(Decoding):
        if option.metadata:
            name, about = _flag(option.name), option.metadata["help"]
            kind = int if isinstance(option.default, int) else float
            said = "none" if option.default is None else f"{option.default:g}"
            more: dict[str, Any] = {"type": kind, "default": option.default}
            more["metavar"] = "N" if kind is int else "X"
            add(name, help=f"{about}; default: {said}", **more)
    add(
        "--logit-bias",
        type=bias_of,
        metavar="JSON",
        help='added to the logits of tokens, by id, such as {"42": -5}',
    )
    add(
        "--stop",
        dest="stop_strings",
        action="append",
        default=[],
        metavar="TEXT",
        help="end the text before this; may be repeated",
    )
    add(
        "--chat-template-config",
        "--chat-template-args",
        type=object_of,
        metavar="JSON",
        help='options of the chat template, such as {"enable_thinking": false}',
    )
    add(
        "--prefill-step-size",
        type=whole_of,
        default=prefill_step or PREFILL_STEP,
        metavar="N",
        help="tokens of the prompt that are read at once; fewer take less memory; "
        "default: %(default)s",
    )


def decoding_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the options of :func:`add_decoding_options` say of decoding, as
    ``stream_generate`` and the engine take it.
    """
    from .decoding.options import Decoding

    names = {*Decoding.names(), "logit_bias"} & vars(args).keys() - {"seed"}
    chosen = {name: getattr(args, name) for name in names}
    chosen["stop_strings"] = tuple(args.stop_strings)
    Decoding(**chosen)  # or it says what is wrong, before anything is loaded
    return chosen


def add_kv_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how the KV cache is kept; :func:`kv_of` reads them."""
    add = parser.add_argument_group("KV cache").add_argument
    from .decoding.kv import BITS, KVOptions

    kept, size = KVOptions(), "the model's head size must be a multiple of it"
    add(
        "--kv-bits",
        type=int,
        metavar="N",
        help=f"quantise it to this many bits: {', '.join(map(str, BITS))}; not with --check",
    )
    add(
        "--kv-group-size",
        type=int,
        default=kept.kv_group_size,
        metavar="N",
        help=f"numbers that share a scale, {size}; default: %(default)s",
    )
    add(
        "--quantized-kv-start",
        type=int,
        default=kept.quantized_kv_start,
        metavar="N",
        help="quantise it once it has this many tokens; default: %(default)s",
    )
    add(
        "--max-kv-size",
        type=int,
        metavar="N",
        help="keep this many tokens in it, the first four and the latest; not with "
        "--check or --kv-bits",
    )


def kv_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the options of :func:`add_kv_options` say, as ``stream_generate`` and
    the engine take it.
    """
    from .decoding.kv import KVOptions

    return asdict(KVOptions.split(vars(args))[0])


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def object_of(text: str) -> dict[str, Any]:
    """Return the JSON object that an option gives."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(
            f'{text} is no JSON object; write it as {{"name": value}}, in single quotes.'
        )
    return found


def bias_of(text: str) -> dict[int, float]:
    """Return what ``--logit-bias`` gives: numbers, by token id."""
    try:
        return {int(token): float(more) for token, more in object_of(text).items()}
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(
            f'{text} must give a number for each token id, such as {{"42": -5}}.'
        ) from None


def whole_of(text: str) -> int:
    """Return a whole number, at least 1."""
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} must be a whole number, at least 1.")
    return int(text)


def add_tasks_folder_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--tasks-folder``, where task masks are."""
    parser.add_argument(
        "--tasks-folder",
        type=named_path,
        help="the library of task masks; default: tasks in the model's folder, or here",
    )


def tasks_folders(args: argparse.Namespace) -> list[Path]:
    """Return the folders that are searched for task masks, in this order."""
    if args.tasks_folder is not None:
        return [args.tasks_folder]
    model = path_of(args.model) / "tasks" if getattr(args, "model", None) else None
    here = Path("tasks")
    # With a hub id there is no folder of the user's own.
    return [model, here] if model and model.parent.is_dir() else [here]


def library_folder(args: argparse.Namespace) -> Path:
    """Return the library there is, the first of :func:`tasks_folders`."""
    folders = tasks_folders(args)
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def say_quality(
    selection: "Selection", card: "Card | None", request: "Request"
) -> None:
    """Say on stderr how good a selection is, as far as that is known: by the comparison
    with the dense model on the text that selected, and by what was measured before.

    Args:
        selection: how it was made and what was measured of it.
        card: of the model.
        request: the one it was made for.
    """
    if min(selection.sizes) < selection.channels:
        lines = [*_self_check(selection), *_measured_before(selection, card)]
    else:
        lines = list(_nothing_dropped(card, request))
    for line in lines:
        say(line)


def _nothing_dropped(card: "Card | None", request: "Request") -> Iterator[str]:
    from .selection.request import MIN_AGREEMENT

    if card is not None and request.auto:
        most, least = card.keeps()[-1], request.min_agreement or MIN_AGREEMENT
        yield (
            f"Note: this is the whole model: {card.words(most)}, and --keep auto asks for "
            f"{least:.0%}; a --keep of your own, or a lower --min-agreement, makes it "
            "smaller."
        )


def _self_check(selection: "Selection") -> Iterator[str]:
    from .selection.request import MIN_AGREEMENT

    origin = selection.origin
    if origin.agreement is None:
        return
    mass = ""
    if origin.router_mass is not None:
        mass = f"the kept experts had {origin.router_mass:.0%} of the gate weights; "
    yield (
        f"On the instruction's last tokens: {mass}the compact model chooses the dense "
        f"model's next token at {origin.agreement:.0%} (KL {origin.kl:.2f} nats)."
    )
    if origin.agreement < MIN_AGREEMENT - 1e-6:  # float32
        yield (
            f"Warning: below {MIN_AGREEMENT:.0%} the compact model differs from the dense "
            f"one even on the text that selected; keep more {selection.unit}s, "
            "or measure a task mask on examples."
        )


def _measured_before(selection: "Selection", card: "Card | None") -> Iterator[str]:
    from .selection.request import MIN_AGREEMENT, SAFE_KEEP, WITHOUT_CARD

    share, origin = selection.share, selection.origin
    if origin.predicted:
        return
    kept = f"{share:.0%} of the {selection.unit}s, without training for it"
    if found := origin.evaluation:
        if selection.compensates:
            found = found.get("compensated", found) | {"rows": found["rows"]}
        yield (
            f"Note: {kept}: this task mask chose the dense model's next token "
            f"{found['agreement']:.0%} of the time on {found['rows']} other examples."
        )
    elif card is not None:
        promise = card.promise(share)
        low = promise is None or promise < MIN_AGREEMENT
        knee = f"; {MIN_AGREEMENT:.0%} takes keep {card.smallest(MIN_AGREEMENT):.2g}"
        yield f"{'Warning' if low else 'Note'}: {card.words(share)}{knee if low else ''}."
    elif share < SAFE_KEEP - 0.005:
        yield f"Note: {kept}: {WITHOUT_CARD}."


def say_slicing(slicing: str, selection: "Selection") -> None:
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


def writable(request: "Request", model: "IFPModel") -> "Request":
    """Return a request that a plain folder can hold, and say what that costs."""
    from .model.export import can_be_ragged

    if request.given:
        return request
    wanted = request.allocation
    if wanted in (None, "uniform") or can_be_ragged(model):
        return replace(request, allocation=wanted or "uniform")
    print(
        f"No stock architecture for {model.config['model_type']} has unequal widths per "
        "layer: writing uniform ones, for some models a little further from the dense "
        "one.",
        file=sys.stderr,
    )
    return replace(request, allocation="uniform")


def _with_task(args: argparse.Namespace) -> argparse.Namespace:
    """``--task NAME`` is ``--mask-file`` with the library's file of that name."""
    if getattr(args, "task", None) is not None:
        from .selection.masks import find_mask

        args.mask_file = str(find_mask(args.task, tasks_folders(args)))
    return args


def request_of(args: argparse.Namespace, **more: Any) -> "Request":
    """Return what the options of :func:`add_selection_options` ask for.

    Args:
        args: parsed.
        more: fields of the request that have no option here.

    Raises:
        ValueError: if they contradict each other.
    """
    from .selection.request import Request

    names: tuple[str, ...] = ("instruction", "mask_file", "keep", "target_size")
    names += ("selector", "allocation", "granularity", "seed", "compensate")
    names += ("min_agreement", "chat_template_config")
    asked = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return Request(**asked | more)
