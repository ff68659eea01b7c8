"""Progress of long work: how functions take a bar, and how commands show one."""

from collections.abc import Callable, Iterable

from tqdm import tqdm

# Wraps an iteration; ``iter`` shows nothing.
ProgressBar = Callable[[Iterable], Iterable]


CARD = "measuring the model's card, once"


class Stage(list):
    """Steps of long work that the user did not ask for; its bar shows its name."""

    def __init__(self, name: str, steps: Iterable) -> None:
        super().__init__(steps)
        self.name = name


def _shown(steps: Iterable) -> Iterable:
    return tqdm(steps, desc=getattr(steps, "name", None), disable=None, leave=False)


# What commands show on a terminal, and nowhere else.
SHOWN: ProgressBar = _shown
