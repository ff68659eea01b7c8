"""The ways of selecting that selectors_bench.py compares, table by table."""

from typing import NamedTuple

from ifp_mlx.selection.widths import Allocation


class Way(NamedTuple):
    """One way of selecting.

    Attributes:
        scores: where they come from.
        allocation: how the kept channels are spread over the layers.
        compensation: the text that it learns from, ``prompt`` or ``examples``.
        alone: whether it learns from that text alone, without a sketch of the package's
            calibration text beside it.
        prompt: which model reads the prompt, ``compact`` or ``dense``.
        costs: the texts on which costs for the allocation ``sensitivity`` are measured:
            ``tasks``, or the text that ships with the package.
        quantised: how the channels of a model at 4 bits are taken: by whole ``groups``,
            which loses nothing, or by ``channels``, for which ``down_proj`` is
            quantised again; so it is if compensated.
    """

    scores: str
    allocation: Allocation
    compensation: str = ""
    alone: bool = False
    prompt: str = "compact"
    costs: str = "tasks"
    quantised: str = ""

    @property
    def statistic(self) -> str:
        """What its scores are; a ``blend`` that compensates with a sketch chooses by
        the ``merit`` of channels.
        """
        sketched = self.compensation and not self.alone
        return "merit" if self.scores == "blend" and sketched else self.scores

    @property
    def name(self) -> str:
        """What the table calls it."""
        ranks = self.scores == "blend" and self.alone
        text = f"{self.scores}{' of ranks' if ranks else ''}, {self.allocation}"
        text += "" if self.costs == "tasks" else f" on the {self.costs}'s text"
        text += f", compensated by {self.compensation}" if self.compensation else ""
        text += " alone" if self.alone else ""
        text += f", 4 bits by {self.quantised}" if self.quantised else ""
        return text + (", dense prompt" if self.prompt == "dense" else "")


class Stage(NamedTuple):
    """One table; a row that is in several tables of a keep is read once.

    Attributes:
        ways: that are compared.
        keep: kept share of the channels.
        share: of the rows asked for.
    """

    ways: tuple[Way, ...]
    keep: float
    share: float

    def rows(self, wanted: int) -> int:
        """Return how many rows of each family are measured."""
        return max(2, round(wanted * self.share))  # one has no spread


PLAIN = Way("blend", "first-layer")
DEFAULT = PLAIN._replace(compensation="prompt")
ALONE = DEFAULT._replace(alone=True)  # the default before there was a sketch
GRIFFIN = Way("activation", "uniform")
ACTIVATION = DEFAULT._replace(scores="activation")
STATIC = Way("others", "first-layer")  # that did not see the family
TASK = Way("task", "sensitivity")
COMPENSATED = TASK._replace(compensation="examples")
MAIN = (
    GRIFFIN,
    GRIFFIN._replace(prompt="dense"),
    DEFAULT,
    ALONE,
    STATIC,
    COMPENSATED,
    COMPENSATED._replace(alone=True),
)
OTHER_KEEPS = (*MAIN, ACTIVATION, ACTIVATION._replace(alone=True), PLAIN)
FURTHER: tuple[Way, ...] = (
    DEFAULT,
    STATIC,
    Way("random", "uniform"),
    Way("prior", "first-layer"),
    Way("others", "uniform"),
    Way("activation", "first-layer"),
    ACTIVATION,
    Way("blend", "uniform"),
    PLAIN,
    PLAIN._replace(prompt="dense"),
    DEFAULT._replace(prompt="dense"),
    DEFAULT._replace(allocation="uniform"),
    Way("blend", "sensitivity"),
    DEFAULT._replace(allocation="sensitivity"),
    Way("blend", "sensitivity", costs="package"),
    PLAIN._replace(quantised="groups"),
    PLAIN._replace(quantised="channels"),
    DEFAULT._replace(quantised="groups"),
    DEFAULT._replace(quantised="channels"),
    Way("task", "uniform"),
    Way("task", "first-layer"),
    TASK,
    TASK._replace(prompt="dense"),
    COMPENSATED,
    COMPENSATED._replace(allocation="first-layer"),
)
FURTHER += tuple(way._replace(alone=True) for way in FURTHER if way.compensation)
STAGES = (
    Stage(MAIN, 0.5, 1),
    Stage(OTHER_KEEPS, 0.75, 0.1),
    Stage(OTHER_KEEPS, 1 / 3, 0.1),
    Stage(FURTHER, 0.5, 0.1),
)
