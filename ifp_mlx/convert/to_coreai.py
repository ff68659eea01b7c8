"""Export a compact model to Core AI, and run the saved program beside MLX. Experimental.

Core AI is Core ML's successor in iOS and macOS 27. Its Python package writes a program
and has a CPU runtime on Linux, which verifies it. This was not run on a Mac:
examples/guides/coreai.md says what is known and what is not.
"""

import asyncio
import json
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import cli
from ..files.atomic import new_folder, refuse_existing
from ..files.progress import SHOWN, ProgressBar
from ..model.checkpoint import IFPModel, open_model
from ..model.decide import decide
from ..model.export import Quantisation
from ..selection.masks import Selection
from ..selection.widths import check_multiple
from ..slicing.sliced import count_units, pad
from .coreai.graph import FAMILIES, STATES, Decoder

CONTEXT = 1024
STEPS = 8
LIMIT = 1e-3  # of the largest logit; both compute in float32
PROMPT = "What is the capital of France?"


def export_coreai(
    model: IFPModel,
    selection: Selection,
    output: str | Path,
    *,
    quantisation: Quantisation | None = None,
    context_length: int | None = None,
    verify: bool = True,
    progress: ProgressBar = iter,
) -> dict[str, Any]:
    """Write a compact model as an ``.aimodel``, its activations in float32.

    Args:
        model: where the weights come from.
        selection: made with this model.
        output: the ``.aimodel`` to make.
        quantisation: 4 or 8 bits, MLX's own values; default: float32.
        context_length: positions in the cache; default: 1024.
        verify: run the saved program beside MLX before it is declared good.
        progress: wraps the iteration over a model's layers.

    Returns:
        What the command prints as JSON.

    Raises:
        FileExistsError: if the output is there.
        ImportError: if Core AI's package is missing.
        ValueError: if the model cannot be expressed, or the program computes something
            else.
    """
    output = Path(output)
    refuse_existing(output)
    _check(model, selection, quantisation)
    compact = _compact(model, selection, quantisation, progress)
    seconds = {}
    with new_folder(output) as scratch:
        asset = scratch / "program.aimodel"  # Core AI insists on this suffix
        start = time.perf_counter()
        Decoder(compact, context_length or CONTEXT).program().save_asset(asset)
        seconds["convert"] = time.perf_counter() - start
        report = None
        if verify:
            start = time.perf_counter()
            report = _verify(asset, compact, model, selection)
            seconds["verify"] = time.perf_counter() - start
        for file in asset.iterdir():
            file.rename(scratch / file.name)
        asset.rmdir()
    size = sum(f.stat().st_size for f in output.rglob("*") if f.is_file())
    return {
        "package": str(output),
        "base_model": model.name,
        "mask_id": selection.mask_id,
        "layers": selection.sizes,
        "verification": report,
        "bytes": size,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
    }


def compare(
    path: Path, model: nn.Module, tokens: list[int], steps: int = STEPS
) -> tuple[float, int]:
    """Run a saved program beside MLX: prefill, then greedy decoding.

    Returns:
        The largest logit error as a share of the largest logit, and how many of the
        ``steps + 1`` greedy tokens are MLX's.
    """
    from .coreml_verify import reference

    continuation, expected = reference(model, tokens, steps)
    found = asyncio.run(_execute(path, [tokens, *([t] for t in continuation[:-1])]))
    error = np.abs(found - expected).max() / np.abs(expected).max()
    same = found[-steps - 1 :].argmax(-1) == np.array(continuation)
    return float(error), int(same.sum())


async def _execute(path: Path, calls: list[list[int]]) -> np.ndarray:
    """Return the logits ``[T, V]`` of calls that share one state."""
    from coreai.authoring import AIModelAsset
    from coreai.runtime import NDArray

    async with AIModelAsset.load(path).executable() as model:
        function = model.load_function("main")
        shape = function.desc.state_descriptor(STATES[0]).shape
        state = {name: NDArray(np.zeros(shape, np.float32)) for name in STATES}
        rows, past = [], 0
        for call in calls:
            ids = np.array([call], np.int32)
            positions = np.arange(past, past + len(call), dtype=np.int32)[None]
            inputs = {"input_ids": NDArray(ids), "position_ids": NDArray(positions)}
            logits = (await function(inputs, state))["logits"].numpy()
            rows.append(np.array(logits[0]))
            past += len(call)
    return np.concatenate(rows)


def _check(
    model: IFPModel, selection: Selection, quantisation: Quantisation | None
) -> None:
    if find_spec("coreai") is None:
        raise ImportError(
            "This needs Core AI's Python package: pip install 'ifp-mlx[coreai]'"
        )
    _check_family(model)
    if quantisation is None:
        return
    if quantisation.bits not in (4, 8):
        raise ValueError(f"--q-bits {quantisation.bits} is not offered; use 4 or 8.")
    if selection.target_size is not None:
        group = quantisation.group_size
        check_multiple(selection.target_size, group, selection.channels)


def _check_family(model: IFPModel) -> None:
    family = type(model.source.skeleton).__module__.rpartition(".")[2]
    if family not in FAMILIES or "quantization" in model.config:
        raise ValueError(
            f"{model.name} ({family}) is not written for Core AI yet; use an "
            f"unquantised model of {', '.join(FAMILIES)}, or --format coreml."
        )


def _compact(
    model: IFPModel,
    selection: Selection,
    quantisation: Quantisation | None,
    progress: ProgressBar,
) -> nn.Module:
    compact = model.compact(selection, progress=progress)
    compact.set_dtype(mx.float32)  # Core AI's CPU runtime then gives MLX's logits
    if quantisation is not None:
        group = quantisation.group_size
        plan = model.plan
        for module, layer in zip(plan.modules(compact), plan.layers, strict=True):
            pad(module, layer, -(-count_units(module, layer) // group) * group)
        nn.quantize(compact, group, quantisation.bits)
    mx.eval(compact.parameters())
    return compact


def _verify(
    asset: Path, compact: nn.Module, model: IFPModel, selection: Selection
) -> dict[str, Any]:
    text = selection.origin.instruction or PROMPT
    tokens = model.instruction_tokens(text)[:32]
    error, same = compare(asset, compact, tokens)
    if not error <= LIMIT:
        raise ValueError(
            f"The saved program differs from MLX by {error:.3g} of the largest logit, "
            f"more than {LIMIT}; nothing was written."
        )
    return {
        "prompt_tokens": len(tokens),
        "decode_steps": STEPS,
        "max_logit_error": error,
        "tokens_equal": same == STEPS + 1,
    }


def command(args: Any) -> None:
    """Run ``to_coreml.py --format coreai`` with its parsed options."""
    for flag, given in (
        ("--functions", args.functions is not None),
        ("--lut", args.lut),
        ("--consumer", args.consumer != "default"),
    ):
        if given:
            raise ValueError(f"{flag} is for --format coreml; leave it out.")
    refuse_existing(args.output)
    request = cli.request_of(args)
    model = open_model(args.model)
    _check_family(model)  # before the whole model is read to select
    decision = decide(request, model, lasting=True, progress=SHOWN)
    report = export_coreai(
        model,
        model.selected(decision, progress=SHOWN),
        args.output,
        quantisation=cli.quantisation_of(args),
        context_length=args.context_length,
        verify=not args.no_verify,
        progress=SHOWN,
    )
    print(json.dumps(report) if args.json else report["package"])
