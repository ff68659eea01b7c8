"""What is measured: whole models at few bits, and selections of the 4- and 8-bit one."""

from typing import NamedTuple

REFERENCE, FILE = "reference", "file"  # the weights that a point is made from
BASES = (4, 8)  # bits, in groups of 64, of the models that are selected from
KEEPS = (0.9, 0.75, 0.6, 0.5, 0.4, 0.33, 0.25)
RECIPES = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")
# Most tokens; if too few prompts are short enough, the shortest of the others.
PROMPT, ANSWER = 100, 32
# The bits per weight to aim at, and the two widths that layers can have.
DYNAMIC = {3.0: (2, 4), 4.0: (3, 5), 5.0: (4, 6)}


class Point(NamedTuple):
    """One model, or one selection of it for each prompt.

    Attributes:
        kind: how it is made: ``dense``, ``select``, or the name of a quantiser.
        bits: of a quantised weight; what ``dynamic`` aims at for all weights.
        group: weights that share a scale.
        keep: kept share of the channels.
        source: the weights that it is made of.
    """

    kind: str
    bits: float = 16
    group: int = 64
    keep: float = 1.0
    source: str = REFERENCE

    @property
    def name(self) -> str:
        """What results call it."""
        if self.kind == "dense":
            return "dense" if self.source == REFERENCE else "file"
        if self.kind in RECIPES:
            return self.kind
        if self.kind == "dynamic":
            return f"dynamic {self.bits:g}"
        name = f"{self.kind} {self.bits:g}/{self.group}"
        name += "" if self.kind != "select" else f" keep {self.keep:g}"
        return name if self.source == REFERENCE else f"{name} of the file"

    @property
    def compared(self) -> str:
        """Whose dense model it is compared with."""
        return REFERENCE if self.kind == "dense" else self.source

    @property
    def base(self) -> "Point":
        """The whole model that a selection is made of."""
        return Point("affine", self.bits, self.group)


AFFINE = [Point("affine", bits, g) for g in (64, 32) for bits in (8, 6, 5, 4, 3, 2)]
MIXED = [Point(recipe, int(recipe[6])) for recipe in RECIPES]
TARGETS = [Point("dynamic", bits) for bits in DYNAMIC]
SEARCHED = [Point(kind, bits) for kind in ("awq", "dwq") for bits in (4, 3, 2)]
GPTQ = [Point("gptq", bits) for bits in (8, 4, 2)]  # all that mlx-lm's knows
SELECTIONS = [Point("select", 4, keep=keep) for keep in KEEPS]
SELECTIONS += [Point("select", 8, keep=keep) for keep in (0.75, 0.5, 0.33)]
DENSE = Point("dense")
AS_FILED = [Point("dense", source=FILE), Point("affine", 4, 32, source=FILE)]
WHOLE = [*AFFINE, *MIXED, *TARGETS, *SEARCHED, *GPTQ]
# Points that take long come last, so that a stopped run has the others.
POINTS = [DENSE, *AS_FILED, *AFFINE, *SELECTIONS, *GPTQ, *MIXED, *TARGETS, *SEARCHED]
