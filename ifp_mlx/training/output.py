"""The folder of a run: whose it is, whether it is finished, and how it goes on."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from ..files.atomic import new_file, refuse_existing
from . import checkpoints
from .recipe import TrainConfig

SETTINGS, CHECKPOINTS, RESULT = "settings.json", "checkpoints", "model"
# Settings that may change when a run goes on.
FREE = {"output", "watch", "eval_batches", "log_every", "eval_every", "save_every"}
FREE |= {"compile", "grad_checkpoint"}


def check_unfinished(config: TrainConfig) -> None:
    """Check that the output folder is new, or holds a run that can go on.

    Raises:
        FileExistsError: if the run there is finished, or the path is no folder.
    """
    output = config.folder
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is a file; give a folder for the run.")
    if not (output / RESULT).exists():
        return
    made = checkpoints.newest(output / CHECKPOINTS)
    if made is None:
        raise FileExistsError(
            f"The run in {output} is finished, and its checkpoints are gone, so that it "
            "cannot go on; give another output folder."
        )
    if made >= config.steps:
        raise FileExistsError(
            f"The run in {output} is finished: it made {made} steps; give more steps "
            "for it to go on, or another output folder."
        )


def claim(config: TrainConfig, log: Callable[[str], None]) -> None:
    """Make the output folder this run's: keep its settings there, or compare them with
    those that are there. The result of a run with fewer steps is set aside.

    Raises:
        ValueError: if a setting differs that a run which goes on cannot change.
    """
    output = config.folder
    _same_run(config, output / SETTINGS)
    if not (output / RESULT).exists():
        return
    made = checkpoints.newest(output / CHECKPOINTS)
    aside = output / f"{RESULT}-{made}"
    refuse_existing(aside)
    (output / RESULT).rename(aside)
    log(f"The run goes on after {made} steps; what they made is in {aside} now.")


def _same_run(config: TrainConfig, path: Path) -> None:
    here = asdict(config)
    there = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else here
    longer = there["steps"] < config.steps
    free = FREE | {"steps"} if longer else FREE
    for name, value in here.items():
        if name not in free and there.get(name, value) != value:
            raise ValueError(
                f"The run in {path.parent} has {name}={there[name]!r}, not {value!r}; "
                "resume it with its own settings, or choose another output folder."
            )
    if longer or not path.is_file():
        with new_file(path) as scratch:
            scratch.write_text(json.dumps(here, indent=2) + "\n", encoding="utf-8")
