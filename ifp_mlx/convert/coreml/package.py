"""Core ML packages on disk: write a program, put several into one, label it."""

import contextlib
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import coremltools as ct
from coremltools.converters.mil.mil import Program
from coremltools.models.utils import MultiFunctionDescriptor, save_multifunction

SPEC = "Data/com.apple.CoreML/model.mlmodel"


def save_program(program: Program, inputs: list[ct.TensorType], path: Path) -> Path:
    """Write a program as the package ``path``, its types left as they are."""
    with _tidily():
        model = ct.convert(
            program,
            convert_to="mlprogram",
            inputs=inputs,
            # With "float32" no pass changes the types that the program was written in.
            compute_precision=ct.precision.FLOAT32,
            minimum_deployment_target=ct.target.iOS18,
            skip_model_load=True,
        )
        model.save(str(path))
    return path


def merge(packages: dict[str, Path], path: Path) -> Path:
    """Put packages into one, with equal weights stored once; remove the parts.

    Args:
        packages: by the name of the function each becomes; the first is the default.
        path: the package to make.
    """
    parts = MultiFunctionDescriptor()
    for name, package in packages.items():
        parts.add_function(str(package), "main", name)
    parts.default_function_name = next(iter(packages))
    with _tidily():
        save_multifunction(parts, str(path))
    for package in packages.values():
        shutil.rmtree(package)
    return path


def label(package: Path, description: str, labels: dict[str, str]) -> None:
    """Set a package's description and its user-defined metadata."""
    file = package / SPEC
    spec = ct.utils.load_spec(str(file))
    spec.description.metadata.shortDescription = description
    spec.description.metadata.userDefined.update(labels)
    file.write_bytes(spec.SerializeToString())


@contextlib.contextmanager
def _tidily() -> Iterator[None]:
    """Silence coremltools, and clean up after it."""
    with contextlib.ExitStack() as stack:
        if not sys.stderr.isatty():  # no progress bars without a terminal
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        # coremltools leaves removing its temporary folders to the interpreter.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Implicitly cleaning up", ResourceWarning)
        yield
