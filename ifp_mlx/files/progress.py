"""Progress of long work: how it is asked for, and how commands show it."""

from collections.abc import Callable, Iterable
from functools import partial

from tqdm import tqdm

# Wraps an iteration; ``iter`` shows nothing.
ProgressBar = Callable[[Iterable], Iterable]

# What commands show on a terminal, and nowhere else.
SHOWN: ProgressBar = partial(tqdm, disable=None, leave=False)
