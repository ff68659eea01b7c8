"""The files of a bundle: what a model's tasks share, once, and each task's own.

Whatever is equal in the folders of all tasks is the core: tensors one by one, and
files. No list of names decides it, so this works for any architecture and quantisation.
"""

import filecmp
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from ..files.atomic import new_folder
from ..files.companions import LICENCES, TOKENIZER
from ..files.progress import ProgressBar
from ..files.tensors import Tensor, equal_tensors, weights_of, write_tensors
from .metadata import CORE, Bundle, folder_of
from .sums import check_files

T = TypeVar("T")
PACKAGE = "model.mlpackage"
INDEX = "model.safetensors.index.json"
MASK = "ifp.mask"
CARRIED = [*TOKENIZER, *LICENCES, "config.json", "README.md"]
CARRIED += [MASK, "manifest.json", PACKAGE]


def carried(folder: Path) -> dict[str, Path]:
    """Return the files of a compact model that a bundle takes besides its weights; a
    Core ML package is one of them.
    """
    found = {path.name: path for name in CARRIED for path in folder.glob(name)}
    found.pop(INDEX, None)
    return dict(sorted(found.items()))


def lay_out_files(tasks: dict[str, dict[str, Path]], target: Path) -> None:
    """Copy files; those that are equal in all tasks go into the core.

    Args:
        tasks: by the task's name, files or folders by the name they get.
        target: the bundle's folder.
    """
    shared = _equal_in_all(list(tasks.values()), _equal_files)
    first = next(iter(tasks.values()))
    _copy({name: first[name] for name in shared}, target / folder_of(CORE))
    for task, files in tasks.items():
        own = {name: path for name, path in files.items() if name not in shared}
        _copy(own, target / folder_of(task))


def lay_out_weights(
    tasks: dict[str, Path], target: Path, *, progress: ProgressBar = iter
) -> None:
    """Write tensors: those that are equal in all tasks into the core, the others into a
    file per task. A task's index names both files.

    Args:
        tasks: by the task's name, the folder of its compact model.
        target: the bundle's folder.
        progress: wraps the iteration over tasks.

    Raises:
        ValueError: if they have nothing in common, or one has no weights.
    """
    weights = {task: weights_of(folder) for task, folder in tasks.items()}
    for task, tensors in weights.items():
        if not tensors:
            raise ValueError(
                f"{tasks[task]} has no model*.safetensors; give a folder that ifp_mlx "
                "compact made."
            )
    shared = _equal_in_all(list(weights.values()), equal_tensors)
    if not shared:
        raise ValueError(
            f"{' and '.join(map(str, tasks.values()))} have no tensor in common, so they "
            "are not of one model; make a bundle of each."
        )
    first = next(iter(weights.values()))
    _write({name: t for name, t in first.items() if name in shared}, CORE, target)
    for task in progress(weights):
        own = {n: t for n, t in weights[task].items() if n not in shared}
        if own:
            _write(own, task, target)
        _write_index(weights[task], shared, task if own else CORE, target)


def take(bundle: Bundle, task: str, out: Path, *, progress: ProgressBar = iter) -> Path:
    """Make an ordinary model folder of one task: its files as hard links, or copies where
    the disk has none.

    Args:
        bundle: the one that holds the task.
        task: the task's name.
        out: the folder to make.
        progress: wraps the iteration over files.

    Raises:
        FileExistsError: if ``out`` is there.
        ValueError: if there is no such task, or a file of it is damaged.
    """
    parts = bundle.parts_of(task)
    check_files(bundle, parts, progress=progress)
    with new_folder(out) as scratch:
        for part in parts:
            for path in part.files:
                target = scratch / Path(path).relative_to(part.folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                _link(bundle.folder / path, target)
    return out


def _link(source: Path, target: Path) -> None:
    try:
        # Link the file itself, not a link to it, which may lead nowhere.
        os.link(source.resolve(), target)
    except FileExistsError:  # a copy would write into the linked file
        raise
    except OSError:
        shutil.copyfile(source, target)


def _equal_in_all(tasks: list[dict[str, T]], equal: Callable[[T, T], bool]) -> set[str]:
    """Return the names whose contents are equal in all tasks."""
    first, *others = tasks
    return {
        name
        for name, content in first.items()
        if all(name in other and equal(content, other[name]) for other in others)
    }


def _equal_files(one: Path, other: Path) -> bool:
    if one.is_dir() != other.is_dir():
        return False
    if not one.is_dir():
        return filecmp.cmp(one, other, shallow=False)
    names, more = (_files_in(folder) for folder in (one, other))
    return names == more and all(_equal_files(one / n, other / n) for n in names)


def _files_in(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _copy(files: dict[str, Path], folder: Path) -> None:
    for name, path in files.items():
        folder.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if path.is_dir() else shutil.copyfile
        copy(path, folder / name)


def _file_of(part: str) -> str:
    # mlx-lm loads what is called model*.safetensors.
    return f"model-{part}.safetensors"


def _write(tensors: dict[str, Tensor], part: str, target: Path) -> None:
    folder = target / folder_of(part)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / _file_of(part), tensors, {"format": "mlx"})


def _write_index(
    tensors: dict[str, Tensor], shared: Iterable[str], part: str, target: Path
) -> None:
    core = {*shared}
    files = {n: _file_of(CORE if n in core else part) for n in sorted(tensors)}
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": files}
    text = json.dumps(index, indent=2)
    (target / folder_of(part) / INDEX).write_text(text + "\n", encoding="utf-8")
