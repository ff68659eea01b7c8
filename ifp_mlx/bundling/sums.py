"""Whether a bundle's files are those that were written: sizes and SHA-256."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from ..files.progress import ProgressBar
from ..files.texts import decoded
from .metadata import METADATA, Bundle, Entry, Part, read_bundle

SUMS = "SHA256SUMS"
IGNORED = {".DS_Store"}  # the Finder's
SAID = 3  # damaged files that one sentence names


def entry_of(file: Path) -> Entry:
    """Return the size and the SHA-256 of a file."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
    return Entry(file.stat().st_size, digest.hexdigest())


def write_sums(folder: Path, known: dict[str, Entry]) -> None:
    """Write the SHA-256 of every file in a folder, as ``sha256sum -c`` reads it.

    Args:
        folder: of the bundle.
        known: what has been hashed before, by the path inside it.
    """
    lines = []
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        path = file.relative_to(folder).as_posix()
        entry = known.get(path) or entry_of(file)
        lines.append(f"{entry.sha256}  {path}\n")
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def verify(folder: Path, *, progress: ProgressBar = iter) -> Bundle:
    """Read a bundle and compare all its files with metadata.json and SHA256SUMS.

    Args:
        folder: of the bundle.
        progress: wraps the iteration over its files.

    Returns:
        The bundle, if it is whole.

    Raises:
        FileNotFoundError: if it has no metadata.json or no SHA256SUMS.
        ValueError: if a file is missing or changed, or a part has a file too many.
    """
    bundle, sums = read_bundle(folder), _sums(folder)
    listed = _listed(bundle.parts.values())
    found = [f"{path} is not in {SUMS}" for path in listed if path not in sums]
    found += [
        f"{path} is not listed" for path in _present(bundle) if path not in listed
    ]
    for path, digest in progress(sums.items()):
        said = listed.get(path)
        if problem := _problem(folder / path, said.bytes if said else None, digest):
            found.append(f"{path} {problem}")
        elif said and said.sha256 != digest:
            found.append(f"{path} has another SHA-256 in {SUMS} than in {METADATA}")
    _refuse(bundle, found)
    return bundle


def check_files(
    bundle: Bundle, parts: Iterable[Part], *, progress: ProgressBar = iter
) -> None:
    """Raise ``ValueError`` unless all files of some parts are as metadata.json says."""
    problems = {
        path: _problem(bundle.folder / path, said.bytes, said.sha256)
        for path, said in progress(_listed(parts).items())
    }
    _refuse(bundle, [f"{path} {said}" for path, said in problems.items() if said])


def _refuse(bundle: Bundle, problems: list[str]) -> None:
    if problems:
        more = f" and {len(problems) - SAID} more" if len(problems) > SAID else ""
        raise ValueError(
            f"{bundle.folder} is not as it was made: {', '.join(problems[:SAID])}{more}; "
            "fetch or make it again."
        )


def _listed(parts: Iterable[Part]) -> dict[str, Entry]:
    return {path: entry for part in parts for path, entry in part.files.items()}


def _problem(file: Path, size: int | None, digest: str) -> str | None:
    """Return what is wrong with a file, if anything is."""
    if not file.is_file():
        return "is missing"
    if size not in (None, file.stat().st_size):
        return f"has {file.stat().st_size} bytes instead of {size}"
    return None if entry_of(file).sha256 == digest else "has another SHA-256"


def _sums(folder: Path) -> dict[str, str]:
    path = folder / SUMS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {SUMS}; fetch or make it again.")
    sums = {}
    for line in decoded(path.read_bytes(), str(path)).splitlines():
        digest, _, name = line.partition("  ")
        if not name or ".." in Path(name).parts or Path(name).is_absolute():
            raise ValueError(
                f"{path} has the line {line!r}, which names no file of the bundle; fetch "
                "or make it again."
            )
        sums[name] = digest
    return sums


def _present(bundle: Bundle) -> list[str]:
    """Return the files that lie in the folders of a bundle's parts."""
    return [
        file.relative_to(bundle.folder).as_posix()
        for part in bundle.parts.values()
        for file in sorted((bundle.folder / part.folder).rglob("*"))
        if file.is_file() and file.name not in IGNORED
    ]
