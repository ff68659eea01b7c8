"""Run a saved Core ML package in numpy, and compare it with the MLX model.

python convert/coreml_verify.py --package X.mlpackage --model M --mask-file F

The program and the weights are read back from disk, without the exporter's code. This
proves that the file is right, not that Apple's compiler is: a device may sum in float16
inside an operation, or fuse operations between which values are rounded here.
"""

import argparse
import json
import math
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import cli
from ..model.checkpoint import load
from ..selection.masks import Selection
from ..selection.prompts import as_messages, tokenize
from .mil.mlpackage import Package, Session

Array = np.ndarray
CONSUMERS = ("default", "hf")
LIMIT = 0.02  # of the largest logit; float16 alone costs up to 0.01
PROMPT = "What is the capital of France?"


@dataclass(frozen=True)
class Report:
    """How far a package is from the MLX model.

    Attributes:
        max_logit_error: largest difference over all positions, as a share of the
            largest logit; infinite where the package gave something not finite.
        tokens_equal: whether the greedy token is the same after the prompt and after
            every decode step.
        positions: how many positions were compared: prompt and decode steps.
        same_argmax: at how many of them the largest logit is the same token.
        seconds: time of the package, prefill and decode.
        peak_memory_bytes: peak resident memory of this process while the package ran.
    """

    max_logit_error: float
    tokens_equal: bool
    positions: int
    same_argmax: int
    seconds: float
    peak_memory_bytes: int

    def __str__(self) -> str:
        agree = "the same" if self.tokens_equal else "NOT the same"
        return (
            f"largest logit error {self.max_logit_error:.2%} of the largest logit; "
            f"greedy tokens {agree}, largest logit at {self.same_argmax} of "
            f"{self.positions} positions; {self.seconds:.1f} s, "
            f"{self.peak_memory_bytes / 1e6:.0f} MB"
        )

    def as_json(self) -> dict[str, Any]:
        """Return the fields; an infinite error, which JSON cannot hold, is ``None``."""
        finite = math.isfinite(self.max_logit_error)
        return asdict(self) | ({} if finite else {"max_logit_error": None})


def verify(
    path: str | Path,
    model: nn.Module,
    tokens: list[int],
    *,
    function: str = "main",
    steps: int = 8,
    consumer: str = "default",
    reference_file: Path | None = None,
) -> Report:
    """Compare a saved package with an MLX model: prefill, then greedy decoding.

    Both are fed the MLX model's tokens, so that one difference is not counted twice.

    Args:
        path: the package.
        model: mlx-lm's, with the weights that the package should have.
        tokens: of the prompt, at least one.
        function: which function of the package.
        steps: tokens to decode after the prompt, one at a time.
        consumer: ``default``, or ``hf``: the attention mask is one longer and has one
            row, as swift-transformers sends it. Either way it is all zero, since the
            package adds causality itself.
        reference_file: an ``.npz`` to which the prompt and MLX's greedy tokens and
            logits are added, for ``examples/benchmarks/coreml_on_mac.py``.

    Raises:
        ValueError: if the package is damaged, or refuses these inputs.
    """
    if not tokens:
        raise ValueError("There are no tokens to verify with; give at least one.")
    session = Package(path).session(function)
    continuation, expected = reference(model, tokens, steps)
    if reference_file is not None:
        stored = dict(np.load(reference_file)) if reference_file.exists() else {}
        stored[f"{function}.tokens"] = np.array(tokens, np.int32)
        stored[f"{function}.continuation"] = np.array(continuation, np.int32)
        stored[f"{function}.logits"] = expected[-steps - 1 :].astype(np.float16)
        np.savez_compressed(reference_file, **stored)
    reset_peak_memory()
    start = time.perf_counter()
    fed = [*tokens, *continuation[:-1]]
    rows = list(_run(session, fed, len(tokens), consumer))
    seconds = time.perf_counter() - start
    found = np.concatenate(rows).astype(np.float32)  # [T + steps, V]
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    same = found.argmax(-1) == expected.argmax(-1)
    return Report(
        max_logit_error=error if math.isfinite(error) else math.inf,
        tokens_equal=bool(same[len(tokens) - 1 :].all()),
        positions=len(fed),
        same_argmax=int(same.sum()),
        seconds=seconds,
        peak_memory_bytes=peak_memory(),
    )


def reference(
    model: nn.Module, tokens: list[int], steps: int
) -> tuple[list[int], Array]:
    """Return the MLX model's greedy tokens and logits.

    Returns:
        ``steps + 1`` tokens, and logits, float32 ``[T + steps, V]``; the tokens were
        chosen from its last ``steps + 1`` rows.
    """
    from mlx_lm.models.cache import make_prompt_cache

    cache, rows, continuation = make_prompt_cache(model), [], list[int]()
    feed = tokens
    for _ in range(steps + 1):
        logits = model(mx.array([feed]), cache=cache)[0].astype(mx.float32)
        rows.append(np.array(logits))
        feed = [int(rows[-1][-1].argmax())]
        continuation += feed
    del cache
    mx.clear_cache()
    return continuation, np.concatenate(rows)


def _run(
    session: Session, tokens: list[int], prompt: int, consumer: str
) -> Iterator[Array]:
    """Yield logits ``[q, V]``: the prompt in pieces that fit, then one by one."""
    piece, past = session.largest("inputIds", 1), 0
    while past < len(tokens):
        q = min(piece, prompt - past) if past < prompt else 1
        ids: Array = np.array([tokens[past : past + q]], np.int32)
        shape = (1, 1, 1, past + q + 1) if consumer == "hf" else (1, 1, q, past + q)
        mask: Array = np.zeros(shape, np.float16)
        logits = session.run({"inputIds": ids, "causalMask": mask})["logits"]
        if logits.shape[:2] != (1, q):
            raise ValueError(
                f"The package gives logits {list(logits.shape)} for {q} tokens."
            )
        yield logits[0]
        past += q


def reset_peak_memory() -> None:
    """Start :func:`peak_memory` anew, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak_memory() -> int:
    """Return this process's peak resident memory in bytes since it was reset."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = cli.Parser(prog="coreml_verify.py", description=__doc__)
    add = parser.add_argument
    add("--package", required=True, help="the .mlpackage to run")
    cli.add_model_option(parser)
    add("--mask-file", required=True, help="the mask it was exported with")
    add("--function", default="main", help="default: %(default)s")
    add("--prompt", default=PROMPT, help="default: %(default)s")
    add("--steps", type=int, default=8, help="tokens to decode; default: %(default)s")
    add("--consumer", choices=CONSUMERS, default="default", help="whose mask to send")
    add("--quantize", "-q", action="store_true", help="it was exported with -q")
    add("--q-bits", type=int, default=4, help="default: %(default)s")
    add("--q-group-size", type=int, default=64, help="default: %(default)s")
    add("--json", action="store_true", help="print one line of JSON")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Verify, print the report, and exit with status 1 where they differ."""
    cli.main(build_parser(), _command, argv)


def _command(args: argparse.Namespace) -> None:
    Package(args.package)  # refuse a damaged one before the model is read
    model, tokenizer = load(args.model)
    compact = model.compact(Selection.load(args.mask_file))
    if args.quantize:
        from .coreml.weights import quantise

        compact.set_dtype(mx.float32)
        quantise(compact, model.plan, args.q_bits, args.q_group_size)
    tokens = tokenize(tokenizer, as_messages(args.prompt))
    report = verify(
        args.package,
        compact,
        tokens,
        function=args.function,
        steps=args.steps,
        consumer=args.consumer,
    )
    print(json.dumps(report.as_json()) if args.json else report)
    if not (report.tokens_equal and report.max_logit_error <= LIMIT):
        sys.exit(1)
