"""Progress of long work: how functions take a bar, and how commands show one."""

import sys
from collections.abc import Callable, Iterable

from tqdm import tqdm

# Wraps an iteration; ``iter`` shows nothing.
ProgressBar = Callable[[Iterable], Iterable]


# Long work that the user did not ask for.
CALIBRATION = "reading the calibration text, once"
CARD = "measuring the model's card, once"


class Stage(list):
    """Steps of long work that the user did not ask for; its bar shows its name."""

    def __init__(self, name: str, steps: Iterable) -> None:
        super().__init__(steps)
        self.name = name


def named(progress: ProgressBar, name: str) -> ProgressBar:
    """Return a bar that shows what the work is."""
    return lambda steps: progress(Stage(name, steps))


def announce(name: str) -> None:
    """Say what takes long, once, where standard error shows no bar."""
    if not sys.stderr.isatty():
        print(f"{name} ...", file=sys.stderr, flush=True)


def _shown(steps: Iterable) -> Iterable:
    name = getattr(steps, "name", None)
    if name is not None:
        announce(name)
    return tqdm(steps, desc=name, disable=None, leave=False)


# What commands show: bars on a terminal, and elsewhere the names of named work.
SHOWN: ProgressBar = _shown
