"""What the bench of selectors measures once: how the calibration rows of each family use
a model's channels, and what pruning a layer costs on them.
"""

from collections.abc import Callable, Iterable
from functools import cached_property, partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from tqdm import tqdm

from ifp_mlx import Selection
from ifp_mlx.evaluation.rows import Row, read_rows
from ifp_mlx.evaluation.sensitivity import Probe
from ifp_mlx.files.atomic import new_file
from ifp_mlx.model.calibration import calibration_texts
from ifp_mlx.selection import widths
from ifp_mlx.slicing.compensation import TEXT_TOKENS, read_channels

from .bench_model import Bench, energy
from .bench_ways import Way
from .task_families import write as write_families

PARTS = ("prompt", "answer")
STATISTICS = "statistics"
Part = tuple[str, float]  # statistics, or costs on a text at a keep


def parts_of(ways: Iterable[Way], keep: float) -> set[Part]:
    """Return what must be known to measure some ways at a keep."""
    found: set[Part] = set()
    for way in ways:
        if way.scores in ("others", "task"):
            found.add((STATISTICS, 0.0))
        if way.allocation == "sensitivity":
            found.add((way.costs, keep))
    return found


def file_of(folder: Path, part: Part) -> Path:
    """Return where a part is kept."""
    text, keep = part
    name = text if text == STATISTICS else f"costs-{text}-{keep:.3g}"
    return folder / f"{name}.safetensors"


class Calibration:
    """The measurements, made when they are first asked for and kept in a folder.

    Args:
        bench: the model.
        folder: where the results are kept.
    """

    def __init__(self, bench: Bench, folder: Path) -> None:
        self.bench, self._folder = bench, folder
        self._examples: dict[str, list[Row]] = {}
        self._costs: dict[Part, dict[str, mx.array]] = {}
        self._compensated: dict[tuple, list[nn.Module]] = {}
        self._seen: dict[str, list[mx.array]] = {}  # channels of its examples
        files = sorted((write_families() / "calibration").glob("*.jsonl"))
        self.families = [file.stem for file in files]
        for file in files:
            rows = read_rows(file, bench.tokenizer, answer_tokens=bench.answer_tokens)
            self._examples[file.stem] = rows

    def prepare(self, part: Part) -> None:
        """Measure a part, unless it is done."""
        if part[0] == STATISTICS:
            mx.eval(self._energy)
        else:
            self._known_costs(part)

    def scores(self, kind: str, family: str) -> mx.array:
        """Return the static scores ``others`` or ``task`` of a family, ``[L, F]``."""
        names = [name for name in self.families if name != family]
        if kind == "task":
            names = [family]
        parts = [self._energy[f"{name}.{part}"] for name in names for part in PARTS]
        # Families count the same, and so do prompts and answers.
        shares = [part / part.sum(axis=1, keepdims=True) for part in parts]
        return mx.sqrt(sum(shares, mx.array(0.0)))

    def costs(self, way: Way, family: str, keep: float) -> mx.array:
        """Return what keeping that share costs each layer, ``[L, 6]`` for
        :func:`widths.layer_sizes`. Only a task's mask may use costs on its own family.
        """
        known = self._known_costs((way.costs, keep)).items()
        found = [c for name, c in known if way.scores == "task" or name != family]
        # The cost is known at this very keep, without interpolation.
        column = mx.stack(found).mean(axis=0)[:, None]
        return mx.repeat(column, len(widths.MEASURED_SHARES), axis=1)

    def compensated(
        self, family: str, selection: Selection, *, alone: bool
    ) -> list[nn.Module]:
        """Return the FFNs of a selection that is the same for all rows of a family,
        compensated by what its first calibration examples show, alone or not.
        """
        key = family, selection.mask_id, alone
        if key not in self._compensated:
            if family not in self._seen:
                texts = [row.prompt + row.answer for row in self._examples[family]]
                tokens = sum(texts, [])[:TEXT_TOKENS]
                self._seen[family] = read_channels(
                    self.bench.dense, self.bench.plan, tokens
                )
            rows = self.bench.evidence(self._seen[family], alone=alone)
            self._compensated[key] = self.bench.sliced(selection, rows)
        return self._compensated[key]

    @cached_property
    def _energy(self) -> dict[str, mx.array]:
        file = file_of(self._folder, (STATISTICS, 0.0))
        return _kept(file, self._measure_energy)

    def _known_costs(self, part: Part) -> dict[str, mx.array]:
        if part not in self._costs:
            measure = partial(self._measure_costs, *part)
            self._costs[part] = _kept(file_of(self._folder, part), measure)
        return self._costs[part]

    def _measure_energy(self) -> dict[str, mx.array]:
        """Return the squared statistic of each family's prompts and answers."""
        found: dict[str, mx.array] = {}
        for name in tqdm(self.families, STATISTICS, disable=None):
            parts = [mx.array(0.0)] * 2
            for row in self._examples[name]:
                text = row.prompt + row.answer
                channels = read_channels(self.bench.dense, self.bench.plan, text)
                P = len(row.prompt)
                for part, tokens in enumerate((slice(P), slice(P, None))):
                    more = mx.stack([energy(h[tokens]) for h in channels])
                    parts[part] = parts[part] + more
                mx.eval(parts)
            found |= {f"{name}.{p}": e for p, e in zip(PARTS, parts, strict=True)}
        return found

    def _measure_costs(self, text: str, keep: float) -> dict[str, mx.array]:
        """Return each family's costs, ``[L]``, or those on the package's texts."""
        if text == "tasks":
            names, texts = self.families, self._texts()
            # By the prior, so that no family influences the costs of another.
            probe = Probe(self.bench.model, texts, self.bench.prior)
        else:  # as ifp_mlx.sensitivity does
            texts = calibration_texts(self.bench.model)
            names, probe = (
                list(map(str, range(len(texts)))),
                Probe(self.bench.model, texts),
            )
        about = f"costs at {keep:.3g}"
        layers = tqdm(range(self.bench.model.layers), about, disable=None)
        costs = mx.array(
            [probe.costs(layer, [keep])[:, 0].tolist() for layer in layers]
        )
        return {name: costs[:, n] for n, name in enumerate(names)}

    def _texts(self) -> list[list[int]]:
        """Return one of each family's calibration rows, cut."""
        texts = []
        for name in self.families:
            every = [row.prompt + row.answer for row in self._examples[name]]
            enough = [text for text in every if len(text) > 60]
            texts += [min(enough, key=len)[: round(1.15 * self.bench.answer_tokens)]]
        return texts


def _kept(file: Path, measure: Callable[[], dict[str, mx.array]]) -> dict:
    """Return arrays from a file, or measure and keep them."""
    if not file.exists():
        with new_file(file) as scratch:
            mx.save_safetensors(str(scratch), measure())
    return dict(mx.load(str(file)))  # type: ignore[arg-type]
