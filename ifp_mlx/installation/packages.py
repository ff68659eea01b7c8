"""Python, the package itself, and the packages that it needs or may use."""

import platform
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata

from .. import __version__
from .findings import Finding

DISTRIBUTION = "ifp-mlx"
OLDEST = (3, 11)
DEVELOPMENT = {"test", "dev"}  # extras of those who work on the package
# Stands in for the requirements if the package was not installed.
NEEDED = ("mlx", "mlx-lm", "numpy", "huggingface-hub", "safetensors", "tokenizers")


def packages() -> Iterator[Finding]:
    """Yield findings on Python and on all packages."""
    yield _python()
    try:
        requirements = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        said = f"{__version__}, not installed by pip"
        yield Finding("ifp_mlx", "note", said, "pip install -e .")
        requirements = list(NEEDED)
    else:
        yield Finding("ifp_mlx", "ok", __version__)
    needed = [text for text in requirements if "extra ==" not in text]
    for name, missing, said in _looked_at(needed):
        remedy = f"pip install {' '.join(missing)}" if missing else None
        yield Finding(name, "fix" if missing else "ok", said, remedy)
    yield from _extras(requirements)


def _python() -> Finding:
    found = f"{platform.python_version()}, {platform.machine()}, {sys.executable}"
    if sys.version_info < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        remedy = f"install Python {wanted} or newer"
        return Finding("python", "fix", f"{found}; {wanted} is needed", remedy)
    if sys.platform == "darwin" and platform.machine() != "arm64":
        said = f"{found}: MLX needs a Python for arm64, not one that Rosetta translates"
        return Finding("python", "fix", said, "install a Python for arm64")
    return Finding("python", "ok", found)


def _extras(requirements: list[str]) -> Iterator[Finding]:
    extras: dict[str, list[str]] = {}
    for text in requirements:
        if match := re.search(r"extra == ['\"]([\w-]+)['\"]", text):
            extras.setdefault(match[1], []).append(text)
    for extra in sorted(extras.keys() - DEVELOPMENT):
        found = list(_looked_at(extras[extra], extra))
        said = ", ".join(f"{name} {about}" for name, _, about in found)
        missing = [one for _, names, _ in found for one in names]
        remedy = f"pip install '{DISTRIBUTION}[{extra}]'" if missing else None
        yield Finding(f"[{extra}]", "off" if missing else "ok", said, remedy)


def _looked_at(
    requirements: Iterable[str], extra: str = ""
) -> Iterator[tuple[str, list[str], str]]:
    """Yield for every requirement that applies here: its name, the argument for pip if
    it is not met, and what was found.
    """
    try:
        from packaging.requirements import Requirement
    except ImportError:
        for text in requirements:
            name = re.split(r"[\s\[<>=!~;]", text)[0]
            yield name, *_met(name, name, "", lambda version: True)
        return
    for text in requirements:
        wanted = Requirement(text)
        if wanted.marker is None or wanted.marker.evaluate({"extra": extra}):
            brackets = f"[{','.join(sorted(wanted.extras))}]" if wanted.extras else ""
            limits = str(wanted.specifier)
            quoted = f"'{wanted.name}{brackets}{limits}'" if limits else wanted.name
            allowed = wanted.specifier.contains
            yield wanted.name, *_met(wanted.name, quoted, limits, allowed)


def _met(
    name: str, asked: str, limits: str, allowed: Callable[[str], bool]
) -> tuple[list[str], str]:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return [asked], "is missing"
    if not allowed(version):
        return [asked], f"{version}, and {limits} is needed"
    return [], version
