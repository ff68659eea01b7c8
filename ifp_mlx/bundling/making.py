"""Make a bundle from compact folders, or from Core ML packages, of one model."""

import shutil
from collections.abc import Collection
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..files.atomic import new_folder
from ..files.companions import LICENCES, licence_of
from ..files.config import read_config
from ..files.objects import read_object
from ..files.progress import ProgressBar
from ..selection.masks import Selection
from ..slicing.stock import context_of
from .card import card_of
from .layout import MASK, PACKAGE, carried, lay_out_files, lay_out_weights
from .metadata import (
    CORE,
    METADATA,
    MINIMUM_OS,
    Download,
    Kind,
    Part,
    check_names,
    folder_of,
    write_metadata,
)
from .packs import pack_id, write_manifests
from .sums import entry_of, write_sums

SWIFT = "swift"
SOURCES = ("Package.swift", "Sources", "Tests")


@dataclass(frozen=True)
class Wishes:
    """Facts of a bundle that only its developer knows.

    Attributes:
        version: of the bundle, in the developer's own counting.
        license: of the base model; default: what the folders say.
        source: where the base model is from, such as an address.
        prefetch: tasks that are fetched with the app, not on demand.
        replace: whether an existing bundle is replaced.
    """

    version: str = "1.0"
    license: str | None = None
    source: str | None = None
    prefetch: Collection[str] = ()
    replace: bool = False


@dataclass(frozen=True)
class Package:
    """A Core ML package, and the folder of what lies beside it."""

    package: Path
    folder: Path

    @property
    def about(self) -> dict[str, Any]:
        """Its manifest.json, as ifp_mlx to-coreml writes it."""
        return read_object(self.folder / "manifest.json")


def bundle_folders(
    tasks: dict[str, Path], out: Path, wishes: Wishes, *, progress: ProgressBar = iter
) -> Path:
    """Make a bundle of compact folders of one model.

    Args:
        tasks: by the task's name, the folder that ``ifp_mlx compact`` made.
        out: the folder to make; its name is the bundle's.
        wishes: the developer's facts.
        progress: wraps the iteration over tasks.

    Raises:
        FileExistsError: if ``out`` is there and is not to be replaced.
        ValueError: if a name is not allowed, or the folders are of different models.
    """
    check_wishes(out, tasks, wishes)
    configs = {
        name: read_config(folder / "config.json") for name, folder in tasks.items()
    }
    first, folder = next(iter(configs.values())), next(iter(tasks.values()))
    if any(
        c.get("quantization") != first.get("quantization") for c in configs.values()
    ):
        raise ValueError(
            f"{', '.join(map(str, tasks.values()))} are quantised differently, so they "
            "share next to nothing; quantise all in one way, or make a bundle of each."
        )
    masks = {name: _selection(folder / MASK) for name, folder in tasks.items()}
    about = {
        "base_model": _base_model(folder, [mask for mask in masks.values() if mask]),
        "context_length": context_of(first),
        "quantisation": first.get("quantization"),
    }
    said = {name: _task(mask) for name, mask in masks.items()}
    with new_folder(out, replace=wishes.replace) as scratch:
        lay_out_files({name: carried(path) for name, path in tasks.items()}, scratch)
        lay_out_weights(tasks, scratch, progress=progress)
        _finish(scratch, out, "mlx", about, said, folder, wishes)
    return out


def bundle_packages(packages: list[Package], out: Path, wishes: Wishes) -> Path:
    """Make a bundle of Core ML packages of one model.

    A single package, with a function for each task, is the core: Core ML stores once
    what its functions share, and cannot load an incomplete package. Several packages,
    of one function each, are downloaded on demand and share their tokenizer.

    Args:
        packages: made by ``ifp_mlx to-coreml``.
        out, wishes: as in :func:`bundle_folders`.

    Raises:
        FileExistsError, ValueError: as there, or if one of several has two functions.
    """
    tasks = _functions(packages)
    check_wishes(out, tasks, wishes)
    first = packages[0]
    about = {
        "base_model": {"name": first.about.get("base_model")},
        "context_length": first.about.get("context_length"),
        "quantisation": first.about.get("quantisation"),
    }
    files = {p.folder.name: carried(p.folder) | {PACKAGE: p.package} for p in packages}
    if len(packages) > 1:
        files = {n: files[p.folder.name] for n, (p, _) in tasks.items()}
    said = {}
    for name, (package, function) in tasks.items():
        mask = _selection(package.folder / "masks" / f"{function}.safetensors")
        said[name] = _task(mask) | {"function": function}
    with new_folder(out, replace=wishes.replace) as scratch:
        lay_out_files(files, scratch)
        _finish(scratch, out, "coreml", about, said, first.folder, wishes)
    return out


def find_package(path: Path) -> Package:
    """Return the package and the folder that one call of ``ifp_mlx to-coreml`` made,
    given either of them.

    Raises:
        FileNotFoundError: if one of the two is not there.
    """
    inside = path.suffix == ".mlpackage" and (path.parent / "manifest.json").is_file()
    folder = path.parent if inside else path.with_suffix("")
    package = path if path.suffix == ".mlpackage" else path / PACKAGE
    if not package.is_dir():
        package = path.with_suffix(".mlpackage")
    for wanted in (package, folder / "manifest.json"):
        if not wanted.exists():
            raise FileNotFoundError(
                f"{path} is no package of ifp_mlx to-coreml: {wanted} is missing; "
                "give the package, or the folder made with it."
            )
    return Package(package, folder)


def _functions(packages: list[Package]) -> dict[str, tuple[Package, str]]:
    """Return package and function of each task, by the task's name."""
    named = {p.folder.name: (p, list(p.about.get("functions", {}))) for p in packages}
    if len(packages) == 1:
        [(package, functions)] = named.values()
        return {name: (package, name) for name in functions}
    for name, (package, functions) in named.items():
        if len(functions) != 1:
            raise ValueError(
                f"{package.package} has {len(functions)} functions and is one of "
                f"{len(packages)} packages; put all tasks into one package, or one "
                "into each."
            )
        check_names("bundle", [name])
    if len(named) < len(packages):
        raise ValueError(
            f"Two of the {len(packages)} packages have the name {next(iter(named))!r}, "
            "which becomes the task's; rename one."
        )
    return {name: (package, f[0]) for name, (package, f) in named.items()}


def check_wishes(out: Path, tasks: Collection[str], wishes: Wishes) -> None:
    """Raise ``ValueError`` or ``FileExistsError`` if a bundle cannot be made like this.
    Long jobs call it before they start; making a bundle checks again.

    Args:
        out: the folder to make.
        tasks: their names.
        wishes: what the developer says of it.
    """
    check_names(out.absolute().name, tasks)
    if unknown := sorted({*wishes.prefetch} - {*tasks}):
        raise ValueError(
            f"{unknown[0]!r} is to be prefetched and is no task of this bundle; its "
            f"tasks are {', '.join(tasks)}."
        )
    if wishes.replace and out.exists() and not (out / METADATA).is_file():
        raise FileExistsError(
            f"{out} is there and is no bundle, so it is not replaced; delete it or "
            "choose another output path."
        )


def _selection(path: Path) -> Selection | None:
    return Selection.load(path) if path.is_file() else None


def _task(mask: Selection | None) -> dict[str, Any]:
    """Return a task's entry in metadata.json, without its parts."""
    about: dict[str, Any] = dict.fromkeys(
        ("instruction", "mask_id", "identity", "unit", "keep", "agreement", "kl")
    )
    about["function"] = None
    if mask is None:
        return about
    origin = mask.origin
    about |= {"instruction": origin.instruction, "mask_id": mask.mask_id}
    about |= {"identity": mask.identity, "unit": mask.unit}
    about |= {"keep": round(mask.share, 4)}
    return about | {"agreement": origin.agreement, "kl": origin.kl}


def _base_model(folder: Path, masks: list[Selection]) -> dict[str, Any]:
    names = [mask.origin.model for mask in masks if mask.origin.model]
    return {"name": names[0] if names else _named_by_card(folder)}


def _named_by_card(folder: Path) -> str | None:
    from huggingface_hub import metadata_load

    card = folder / "README.md"
    found = (metadata_load(card) or {}).get("base_model") if card.is_file() else None
    return found if isinstance(found, str) else None


def _finish(
    scratch: Path,
    out: Path,
    kind: Kind,
    about: dict[str, Any],
    tasks: dict[str, dict[str, Any]],
    first: Path,
    wishes: Wishes,
) -> None:
    """Write everything except the parts: metadata, manifests, Swift, card and sums."""
    name = out.absolute().name
    parts = [_part(scratch, name, CORE, "essential")]
    for task in tasks:
        if (scratch / folder_of(task)).is_dir():
            when: Download = "prefetch" if task in wishes.prefetch else "onDemand"
            parts.append(_part(scratch, name, task, when))
    there = {part.name for part in parts}
    about["base_model"]["source"] = wishes.source
    about["base_model"] |= _licence(parts[0], first, wishes)
    said = {
        **{"name": name, "version": wishes.version, "kind": kind},
        "minimum_os": MINIMUM_OS[kind],
        "bytes": sum(part.bytes for part in parts),
        **about,
        "made_by": {n: version(n) for n in ("ifp_mlx", "mlx", "mlx-lm")},
        "tasks": {
            task: about | {"parts": [CORE, *({task} & there)]}
            for task, about in tasks.items()
        },
    }
    write_metadata(scratch, said, parts)
    write_manifests(scratch, name, parts)
    _copy_swift(scratch / SWIFT)
    (scratch / "README.md").write_text(card_of(said, parts), encoding="utf-8")
    write_sums(scratch, {p: e for part in parts for p, e in part.files.items()})


def _licence(core: Part, first: Path, wishes: Wishes) -> dict[str, Any]:
    patterns = [f"{CORE}/{pattern}" for pattern in LICENCES]
    files = [p for p in core.files if any(Path(p).match(f) for f in patterns)]
    named = wishes.license or licence_of(first)
    if named is None and (first / "manifest.json").is_file():
        named = read_object(first / "manifest.json").get("licence")
    return {"license": named, "license_files": sorted(files)}


def _part(scratch: Path, bundle: str, name: str, download: Download) -> Part:
    folder = scratch / folder_of(name)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {f.relative_to(scratch).as_posix(): entry_of(f) for f in files}
    return Part(name, download, pack_id(bundle, name), entries)


def _copy_swift(target: Path) -> None:
    """Copy the Swift package that reads a bundle, without what a build left in it."""
    source = Path(__file__).with_name(SWIFT)
    for file in sorted(source.rglob("*.swift")):
        path = file.relative_to(source)
        if path.parts[0] in SOURCES:
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / path)
