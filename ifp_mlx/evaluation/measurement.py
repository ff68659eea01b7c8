"""Every setting and every rival on every row."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..model.checkpoint import IFPModel
from ..model.decide import decide
from .cost import decode_speeds
from .log import Line, Log
from .quantised import QuantisedCompact
from .rivals import (
    Rival,
    choose_bits,
    compact_bytes,
    quantised,
    smaller,
    unquantised,
    weight_bytes,
)
from .rows import Row, answer_text
from .teacher import Evaluator, Setting, metrics

DENSE = "dense"
KEY = ("arm", "file", "row")
SPEED_PROMPT = 32
Progress = Callable[[Iterable], Iterable]


@dataclass
class Arm:
    """One way to run the model: dense, selected, or a rival.

    Attributes:
        name: what tables and logs call it.
        setting: how it selects, or ``None`` if it does not.
        bytes: of its weights; numbers that are not quantised count 2 bytes.
        tokens_per_second: of decoding, or ``None`` if that was not measured.
        rows: file → one line of metrics a row, in the order of the file.
    """

    name: str
    setting: Setting | None = None
    bytes: int = 0
    tokens_per_second: float | None = None
    rows: dict[str, list[Line]] = field(default_factory=dict)

    def values(self, metric: str) -> dict[str, list[float]] | None:
        """Return file → one value a row; ``None`` where there is no such metric."""
        if any(metric not in line for lines in self.rows.values() for line in lines):
            return None
        return {f: [line[metric] for line in lines] for f, lines in self.rows.items()}


def arms_of(
    model: IFPModel, settings: Sequence[Setting], rivals: Sequence[Rival], row: Row
) -> list[Arm]:
    """Return what is compared, the dense model first, with its sizes.

    Args:
        model: from :func:`ifp_mlx.load`.
        settings: ways of selecting.
        rivals: whole models.
        row: any one; the size of a selection depends only on its setting.
    """
    dense = model.dense()
    arms = [Arm(DENSE, bytes=weight_bytes(dense))]
    for setting in settings:
        selection = model.select(
            row.prompt,
            keep=setting.keep,
            selector="random",
            allocation=setting.allocation,
        )
        arms.append(
            Arm(
                setting.name,
                setting,
                compact_bytes(dense, model.plan, selection, setting.bits),
            )
        )
    arms += [Arm(rival.name, bytes=weight_bytes(rival.model)) for rival in rivals]
    return arms


def rivals_of(
    model: IFPModel, sizes: Iterable[int], smaller_model: str | None
) -> list[Rival]:
    """Return the dense model quantised to about each of some sizes, in bytes, and the
    smaller model, if there is one.
    """
    source = model.config.get("quantization", {}).get("bits", 16)
    bits = choose_bits(unquantised(model), list(sizes), below=source)
    rivals = [quantised(model, number) for number in bits]
    return rivals + ([smaller(smaller_model, model)] if smaller_model else [])


def measure(
    model: IFPModel,
    files: Mapping[str, list[Row]],
    arms: Sequence[Arm],
    rivals: Sequence[Rival],
    log: Log,
    *,
    seed: int = 0,
    progress: Progress = iter,
) -> None:
    """Measure what is missing in the log, and give every arm its rows.

    Args:
        model: from :func:`ifp_mlx.load`.
        files: rows by the name of their file.
        arms: from :func:`arms_of`.
        rivals: the same as there.
        log: results so far, with the key :data:`KEY`.
        seed: of the selector ``random``.
        progress: wraps the iteration over rows.
    """
    rows = [(file, row) for file, rows in files.items() for row in rows]
    bits = {arm.setting.bits for arm in arms if arm.setting is not None} - {None}
    small = {number: QuantisedCompact(model, number) for number in bits if number}
    evaluator: Evaluator | None = None
    for file, row in progress(rows):
        todo = [arm for arm in arms if (arm.name, file, row.key) not in log]
        if todo:
            evaluator = evaluator or Evaluator(model)
            found = _measure_row(evaluator, row, todo, rivals, small, seed)
            log.add(*({"file": file, "row": row.key} | line for line in found))
    for arm in arms:
        for file, of_file in files.items():
            lines = [log.lines[arm.name, file, row.key] for row in of_file]
            arm.rows[file] = lines


def _measure_row(
    evaluator: Evaluator,
    row: Row,
    arms: Sequence[Arm],
    rivals: Sequence[Rival],
    small: Mapping[int, QuantisedCompact],
    seed: int,
) -> list[Line]:
    names = {arm.name for arm in arms}
    settings = [arm.setting for arm in arms if arm.setting is not None]
    keep_cache = any(setting.prefill == "dense" for setting in settings)
    reference = evaluator.reference(row, keep_cache=keep_cache)
    truth = reference.log_probabilities
    tokenizer = evaluator.model.tokenizer
    found: dict[str, tuple[Row, dict[str, float]]] = {}
    if DENSE in names:
        found[DENSE] = row, metrics(row, truth, truth)
    for setting in settings:
        if setting.compensate:
            decision = decide(setting.request(row.prompt, seed), evaluator.model)
            model = evaluator.model.prepare(decision).model
            if setting.bits is not None:
                small[setting.bits].round(model)
            values = evaluator.compare(row, model, reference, setting.prefill)
            found[setting.name] = row, values
    for setting, selection in evaluator.selections(row, settings, seed):
        if setting.bits is not None:
            model = small[setting.bits].of(selection.mask())
        else:
            model = evaluator.masked(selection.mask())
        values = evaluator.compare(row, model, reference, setting.prefill)
        found[setting.name] = row, values
    for rival in rivals:
        if rival.name in names:
            found[rival.name] = rival.measure(row, truth, tokenizer)
    size = len(answer_text(row, tokenizer).encode())
    lines = []
    for name, (own, values) in found.items():
        per_byte = values["nll"] * len(own.answer) / max(size, 1)
        lines.append({"arm": name} | values | {"nll_per_byte": per_byte})
    return lines


def time_arms(
    model: IFPModel,
    arms: Sequence[Arm],
    rivals: Sequence[Rival],
    row: Row,
    tokens: int,
    *,
    progress: Progress = iter,
) -> None:
    """Measure how fast every arm decodes: all models are in memory at once.

    A compact model's speed does not depend on which units it keeps, so one selection
    stands for all with the same keep, allocation and bits.

    Args:
        model: from :func:`ifp_mlx.load`.
        arms: from :func:`arms_of`.
        rivals: the same as there.
        row: whose prompt is continued.
        tokens: to decode; 0 measures nothing.
        progress: wraps the iteration over turns.
    """
    if not tokens:
        return
    models: dict[str, nn.Module] = {DENSE: model.dense()}
    models |= {rival.name: rival.model for rival in rivals}
    shape = {}
    for arm in arms:
        shape[arm.name] = arm.name
        if arm.setting is not None:
            s = arm.setting
            shape[arm.name] = name = f"{s.keep:g} {s.allocation} {s.bits}"
            if name not in models:
                models[name] = _compact(model, row, s)
    mx.eval(models[DENSE].parameters())
    prompt = row.prompt[:SPEED_PROMPT]
    speeds = decode_speeds(models, prompt, tokens, progress=progress)
    for arm in arms:
        arm.tokens_per_second = speeds[shape[arm.name]]


def _compact(model: IFPModel, row: Row, setting: Setting) -> nn.Module:
    selection = model.select(
        row.prompt,
        keep=setting.keep,
        selector="random",
        allocation=setting.allocation,
    )
    if setting.bits is None:
        return model.compact(selection)
    return QuantisedCompact(model, setting.bits).of(selection.mask())


def evaluate(
    model: IFPModel,
    files: dict[str, list[Row]],
    settings: list[Setting],
    *,
    folder: Path | None = None,
    alternatives: bool = False,
    smaller_model: str | None = None,
    speed_tokens: int = 0,
    seed: int = 0,
    progress: Any = iter,
) -> list[Arm]:
    """Measure every setting on every row, and the alternatives to selecting.

    Args:
        model: from :func:`ifp_mlx.load`.
        files: rows by the name of their file.
        settings: what to compare.
        folder: where results are kept, so that a stopped run goes on.
        alternatives: measure the dense model quantised to about each setting's size.
        smaller_model: measure this model too, a folder or hub id.
        speed_tokens: decode this many to measure speed; 0 does not measure it.
        seed: of the selector ``random``.
        progress: wraps the iterations over rows and over turns.

    Returns:
        The dense model, the settings and the alternatives, measured.

    Raises:
        ValueError: if ``folder`` was begun with other settings.
    """
    log = Log(folder, about_run(model, seed), KEY)
    row = next(iter(files.values()))[0]
    arms = arms_of(model, settings, [], row)
    sizes = {arm.bytes for arm in arms[1:]} if alternatives else ()
    rivals = rivals_of(model, sizes, smaller_model)
    arms = arms_of(model, settings, rivals, row)
    measure(model, files, arms, rivals, log, seed=seed, progress=progress)
    time_arms(model, arms, rivals, row, speed_tokens, progress=progress)
    return arms


def about_run(model: IFPModel, seed: int) -> dict[str, Any]:
    """Return the settings that every result in a folder depends on."""
    return {
        "model": model.name,
        "fingerprint": [round(float(x), 4) for x in model.fingerprint[:8]],
        "seed": seed,
        "versions": {name: version(name) for name in ("ifp_mlx", "mlx", "mlx-lm")},
    }
