"""Export compact models as one Core ML package, one function per task."""

import contextlib
import json
import logging
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from .. import cli
from ..files.atomic import new_folder, refuse_existing
from ..files.paths import named_path, path_of
from ..files.progress import SHOWN, ProgressBar
from ..model.checkpoint import IFPModel, open_model
from ..model.decide import decide
from ..model.export import Quantisation
from ..selection.masks import Selection
from ..selection.request import Request
from ..selection.widths import check_multiple
from .coreml.bundle import describe, summary, write_companions

Consumer = Literal["default", "hf"]
PACKAGE = "model.mlpackage"
REFERENCE = "reference.npz"  # MLX's logits, for examples/benchmarks/coreml_on_mac.py
CONTEXT = 2048  # no more by default, since the whole cache is allocated at once
CONTEXT_MULTIPLE = 32  # the Neural Engine fails on states of other sizes
QUERY = 256  # tokens in one call, all of whose logits are returned
BITS, GROUPS = (4, 8), (32, 64, 128)
PROMPT = "What is the capital of France?"  # to verify with if no text selected
PROMPT_TOKENS, STEPS = 32, 8
LIMIT = 0.02  # of the largest logit: a larger error cannot be rounding


@dataclass(frozen=True)
class Options:
    """How a package is made.

    Attributes:
        quantisation: of the weights; default: float16, or the source's own.
        lut: store quantised weights as lookup tables: exact, but larger.
        context_length: positions in the cache; default: the model's, at most 2048.
        consumer: ``default``, or ``hf`` for the mask that swift-transformers sends.
        verify: compare the saved package with MLX before it is declared good.
    """

    quantisation: Quantisation | None = None
    lut: bool = False
    context_length: int | None = None
    consumer: Consumer = "default"
    verify: bool = True


def export(
    model: IFPModel,
    selections: dict[str, Selection],
    output: str | Path,
    options: Options | None = None,
    *,
    progress: ProgressBar = iter,
) -> dict[str, Any]:
    """Export one function per selection; weights that functions share are stored once.

    Verification runs the saved package in an interpreter. That proves that the file is
    right; only a Mac can show what Apple's compiler makes of it.

    Args:
        model: where the weights come from.
        selections: by function name, the default function first.
        output: a folder to make, with ``model.mlpackage`` and what an app needs
            beside it; or ``NAME.mlpackage``, and the rest goes to the folder ``NAME``.
        options: how the package is made.
        progress: wraps the iteration over a model's layers.

    Returns:
        What the command prints as JSON: the manifest, paths, bytes, seconds, memory.

    Raises:
        FileExistsError: if the output is there.
        ImportError: if coremltools is missing or incomplete.
        ValueError: if the model does not fit Core ML, or the package does not compute
            what MLX does.
    """
    options = options or Options()
    folder, package = _targets(Path(output))
    check_coremltools()
    _check_selections(model, selections, options)
    options = replace(options, context_length=_context(model, options.context_length))
    seconds: dict[str, float] = {}

    def compact(name: str) -> nn.Module:
        return _compact(model, selections[name], options.quantisation, progress)

    with new_folder(folder) as scratch:
        made = scratch / PACKAGE
        with _timed(seconds, "convert"):
            separate = _write_package(made, compact, list(selections), options)
        manifest = _manifest(model, selections, options)
        if options.verify:
            with _timed(seconds, "verify"):
                for name, about in manifest["functions"].items():
                    prompt = _prompt(model, selections[name], options)
                    about["verification"] = _verify(
                        made, name, compact(name), prompt, options
                    )
        _label(made, model, manifest)
        write_companions(scratch, model, selections, manifest)
        whole = _size(made)
        if package.parent != folder:
            made.rename(package)
    return {
        "path": str(folder),
        "package": str(package),
        **manifest,
        "bytes": {"package": whole, "separate": separate},
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "peak_memory_bytes": _peak_memory(),
    }


def check_coremltools() -> None:
    """Raise ``ImportError`` unless coremltools can write a package here."""
    # Silences its warnings on Linux, where parts of it do not load.
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    remedy = "with a Python it has a wheel for: pip install 'ifp-mlx[coreml]'"
    try:
        import coremltools
    except ImportError as error:
        raise ImportError(
            f"coremltools, which writes the package, is missing; install it {remedy}"
        ) from error
    try:
        import coremltools.libmilstoragepython
        import coremltools.libmodelpackage
    except ImportError as error:
        raise ImportError(
            f"coremltools {coremltools.__version__} was installed without its compiled "
            f"parts (BlobWriter not loaded); install it {remedy}"
        ) from error


def _targets(output: Path) -> tuple[Path, Path]:
    """Return the folder and the package to make."""
    if output.suffix == ".mlpackage":
        folder, package = output.with_suffix(""), output
    else:
        folder, package = output, output / PACKAGE
    refuse_existing(package)
    refuse_existing(folder)
    return folder, package


def _check_selections(
    model: IFPModel, selections: dict[str, Selection], options: Options
) -> None:
    """Refuse what cannot work before any weight is read."""
    from .coreml.graph import check_family

    check_family(model.source.skeleton)
    for selection in selections.values():
        model.check_fits(selection)
    how = options.quantisation
    is_quantised = "quantization" in model.config
    if options.lut and not (is_quantised or how):
        raise ValueError("--lut is a way to store quantised weights; add -q.")
    if how is None:
        return
    if is_quantised:
        raise ValueError(
            f"{model.path} is quantised already; leave out -q: its values are taken."
        )
    if how.bits not in BITS or how.group_size not in GROUPS:
        raise ValueError(
            f"{how.bits} bits in groups of {how.group_size} are not offered for Core ML; "
            f"use --q-bits {' or '.join(map(str, BITS))} and --q-group-size "
            f"{' or '.join(map(str, GROUPS))}."
        )
    for selection in selections.values():
        if selection.target_size is not None:
            check_multiple(selection.target_size, how.group_size, selection.channels)


def _context(model: IFPModel, wanted: int | None) -> int:
    longest = model.config.get("max_position_embeddings") or CONTEXT
    if wanted is None:
        return min(CONTEXT, longest) // CONTEXT_MULTIPLE * CONTEXT_MULTIPLE
    if wanted > longest:
        raise ValueError(
            f"context_length={wanted} is more than the {longest} positions that "
            f"{model.name} can tell apart; use {longest} or less."
        )
    if wanted < CONTEXT_MULTIPLE or wanted % CONTEXT_MULTIPLE:
        near = max(CONTEXT_MULTIPLE, wanted // CONTEXT_MULTIPLE * CONTEXT_MULTIPLE)
        raise ValueError(
            f"context_length={wanted} is not a multiple of {CONTEXT_MULTIPLE}; use {near}."
        )
    return wanted


def _compact(
    model: IFPModel,
    selection: Selection,
    quantisation: Quantisation | None,
    progress: ProgressBar,
) -> nn.Module:
    """Return the model to export, as MLX would run it."""
    compact = model.compact(selection, progress=progress)
    if quantisation is None:
        return compact
    from .coreml.weights import quantise

    _cast(compact, mx.float32)
    quantise(compact, model.plan, quantisation.bits, quantisation.group_size)
    mx.eval(compact.parameters())
    return compact


def _cast(model: nn.Module, dtype: mx.Dtype) -> None:
    model.apply(lambda p: p.astype(dtype) if mx.issubdtype(p.dtype, mx.floating) else p)


def _write_package(
    path: Path,
    compact: Callable[[str], nn.Module],
    names: list[str],
    options: Options,
) -> int:
    """Write the package; return the bytes of one package per function."""
    from .coreml.graph import build_program
    from .coreml.package import merge, save_program

    interface = _interface(options)
    parts = {}
    for name in names:
        part = path.with_name(f"part-{name}.mlpackage")
        program = build_program(compact(name), interface, lut=options.lut)
        parts[name] = save_program(program, interface.inputs(), part)
    separate = sum(map(_size, parts.values()))
    if names == ["main"]:  # Core ML's name of an ordinary package's function
        parts["main"].rename(path)
    else:
        merge(parts, path)
    return separate


def _size(package: Path) -> int:
    return sum(file.stat().st_size for file in package.rglob("*") if file.is_file())


def _interface(options: Options) -> Any:
    from .coreml.graph import Interface

    assert options.context_length is not None
    # swift-transformers sends a whole prompt at once.
    query = options.context_length if options.consumer == "hf" else QUERY
    return Interface(
        options.context_length, min(query, options.context_length), options.consumer
    )


def _prompt(model: IFPModel, selection: Selection, options: Options) -> list[int]:
    text = selection.origin.instruction or PROMPT
    room = min(PROMPT_TOKENS, options.context_length or CONTEXT) - STEPS
    return model.instruction_tokens(text)[:room]


def _verify(
    package: Path, function: str, model: nn.Module, prompt: list[int], options: Options
) -> dict[str, Any]:
    """Run the saved package beside MLX in float32 on the same weights."""
    from .coreml_verify import verify

    _cast(model, mx.float32)
    report = verify(
        package,
        model,
        prompt,
        function=function,
        steps=STEPS,
        consumer=options.consumer,
        reference_file=package.with_name(REFERENCE),
    )
    if not report.max_logit_error <= LIMIT:
        raise ValueError(
            f"The function {function} of the package differs from MLX by "
            f"{report.max_logit_error:.3g} of the largest logit, more than {LIMIT}; "
            "nothing was written. With --no-verify it would be, to look into."
        )
    return {
        "prompt_tokens": len(prompt),
        "decode_steps": STEPS,
        "max_logit_error": report.max_logit_error,
        "tokens_equal": report.tokens_equal,
    }


def _manifest(
    model: IFPModel, selections: dict[str, Selection], options: Options
) -> dict[str, Any]:
    how = options.quantisation
    source = model.config.get("quantization")
    return {
        **describe(model, selections),
        "consumer": options.consumer,
        "context_length": options.context_length,
        "query_length": _interface(options).query_length,
        "quantisation": asdict(how) if how else source,
        "lut": options.lut,
    }


def _label(package: Path, model: IFPModel, manifest: dict[str, Any]) -> None:
    from .coreml.package import label

    tasks = ", ".join(manifest["functions"])
    labels = {"ifp_mlx.manifest": json.dumps(manifest)}
    if "/" in model.name:
        # swift-transformers fetches the tokenizer of this Hugging Face id. A folder's
        # name is not an id, and might be somebody else's.
        labels["co.huggingface.exporters.name"] = model.name
    label(package, f"{model.name}, compact, for {tasks} (ifp_mlx)", labels)


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def _peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB here


def build_parser() -> cli.Parser:
    """Return the command's parser; names are mlx_lm's wherever it has one."""
    parser = cli.Parser(prog="to_coreml.py", description=__doc__)
    cli.add_model_option(parser)
    cli.add_selection_options(parser)
    cli.add_compensate_option(parser, cli.LASTING)
    add = parser.add_argument
    add("--functions", help="NAME=MASK_FILE,...: one function per mask, first default")
    add(
        "--output",
        type=named_path,
        required=True,
        help="NAME.mlpackage, or a folder to make",
    )
    cli.add_quantisation_options(parser)
    add("--lut", action="store_true", help="lookup tables: exact, 1.8 times larger")
    add("--context-length", type=int, help="positions; default: 2048 at most")
    add(
        "--consumer",
        choices=("default", "hf"),
        default="default",
        help="hf: the mask that swift-transformers sends; default: %(default)s",
    )
    add(
        "--format",
        choices=("coreml", "coreai"),
        default="coreml",
        help="coreai: experimental, for iOS and macOS 27; default: %(default)s",
    )
    add("--no-verify", action="store_true", help="do not compare the result with MLX")
    add("--json", action="store_true", help="print one line of JSON instead of a path")
    return parser


def parse_functions(text: str) -> dict[str, Path]:
    """Split ``name=mask.safetensors,...``.

    Raises:
        ValueError: if it is anything else, or names a function twice.
    """
    functions: dict[str, Path] = {}
    for part in text.split(","):
        name, _, file = part.strip().partition("=")
        if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII) or not file:
            raise ValueError(
                f"--functions has {part!r}, which is not NAME=MASK_FILE; a name is "
                "letters, digits and underscores."
            )
        if name in functions:
            raise ValueError(f"--functions names {name} twice; give each its own name.")
        functions[name] = path_of(file)
    return functions


def _mask_files(args: Any) -> dict[str, Path]:
    sizes = (args.keep, args.target_size, args.allocation, args.granularity)
    if any(size is not None for size in sizes) or args.selector != "auto":
        raise ValueError(
            f"--functions {args.functions} says which channels are kept; leave out "
            "--keep, --target-size, --selector, --allocation and --granularity."
        )
    return parse_functions(args.functions)


def _selections(args: Any, model: IFPModel) -> dict[str, Selection]:
    """Return the selection of every function, of ``main`` where there is just one."""
    requests = {"main": cli.request_of(args)}
    if args.functions is not None:
        files = _mask_files(args)
        asked = {"compensate": args.compensate}
        requests = {
            name: Request(mask_file=str(file), **asked) for name, file in files.items()
        }
    return select(model, requests, progress=SHOWN)


def select(
    model: IFPModel, requests: dict[str, Request], *, progress: ProgressBar = iter
) -> dict[str, Selection]:
    """Return a selection for each function's request, decided as for a model that is
    written for good.
    """
    found = {}
    for name, request in requests.items():
        decision = decide(request, model, lasting=True, progress=progress)
        found[name] = model.selected(decision, progress=progress)
    return found


def _command(args: Any) -> None:
    given = [args.instruction, args.mask_file, args.functions]
    if not any(given) and args.keep == 1:
        args.instruction = [
            0
        ]  # any token will do: with all channels there is no choice
    elif sum(value is not None for value in given) != 1:
        raise ValueError(
            "Give one of --instruction, --mask-file and --functions, or --keep 1: it "
            "says what is kept."
        )
    if args.format == "coreai":
        from .to_coreai import command

        return command(args)
    check_coremltools()
    _targets(args.output)
    if args.functions is not None:
        _mask_files(args)  # reports mistakes before anything is loaded
    cli.request_of(args)
    from .coreml.graph import check_family

    model = open_model(args.model)
    check_family(model.source.skeleton)  # before the whole model is read to select
    length, verify = args.context_length, not args.no_verify
    options = Options(
        cli.quantisation_of(args), args.lut, length, args.consumer, verify
    )
    selections = _selections(args, model)
    report = export(model, selections, args.output, options, progress=SHOWN)
    print(summary(report), file=sys.stderr)
    print(json.dumps(report) if args.json else report["package"])


def main(argv: list[str] | None = None) -> None:
    """Run ``ifp_mlx to-coreml``."""
    cli.main(build_parser(), _command, argv)
