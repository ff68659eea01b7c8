"""Train a predictor and a model together: the command."""

import argparse
import json
import sys
from functools import partial
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from . import cli
from .training.recipe import add_options, from_options
from .training.run import run
from .training.validation import (
    GATE_FORMS,
)


def main(argv: list[str] | None = None) -> None:
    """Run ``python -m ifp_mlx.train``."""
    cli.main(build_parser(), _command, argv)


def build_parser() -> cli.Parser:
    """Return the command's parser."""
    parser = cli.Parser(
        prog="ifp_mlx.train",
        description="Train a model whose instructions choose its channels, or experts.",
    )
    add_options(parser)
    parser.add_argument("--task", help="recover: use this task's mask")
    cli.add_tasks_folder_option(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON document")
    return parser


def _command(args: argparse.Namespace) -> None:
    first = mx.distributed.init().rank() == 0
    say = partial(tqdm.write, file=sys.stderr) if first else (lambda line: None)
    report = run(from_options(args), say)
    if first:
        print(json.dumps(report) if args.json else _summary(report))


def _summary(report: dict[str, Any]) -> str:
    if "kl_after" in report:
        return "{output}: KL to the dense model {kl_before:.3f}, now {kl_after:.3f} nats per answer token".format(
            **report
        )
    lines = [f"{report['output']}: valid loss {report['valid_loss']:.3f} nats a token"]
    if "loss_soft" in report:
        losses = (report[f"loss_{form}"] for form in GATE_FORMS)
        lines.append(
            "relaxed, soft and binary gates: {:.3f}, {:.3f}, {:.3f}; sliced against "
            "masked logits: {:.1e}".format(*losses, report["sliced_error"])
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
