"""Measure what pruning each layer costs: the command."""

import json
from typing import Any

import mlx.core as mx
import numpy as np

from . import cli
from .evaluation.sensitivity import (
    DATA_TEXTS,
    TEXTS_HASH,
    _about,
    data_texts,
    hash_of,
    measure_sensitivity,
)
from .files.paths import named_path
from .files.progress import SHOWN
from .model.checkpoint import SENSITIVITY_FILE, open_model
from .selection.widths import MEASURED_SHARES


def table(costs: mx.array) -> str:
    """Return the costs as a Markdown table."""
    shares = MEASURED_SHARES[:-1]
    rows = ["| layer | " + " | ".join(f"keep {share:g}" for share in shares) + " |"]
    rows.append("|---" * (len(shares) + 1) + "|")
    for layer, row in enumerate(np.array(costs).tolist()):
        cells = " | ".join(f"{value:.4f}" for value in row[:-1])
        rows.append(f"| {layer} | {cells} |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> None:
    """Run ``python -m ifp_mlx.sensitivity``."""
    cli.main(build_parser(), _command, argv)


def build_parser() -> cli.Parser:
    """Return the command's parser."""
    parser = cli.Parser(
        prog="ifp_mlx.sensitivity",
        description="Measure once what pruning each layer costs, for --allocation "
        f"sensitivity; kept as {SENSITIVITY_FILE} in the model's folder.",
    )
    cli.add_model_option(parser)
    parser.add_argument(
        "--data",
        type=named_path,
        nargs="+",
        metavar="X",
        help="JSONL files as for evaluate, one per family of tasks: measure on their "
        f"examples, {DATA_TEXTS} in all; default: the package's calibration text",
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    return parser


def _command(args: Any) -> None:
    model = open_model(args.model)
    texts = data_texts(model, args.data) if args.data else None
    costs = model.sensitivity
    file = model.path / SENSITIVITY_FILE
    other = texts is not None and (
        costs is None or _about(file).get(TEXTS_HASH) != hash_of(texts)
    )
    if costs is None or other:
        costs = measure_sensitivity(model, texts, progress=SHOWN)
    print("KL to the dense model, nats per token, with one layer pruned:\n")
    print(table(costs))
    if args.json:
        print(json.dumps({"shares": MEASURED_SHARES, "kl": costs.tolist()}))


if __name__ == "__main__":
    main()
