"""metadata.json: what an app must know about a bundle, written and read.

metadata.schema.json, which goes into every bundle, says what each key means.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

FORMAT = "ifp_mlx.bundle.1"
METADATA = "metadata.json"
SCHEMA = "metadata.schema.json"
CORE = "core"
RESERVED = {CORE, "metadata"}
Kind = Literal["mlx", "coreml"]
Download = Literal["essential", "prefetch", "onDemand"]
# What loads the files: mlx-swift-lm, and Core ML's states.
MINIMUM_OS: dict[Kind, dict[str, str]] = {
    "mlx": {"iOS": "17.0", "macOS": "14.0"},
    "coreml": {"iOS": "18.0", "macOS": "15.0"},
}
# The names of bundles and tasks become folders and IDs of asset packs; Apple's
# documentation promises only these characters for IDs.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """A file of a part.

    Attributes:
        bytes: its size.
        sha256: of its content, 64 hex digits.
    """

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Part:
    """Files that are downloaded together: the core, or what one task adds to it.

    Attributes:
        name: ``core``, or the task's.
        download: when the system fetches it.
        asset_pack: the ID of its asset pack.
        files: by the path inside the bundle.
    """

    name: str
    download: Download
    asset_pack: str
    files: dict[str, Entry]

    @property
    def bytes(self) -> int:
        """The size of all its files."""
        return sum(file.bytes for file in self.files.values())

    @property
    def folder(self) -> str:
        """Where in the bundle its files are."""
        return folder_of(self.name)

    def as_json(self) -> dict[str, Any]:
        """Return its entry in metadata.json."""
        files = {path: vars(file) for path, file in sorted(self.files.items())}
        about = {"download": self.download, "asset_pack": self.asset_pack}
        return {**about, "folder": self.folder, "bytes": self.bytes, "files": files}


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read.

    Attributes:
        folder: where it is.
        about: its metadata.json.
        parts: by name, the core first.
    """

    folder: Path
    about: dict[str, Any]
    parts: dict[str, Part]

    def parts_of(self, task: str) -> list[Part]:
        """Return what a task needs, the core first.

        Raises:
            ValueError: if there is no such task.
        """
        tasks = self.about["tasks"]
        if task not in tasks:
            raise ValueError(
                f"{self.folder} has no task {task!r}; its tasks are {', '.join(tasks)}."
            )
        return [self.parts[name] for name in tasks[task]["parts"]]


def folder_of(part: str) -> str:
    """Return where in a bundle the files of a part are."""
    return CORE if part == CORE else f"tasks/{part}"


def check_names(bundle: str, tasks: Iterable[str]) -> None:
    """Raise ``ValueError`` if the name of a bundle or of a task is not allowed.

    Names of tasks must differ in more than case, since most disks of Apple's systems do
    not distinguish upper and lower case.
    """
    known: dict[str, str] = {}
    for what, name in [("bundle", bundle), *(("task", task) for task in tasks)]:
        if not NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} cannot be the name of a {what}: use letters, digits, '-' "
                "and '_'; it becomes the ID of an asset pack."
            )
        if what == "bundle":
            continue
        if name.lower() in RESERVED:
            raise ValueError(
                f"A task cannot be called {name!r}, which every bundle has of its own; "
                "give it another name."
            )
        if (other := known.setdefault(name.lower(), name)) != name:
            raise ValueError(
                f"The tasks {other!r} and {name!r} differ in case alone, and would be one "
                "folder on most disks of Apple's systems; give one another name."
            )


def write_metadata(folder: Path, about: dict[str, Any], parts: Iterable[Part]) -> None:
    """Write metadata.json, and the schema that explains it, into ``folder``."""
    said = {"$schema": SCHEMA, "format": FORMAT, **about}
    said["parts"] = {part.name: part.as_json() for part in parts}
    text = json.dumps(said, indent=2, ensure_ascii=False)
    (folder / METADATA).write_text(text + "\n", encoding="utf-8")
    schema = Path(__file__).with_name(SCHEMA).read_bytes()
    (folder / SCHEMA).write_bytes(schema)


def read_bundle(folder: Path) -> Bundle:
    """Read a bundle's metadata.json; its files are not looked at.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not one of this format, or names files outside the bundle.
    """
    path = folder / METADATA
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {METADATA}; give a folder made by ifp_mlx bundle."
        )
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise ValueError(f"its format is {about['format']!r}")
        parts = {name: _part(name, said) for name, said in about["parts"].items()}
        if problem := next(_contradictions(about, parts), None):
            raise ValueError(problem)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not of the format {FORMAT} ({error}); make the bundle again."
        ) from error
    return Bundle(folder, about, parts)


def _part(name: str, said: dict[str, Any]) -> Part:
    files = {p: Entry(f["bytes"], f["sha256"]) for p, f in said["files"].items()}
    return Part(name, said["download"], said["asset_pack"], files)


def _contradictions(about: dict[str, Any], parts: dict[str, Part]) -> Iterator[str]:
    """Yield faults of a bundle's metadata, each in words."""
    for part in parts.values():
        if not NAME.fullmatch(part.name):
            yield f"{part.name!r} is no name of a part"
        for path, file in part.files.items():
            if not _is_inside(path, part.folder):
                yield f"{path!r} is not inside the part {part.name!r}"
            if type(file.bytes) is not int or not HASH.fullmatch(file.sha256):
                yield f"{path!r} has no size and SHA-256"
        if about["parts"][part.name]["bytes"] != part.bytes:
            yield f"the part {part.name!r} has not the bytes of its files"
    for name, task in about["tasks"].items():
        if lost := [part for part in task["parts"] if part not in parts]:
            yield f"the task {name!r} needs the part {lost[0]!r}, which is not there"
            continue
        if CORE not in task["parts"]:
            yield f"the task {name!r} is without the part {CORE!r}"
        files = [
            path.removeprefix(f"{part.folder}/")
            for part in (parts[name] for name in task["parts"])
            for path in part.files
        ]
        if len({*files}) < len(files):
            yield f"two parts of the task {name!r} have a file of one name"


def _is_inside(path: str, folder: str) -> bool:
    """Whether a path, in its normal form, is that of a file in a folder of the
    bundle.
    """
    steps = path.split("/")
    odd = {"", ".", ".."} & {*steps} or "\\" in path or "\0" in path
    return path.startswith(f"{folder}/") and not odd
