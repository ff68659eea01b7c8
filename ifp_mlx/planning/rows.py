"""What fits, and how long it will take, before anything is loaded.

Bytes are those of the files and shapes (:mod:`ifp_mlx.model.footprint`). Times are
predicted from a device's bandwidths and arithmetic (:mod:`ifp_mlx.planning.roofline`):
good for choosing, not for quoting. ``examples/guides/plan.md`` compares them with the
paper's measurements.

Exit status: 0 if it fits or no memory was named, 1 if it does not, 2 on a mistake.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..evaluation.tables import markdown
from ..files.amounts import in_words
from ..files.config import read_config
from ..files.paths import path_of
from ..model.card import Card, load_card
from ..model.checkpoint import PREDICTOR_FOLDER, open_model
from ..model.footprint import Footprint, model_of_config
from ..selection import widths
from ..selection.request import WITHOUT_CARD
from ..slicing.plan import plan_of
from . import roofline
from .devices import Device
from .roofline import Job, Times, Work


@dataclass(frozen=True)
class Subject:
    """The model that is planned for.

    Attributes:
        name: as it was given.
        folder: where it lies, or ``None`` for a config.json.
        footprint: its bytes.
        work: its multiplications.
        predictor: the multiplications per token and the layers of its predictor.
        selective: whether only the selected units are read from storage, as from a
            channel store; from a plain folder all channels are read.
        card: what was measured of its quality, or ``None``.
    """

    name: str
    folder: Path | None
    footprint: Footprint
    work: Work
    predictor: tuple[int, int] | None
    selective: bool
    card: Card | None = None


@dataclass(frozen=True)
class Row:
    """What one keep needs and how long it takes.

    Attributes:
        keep: share of the units, as ``--keep`` takes it.
        target_size: ``k``.
        compact_bytes: of the compact model.
        total_bytes: with the KV cache and the predictor.
        fits: in the memory that was named; ``None`` if none was.
        times: predicted; ``None`` without a device.
        agreement: how often it would choose the dense model's next token, by the
            model's card; ``None`` without a card, or below the keeps in the card.
    """

    keep: float
    target_size: int
    compact_bytes: int
    total_bytes: int
    fits: bool | None
    times: Times | None
    agreement: float | None


def open_subject(name: str, *, channel_store: bool = False) -> Subject:
    """Open a model folder, a hub id or a config.json alone; no weight is read.

    Args:
        name: of a hub id only the config.json is fetched.
        channel_store: plan as if the weights lay in a channel store.

    Raises:
        FileNotFoundError, ValueError: if there is no such model, or none that can be
            sliced.
    """
    path = path_of(name)
    if not path.is_dir():
        config = _config(name, path)
        dense = model_of_config(config)
        plan = plan_of(dense, config)
        footprint = Footprint.of_module(dense, plan, config)
        work = Work.of(dense, plan)
        return Subject(name, None, footprint, work, None, channel_store)
    model = open_model(path)
    return Subject(
        name,
        model.path,
        model.footprint,
        Work.of(model.source.skeleton, model.plan),
        _predictor(model.path / PREDICTOR_FOLDER),
        channel_store or model.source.reads_units,
        load_card(model),
    )


def plan_rows(
    subject: Subject,
    keeps: Sequence[float],
    job: Job,
    *,
    context_tokens: int,
    memory_bytes: int | None = None,
    device: Device | None = None,
) -> list[Row]:
    """Plan for several keeps.

    Args:
        subject: the model.
        keeps: shares of the units; each is rounded to what a layer can have.
        job: what is to be done with it.
        context_tokens: tokens that the KV cache must hold.
        memory_bytes: that may be used.
        device: to predict times for.
    """
    footprint, card = subject.footprint, subject.card
    rows = []
    for k in sorted({size_of(footprint, keep) for keep in keeps}):
        sizes = [k] * footprint.layers
        total = footprint.total_bytes(sizes, context_tokens)
        rows.append(
            Row(
                keep=k / footprint.channels,
                target_size=k,
                compact_bytes=footprint.compact_bytes(sizes),
                total_bytes=total,
                fits=None if memory_bytes is None else total <= memory_bytes,
                times=None if device is None else times(subject, device, sizes, job),
                agreement=None
                if card is None
                else card.promise(k / footprint.channels),
            )
        )
    return rows


def size_of(footprint: Footprint, keep: float) -> int:
    """Return the units of a layer that stand for a kept share."""
    k = widths.target_size(footprint.channels, keep, footprint.granularity)
    return max(k, footprint.smallest)


def times(subject: Subject, device: Device, sizes: Sequence[int], job: Job) -> Times:
    """Predict the phases of a request on a device."""
    footprint, work = subject.footprint, subject.work
    dense = sizes[0] == footprint.channels
    select = 0.0 if dense else _select_seconds(subject, device, job.instruction_tokens)
    whole = dense or not subject.selective
    loaded = footprint.dense_bytes if whole else footprint.compact_bytes(sizes)
    return roofline.predict(
        device, work, footprint, sizes, job, select=select, loaded=loaded
    )


def _select_seconds(subject: Subject, device: Device, tokens: int) -> float:
    if subject.predictor is None:
        return roofline.dense_select_seconds(
            device, subject.work, subject.footprint, tokens
        )
    weights, layers = subject.predictor
    count = subject.footprint.predictor_bytes
    return roofline.predictor_seconds(device, weights, count, layers, tokens)


def _config(name: str, path: Path) -> dict[str, Any]:
    """Return the config.json that a file or a hub id stands for."""
    if path.exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return read_config(path)
    from huggingface_hub import hf_hub_download

    try:
        return read_config(Path(hf_hub_download(name, "config.json")))
    except Exception as error:  # the client passes its HTTP library's errors on
        raise FileNotFoundError(
            f"{name} is no folder, and its config.json does not come from the Hugging "
            f"Face Hub ({type(error).__name__}: {error}); give a folder or a file."
        ) from error


def _predictor(folder: Path) -> tuple[int, int] | None:
    """Return the multiplications per token and the layers of a predictor."""
    if not folder.exists():
        return None
    config = read_config(folder / "config.json")
    dense = model_of_config(config)
    plan = plan_of(dense, config)
    sizes = [plan.units] * len(plan.layers)
    return Work.of(dense, plan).per_token(sizes), len(sizes)


def _verdict(
    args: Any, footprint: Footprint, largest: float | None, refusal: str | None
) -> tuple[str, bool]:
    """Return the words at the end, and whether what was asked for fits."""
    if args.memory_gb is None:
        return "", True
    if refusal is not None:
        return f"It does not fit: {refusal}", False
    assert largest is not None
    memory = in_words(round(args.memory_gb * 1e9))
    k = size_of(footprint, largest)
    best = f"the largest that fits {memory} is --target-size {k} (keep {largest:.3f})"
    smallest = min(args.keep or [largest])
    if size_of(footprint, smallest) > k:
        return f"It does not fit at keep {smallest:g}; {best}.", False
    if largest == 1:
        return f"The whole model fits {memory}.", True
    return f"{best[0].upper()}{best[1:]}.", True


def report(
    subject: Subject, rows: list[Row], context: int, job: Job, device: Device | None
) -> str:
    """Return the plan as tables for people."""
    footprint = subject.footprint
    lines = [
        f"{subject.name}: {footprint.layers} layers of {footprint.channels} "
        f"{footprint.unit}s{_rule(subject)}",
        "",
        markdown(
            ["part", "bytes"], [[n, in_words(b)] for n, b in _parts(subject, context)]
        ),
        "",
        markdown(*_memory_table(rows, footprint.unit, subject.card)),
    ]
    less = any(row.target_size < footprint.channels for row in rows)
    if (card := subject.card) is not None:
        lines += ["", _about(card)]
    elif less and subject.predictor is None:
        lines += ["", f"What these lose is not known: {WITHOUT_CARD}."]
    if device is not None:
        lines += ["", *_time_lines(subject, rows, job, device)]
    return "\n".join(lines)


def _rule(subject: Subject) -> str:
    """Return in words which numbers of units a layer can have."""
    footprint, step = subject.footprint, subject.footprint.granularity
    if footprint.unit == "channel":
        return f", chosen {step} at a time" if step > 1 else ""
    multiple = f" in multiples of {step}" if step > 1 else ""
    return (
        f", of which a token is sent to {subject.work.slots}; a selection keeps at "
        f"least {footprint.smallest}{multiple}"
    )


def _parts(subject: Subject, context: int) -> list[tuple[str, int]]:
    footprint, unit = subject.footprint, subject.footprint.unit
    core = "attention, embeddings, norms"
    if unit == "expert":
        core = "all but the experts that are selected"
    parts = [
        (f"core: {core}", footprint.core_bytes),
        (f"all {unit}s", footprint.dense_bytes - footprint.core_bytes),
        ("of them shared by every selection", footprint.shared_bytes),
        (f"one {unit} in every layer", footprint.channel_bytes([1] * footprint.layers)),
        ("predictor", footprint.predictor_bytes),
        (f"KV cache of {context} tokens", footprint.kv_bytes(context)),
    ]
    return [(name, count) for name, count in parts if count]


def _about(card: Card) -> str:
    return (
        "Agreement, by the model's card: how often the compact model chooses the dense "
        f"model's next token, measured on {card.sample}; between measured keeps a "
        "straight line."
    )


def _memory_table(
    rows: list[Row], unit: str, card: Card | None
) -> tuple[list[str], list[list[str]]]:
    head = ["keep", f"{unit}s", "compact model", "with KV and predictor"]
    cells = [
        [
            _name(row),
            str(row.target_size),
            in_words(row.compact_bytes),
            in_words(row.total_bytes),
        ]
        for row in rows
    ]
    if rows[0].fits is not None:
        head.append("fits")
        for row, line in zip(rows, cells, strict=True):
            line.append("yes" if row.fits else "no")
    if card is not None:
        head.append("agreement")
        for row, line in zip(rows, cells, strict=True):
            line.append("-" if row.agreement is None else f"{row.agreement:.0%}")
    return head, cells


def _time_lines(
    subject: Subject, rows: list[Row], job: Job, device: Device
) -> list[str]:
    how = "predictor" if subject.predictor else "the dense model reads the instruction"
    head = ["keep", "select s", "load s, cold", "load s, warm", "prefill s"]
    head += ["TTFT s, cold", "TTFT s, warm", "decode tokens/s"]
    cells = []
    for row in rows:
        spent = row.times
        assert spent is not None
        figures = [spent.select, spent.load, spent.load_warm, spent.prefill]
        figures += [None if spent.load is None else spent.ttft(), spent.ttft(warm=True)]
        shown = ["-" if f is None else f"{f:.3g}" for f in figures]
        cells.append([_name(row), *shown, f"{job.max_tokens / spent.decode:.3g}"])
    units = f"the selected {subject.footprint.unit}s"
    read = units if subject.selective else "the whole folder"
    return [
        f"Predicted, not measured, for {device.about}: {job.prompt_tokens} prompt "
        f"tokens, {job.max_tokens} decoded. Select: {how}"
        f" ({job.instruction_tokens} tokens); 0 with a mask file. Load: {read}.",
        "",
        markdown(head, cells),
        "",
        *_sources(device),
    ]


def _sources(device: Device) -> list[str]:
    figures = [
        ("memory", device.memory, 1e9, "GB/s"),
        ("storage", device.storage, 1e9, "GB/s"),
        ("arithmetic", device.compute, 1e12, "TFLOPS"),
    ]
    lines = [
        f"- {name}: {figure.value / unit:.3g} {what}, {figure.kind}: {figure.source}"
        for name, figure, unit, what in figures
        if figure is not None
    ]
    used = device.runtime
    return [
        *lines,
        f"- of which used: prefill {used.prefill:g}, decode {used.decode:g}, copying "
        f"{used.load:g}; {used.layer_seconds * 1e6:.3g} us a layer; {used.source}",
    ]


def _name(row: Row) -> str:
    return "1, dense" if row.keep == 1 else f"{row.keep:.3g}"


def as_json(
    subject: Subject, rows: list[Row], context: int, job: Job, device: Device | None
) -> dict[str, Any]:
    """Return the plan as plain data."""
    footprint = subject.footprint
    return {
        "model": subject.name,
        "layers": footprint.layers,
        "unit": footprint.unit,
        "channels": footprint.channels,
        "granularity": footprint.granularity,
        "smallest": footprint.smallest,
        "experts_per_token": subject.work.slots,
        "bytes": {
            "core": footprint.core_bytes,
            "channels": footprint.dense_bytes - footprint.core_bytes,
            "shared": footprint.shared_bytes,
            "predictor": footprint.predictor_bytes,
            "kv": footprint.kv_bytes(context),
        },
        "context_length": context,
        "job": asdict(job),
        "selector": "predictor" if subject.predictor else "activation",
        "reads": "selected" if subject.selective else "all",
        "rows": [_row_json(row) for row in rows],
        "device": device and asdict(device),
    }


def _row_json(row: Row) -> dict[str, Any]:
    content = asdict(row)
    if row.times is not None:
        content["times"] |= {
            "ttft": None if row.times.load is None else row.times.ttft(),
            "ttft_warm": row.times.ttft(warm=True),
        }
    return content
