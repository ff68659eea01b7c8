"""Progress of long work: how it is asked for, and how commands show it."""

from collections.abc import Callable, Iterable

from tqdm import tqdm

# Wraps an iteration; ``iter`` shows nothing.
ProgressBar = Callable[[Iterable], Iterable]


CARD = "measuring the model's card, once"


class Stage(list):
    """Steps of long work that nobody asked for, so that its bar says what it is."""

    def __init__(self, name: str, steps: Iterable) -> None:
        super().__init__(steps)
        self.name = name


def _shown(steps: Iterable) -> Iterable:
    return tqdm(steps, desc=getattr(steps, "name", None), disable=None, leave=False)


# What commands show on a terminal, and nowhere else.
SHOWN: ProgressBar = _shown
