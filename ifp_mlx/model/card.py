"""A model's card: how far its compact models agree with it, measured once.

How much a model can lose differs from model to model, so each has figures of its own:
`evaluate --card` measures them (:mod:`ifp_mlx.evaluation.card`), and commands that are
asked to keep less quote them. A card belongs to weights, not to a folder: it is never
used for others.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..files.atomic import new_file
from ..files.caches import cache_place
from ..storage.layout import CHANNEL_FILE

CARD_FILE = "ifp_card.json"
VERSION = 1
NEAR = 0.005  # how far a keep may be below the smallest measured: units are whole
WEIGHTS = ("model*.safetensors", CHANNEL_FILE, "predictor/*.safetensors")
SAMPLES, SAMPLE_BYTES = 256, 1024  # of each file of weights
# The answers on which compact and dense model were compared: the dense model's own
# greedy ones, or given ones (ifp_mlx.model.trial).
OWN, GIVEN = "own", "given"


class Opened(Protocol):
    """What is asked of an :class:`ifp_mlx.model.checkpoint.IFPModel`."""

    path: Path
    notes: Path
    adapter: str | None
    config: dict[str, Any]


@dataclass(frozen=True)
class Point:
    """What one kind of prompt costs at one keep.

    Attributes:
        kind: of prompt.
        keep: share of the units that was kept.
        rows: how many prompts there were.
        agreement: the share of the answers' tokens at which the compact model would
            choose the same token as the dense one, over all prompts.
        kl: from the dense model there, nats per token.
        self_agreement, self_kl: the same at the last tokens of the prompt, as noted
            with the selection, mean over prompts; ``None`` if the dense model did not
            read them.
        right: share of the compact model's own answers that are right, of those that
            can be checked; ``None`` if none can.
    """

    kind: str
    keep: float
    rows: int
    agreement: float
    kl: float
    self_agreement: float | None = None
    self_kl: float | None = None
    right: float | None = None


@dataclass(frozen=True)
class Card:
    """What was measured of a model, and how.

    Attributes:
        model: its name.
        unit: what was kept or dropped.
        selector: what chose it, from each prompt for itself.
        fingerprint: of its weights, from :func:`fingerprint_of`.
        tokens: how many tokens of answers were compared.
        seconds: how long measuring took.
        package: version of ifp_mlx that measured it.
        points: one for each kind and keep below 1.
        dense_right: kind → the dense model's share of right answers, where they can be
            checked.
        answers: which answers were compared: the dense model's ``own``, or ``given``.
        version: of the file's format.
    """

    model: str
    unit: str
    selector: str
    fingerprint: str
    tokens: int
    seconds: float
    package: str
    points: tuple[Point, ...]
    dense_right: dict[str, float]
    answers: str = OWN
    version: int = VERSION

    @staticmethod
    def from_json(text: str) -> "Card":
        """Return the card in a file.

        Raises:
            ValueError: if there is none, or one of another version.
        """
        try:
            fields = json.loads(text)
            points = tuple(Point(**point) for point in fields.pop("points"))
            card = Card(**fields, points=points)
            _ = [card.promise(keep) for keep in card.keeps()]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{error!r}") from error
        if card.version != VERSION or not points:
            raise ValueError(f"version {card.version}, {len(points)} points")
        return card

    def as_json(self) -> str:
        """Return the text of a file."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @property
    def kinds(self) -> list[str]:
        """The kinds of prompts, in order."""
        return list(dict.fromkeys(point.kind for point in self.points))

    @property
    def sample(self) -> str:
        """What was compared, in words."""
        if self.answers == GIVEN:
            return f"{self.tokens} tokens of given answers to a few questions"
        return f"{self.tokens} tokens of the dense model's own greedy answers"

    def keeps(self) -> list[float]:
        """Return the keeps below 1 that were measured, smallest first."""
        return sorted({point.keep for point in self.points})

    def promise(self, keep: float) -> float | None:
        """Return the agreement to expect at a keep: the mean over kinds, linear between
        measured keeps, 1 at 1; ``None`` below the smallest.
        """
        return _between(_means(self.points), keep)

    def worst(self, keep: float) -> tuple[str, float] | None:
        """Return the kind that agrees least at a keep, and how far; ``None`` below the
        smallest that was measured.
        """
        found = []
        for kind in self.kinds:
            own = [point for point in self.points if point.kind == kind]
            if (agreement := _between(_means(own), keep)) is not None:
                found.append((agreement, kind))
        return None if not found else min(found)[::-1]

    def smallest(self, least: float) -> float:
        """Return the smallest measured keep that promises an agreement; 1 if none does."""
        enough = (keep for keep in self.keeps() if (self.promise(keep) or 0) >= least)
        return next(enough, 1.0)

    def words(self, keep: float) -> str:
        """Return what the card says of a keep, for people, without a full stop."""
        promise, worst = self.promise(keep), self.worst(keep)
        if promise is None or worst is None:
            return (
                f"keep {keep:.2g} is less than the card of {self.model} has measured "
                f"({self.keeps()[0]:.2g})"
            )
        of = f" ({worst[0]}: {worst[1]:.0%})" if len(self.kinds) > 1 else ""
        return (
            f"by the card of {self.model}, keep {keep:.2g} chooses the dense model's next "
            f"token at {promise:.0%} of answers' tokens{of}"
        )


def _means(points: Sequence[Point]) -> list[tuple[float, float]]:
    """Return keep and mean agreement, smallest keep first, 1 at keep 1 included."""
    found: dict[float, list[float]] = {1.0: [1.0]}
    for point in points:
        found.setdefault(point.keep, []).append(point.agreement)
    return sorted((keep, float(np.mean(values))) for keep, values in found.items())


def _between(curve: list[tuple[float, float]], keep: float) -> float | None:
    keeps, values = zip(*curve, strict=True)
    return None if keep < keeps[0] - NEAR else float(np.interp(keep, keeps, values))


def load_card(model: Opened) -> Card | None:
    """Return the card of just these weights from the model's folder, else from the
    user's cache; ``None`` if there is none.

    Args:
        model: an :class:`ifp_mlx.model.checkpoint.IFPModel`.

    Raises:
        ValueError: if the file in the folder is no card.
    """
    own, cached = model.notes / CARD_FILE, cache_place("cards")
    if not own.is_file() and not cached.is_dir():
        return None
    fingerprint = fingerprint_of(model)
    if own.is_file():
        try:
            card = Card.from_json(own.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{own} is no card that can be read ({error}); delete it, and measure "
                f"another: python -m ifp_mlx.evaluate --model {model.path} --card"
            ) from error
        if card.fingerprint == fingerprint:
            return card
    try:
        text = (cached / f"{fingerprint}.json").read_text(encoding="utf-8")
        card = Card.from_json(text)
    except (OSError, ValueError):
        return None
    return card if card.fingerprint == fingerprint else None


def save_card(model: Opened, card: Card) -> Path:
    """Keep a card in the model's folder, or in the user's cache where that cannot be
    written.

    Returns:
        Its file.
    """
    cached = cache_place("cards") / f"{card.fingerprint}.json"
    try:
        return _write(model.notes / CARD_FILE, card)
    except OSError:
        return _write(cached, card)


def _write(path: Path, card: Card) -> Path:
    with new_file(path) as scratch:
        scratch.write_text(card.as_json(), encoding="utf-8")
    return path


def fingerprint_of(model: Opened) -> str:
    """Return what tells a model's weights from others, wherever their files are copied:
    a hash of its config, and of the files' names, sizes and some of their bytes.

    Training moves all weights of a matrix, so a few from everywhere are enough.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps(model.config, sort_keys=True, default=str).encode())
    digest.update((model.adapter or "").encode())
    files = sorted(file for name in WEIGHTS for file in model.path.glob(name))
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(model.path)} {size}".encode())
        with file.open("rb") as content:
            for place in np.linspace(0, max(0, size - SAMPLE_BYTES), SAMPLES):
                content.seek(int(place))
                digest.update(content.read(SAMPLE_BYTES))
    return digest.hexdigest()[:32]
