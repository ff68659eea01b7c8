"""What fits and how long it takes: the command."""

import json
import sys
from dataclasses import replace
from typing import Any

from . import cli
from .decoding.kv import KVOptions
from .files.paths import named_path
from .planning import devices, machine
from .planning.roofline import Job
from .planning.rows import _verdict, as_json, open_subject, plan_rows, report
from .selection.request import SAFE_KEEP

DOES_NOT_FIT = 1


def build_parser() -> cli.Parser:
    """Return the command's parser."""
    parser = cli.Parser(
        prog="ifp_mlx.plan",
        description="Say what fits into the memory there is, and how long it will "
        "take, before anything is loaded.",
        epilog="Exit status: 0 if it fits or no memory was named, 1 if it does not "
        "fit, 2 on a mistake.",
    )
    add = parser.add_argument
    add(
        "--train",
        type=named_path,
        metavar="CONFIG",
        help="a config file of ifp_mlx.train: say what that run takes instead",
    )
    add(
        "--model",
        help="a model folder, a config.json, or a hub id (whose config.json is fetched)",
    )
    add("--memory-gb", type=float, help="memory that may be used, in 10^9 bytes")
    add(
        "--device",
        help=f"predict times: one of {', '.join(devices.DEVICES)}; or here, which "
        "measures this machine once, for some seconds",
    )
    add("--measure-again", action="store_true", help="forget what --device here knows")
    add(
        "--context-length",
        type=int,
        default=4096,
        help="tokens that the KV cache must hold, default: %(default)s",
    )
    add(
        "--keep",
        type=float,
        nargs="+",
        help=f"kept shares of the units; default 0.5, {SAFE_KEEP:g}, and the largest "
        "that fits",
    )
    cli.add_kv_options(parser)
    add("--prompt-tokens", type=int, default=512, help="default: %(default)s")
    add(
        "--instruction-tokens",
        type=int,
        help="of the instruction; default: the prompt's",
    )
    add("--max-tokens", "-m", type=int, default=100, help="default: %(default)s")
    add(
        "--channel-store",
        action="store_true",
        help="plan as if the weights lay in a channel store",
    )
    add("--json", action="store_true", help="end with one line of JSON on stdout")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run ``python -m ifp_mlx.plan``."""
    cli.main(build_parser(), _command, argv)


def _command(args: Any) -> None:
    if args.train is not None:
        return _training(args)
    if args.model is None:
        raise ValueError("--model is missing; give it, or --train with a config file.")
    _check(args)
    device = None
    if args.device and args.device != "here":
        device = devices.find(args.device)
    subject = open_subject(args.model, channel_store=args.channel_store)
    kv = KVOptions(**cli.kv_of(args))
    subject = replace(subject, footprint=subject.footprint.keeping(kv))
    if args.device == "here":
        device = machine.here(subject.folder, again=args.measure_again)
    memory = None if args.memory_gb is None else round(args.memory_gb * 1e9)
    selecting = args.instruction_tokens or args.prompt_tokens
    job = Job(args.prompt_tokens, args.max_tokens, selecting)
    largest, refusal = None, None
    if memory is not None:
        try:
            largest = subject.footprint.largest_keep(memory, args.context_length)
        except ValueError as error:
            refusal = str(error)
    keeps = args.keep or ([0.5, SAFE_KEEP] if largest is None else [])
    keeps = [*keeps, *([] if largest is None else [largest]), 1.0]
    rows = plan_rows(
        subject,
        keeps,
        job,
        context_tokens=args.context_length,
        memory_bytes=memory,
        device=device,
    )
    print(report(subject, rows, args.context_length, job, device))
    verdict, fits = _verdict(args, subject.footprint, largest, refusal)
    if verdict:
        print(f"\n{verdict}")
    if args.json:
        content = as_json(subject, rows, args.context_length, job, device)
        print(json.dumps(content | {"largest_keep": largest, "fits": fits}))
    if not fits:
        sys.exit(DOES_NOT_FIT)


def _training(args: Any) -> None:
    """Say what a training run takes."""
    from .training.estimate import estimate
    from .training.recipe import complete

    given = {} if args.model is None else {"model": args.model}
    config = complete(args.train, given)
    found = estimate(config)
    cost, gb = found.cost, 1e9
    print(
        f"{found.examples} examples; {found.trained:,} of {found.parameters:,} parameters "
        f"are trained, in {config.steps} steps.\n"
        f"Memory: weights {found.weight_bytes / gb:.3g} GB, gradients and optimiser "
        f"{found.training_bytes / gb:.3g} GB, activations of the longest batch about "
        f"{found.activation_bytes / gb:.3g} GB: {found.memory_bytes / gb:.3g} GB in all.\n"
        f"Disk: a checkpoint of {found.checkpoint_bytes / gb:.3g} GB, the result besides.\n"
        f"Work: {cost.total:.3g} multiplications (model {cost.model / cost.total:.0%}, "
        f"predictor {cost.predictor / cost.total:.0%}, warm start "
        f"{cost.warm_start / cost.total:.0%}, teacher {cost.teacher / cost.total:.0%})."
    )
    about = {"memory_bytes": found.memory_bytes, "multiplications": cost.total}
    if args.device is not None:
        about["seconds"] = seconds = _seconds(args, cost.total)
        print(
            f"Time on {args.device}: about {seconds:.3g} s, at the pace of its prompts; "
            "training was not measured there. The log of a run says its own pace."
        )
    if args.json:
        print(json.dumps(about))
    if args.memory_gb is not None and found.memory_bytes > args.memory_gb * gb:
        print(f"That does not fit into {args.memory_gb:g} GB.")
        sys.exit(DOES_NOT_FIT)


def _seconds(args: Any, multiplications: float) -> float:
    if args.device == "here":
        raise ValueError(
            "--device here measures how a model answers; for a run's pace here, start it "
            "and read its log, or name a device."
        )
    device = devices.find(args.device)
    return 2 * multiplications / (device.compute.value * device.runtime.prefill)


def _check(args: Any) -> None:
    for name in ("context_length", "prompt_tokens", "max_tokens"):
        if getattr(args, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} {getattr(args, name)} must be at least 1.")
    if args.instruction_tokens is not None and args.instruction_tokens < 1:
        raise ValueError(
            f"--instruction-tokens {args.instruction_tokens} must be at least 1."
        )
    if args.memory_gb is not None and not 0 < args.memory_gb < float("inf"):
        raise ValueError(f"--memory-gb {args.memory_gb} must be above 0.")


if __name__ == "__main__":
    main()
