"""A Selection, its identity, and the mask file it is kept in."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import mlx.core as mx
import numpy as np

from ..files.atomic import new_file
from ..files.paths import path_of
from .calibration import SKETCH_VERSION

MASK_FORMAT = "ifp_mlx.mask.1"
# Keys in a mask file's metadata.
COMPENSATED_BY, TEXT_DIGEST = "compensated by", "text digest"
SKETCH = "sketch"
TRAINED_BY = "recovered by"
ADAPTER = "adapter"


@dataclass(frozen=True)
class Compensation:
    """The text from which kept channels learned to make up for dropped ones.

    Attributes:
        source: what the text is, in words.
        tokens: how many it has.
        digest: of its token ids; empty in files of version 0.1 that lost them.
        sketch: which sketch of the calibration text was used with it, or ``None``.
    """

    source: str
    tokens: int
    digest: str
    sketch: str | None = None


@dataclass(frozen=True)
class Origin:
    """How a selection was made, and what is known of it; ``None`` means unknown.

    Attributes:
        selector, allocation: see :class:`ifp_mlx.selection.request.Request`.
        keep: kept share of the units.
        instruction: the text that selected.
        task: the name of the task it is for.
        model: the name of the model it was made with.
        made: of a task: who scored (``selector``), examples, tokens, date, versions.
        evaluation: of a task: what it cost when it was measured.
        slicing: how a quantised model was sliced: ``whole groups``, ``requantised``.
        requantised_layers: how many layers were quantised again.
        requantisation_kl: what that costs, nats per token.
        agreement: share of tokens, of the text that selected, after which the compact
            model chooses the same next token as the dense model.
        kl: on that text, KL from the dense model, nats per token.
        router_mass: on that text, share of the router's gate weights that the kept
            experts had.
        notes: anything else that a file says.
    """

    selector: str | None = None
    allocation: str | None = None
    keep: float | None = None
    instruction: str | None = None
    task: str | None = None
    model: str | None = None
    made: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    slicing: str | None = None
    requantised_layers: int | None = None
    requantisation_kl: float | None = None
    agreement: float | None = None
    kl: float | None = None
    router_mass: float | None = None
    notes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Round what was measured as mask files do, so that a selection says the same
        before and after it was saved.
        """
        for name in ("requantisation_kl", "agreement", "kl", "router_mass"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, float(f"{value:.4g}"))

    @property
    def predicted(self) -> bool:
        """Whether the scores are a trained predictor's."""
        return "predictor" in (self.selector, (self.made or {}).get("selector"))

    def as_text(self) -> dict[str, str]:
        """Return what is known, in words, by the names that mask files have for it."""
        found = dict(self.notes)
        for name, key in FILE_KEYS.items():
            value = getattr(self, name)
            if isinstance(value, dict):
                value = json.dumps(value)
            elif name == "requantisation_kl" and value is not None:
                value = f"{value:.4g} nats per token"
            elif isinstance(value, float):
                value = f"{value:.4g}"
            if value is not None:
                found[key] = str(value)
        return found

    @staticmethod
    def from_text(text: dict[str, str]) -> "Origin":
        """Return the origin that :meth:`as_text` put into words."""
        notes, known = dict(text), {}
        for name, key in FILE_KEYS.items():
            if (value := notes.pop(key, None)) is not None:
                known[name] = READ_AS.get(name, str)(value)
        return Origin(**known, notes=notes)


# What mask files call an Origin's fields, and how those that are no text are read.
FILE_KEYS = {name: name for name in ("selector", "allocation", "keep", "instruction")}
FILE_KEYS |= {name: name for name in ("task", "model", "made", "evaluation")}
FILE_KEYS |= {"slicing": "down_proj", "requantised_layers": "requantised layers"}
FILE_KEYS |= {"requantisation_kl": "requantisation KL"}
FILE_KEYS |= {"agreement": "agreement on what selected", "kl": "KL on what selected"}
FILE_KEYS |= {"router_mass": "router mass on what selected"}
READ_AS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("keep", "agreement", "kl", "router_mass"), float),
    "made": json.loads,
    "evaluation": json.loads,
    "requantised_layers": int,
    "requantisation_kl": lambda text: float(text.split()[0]),
}


@dataclass(frozen=True, eq=False)
class Selection:
    """Which units (FFN channels, or experts) are kept, layer by layer.

    Attributes:
        indices: ``L`` arrays, int32 ``[k_l]``, sorted ascending.
        gates: ``L`` arrays, float32 ``[k_l]``, multiplied onto the kept channels,
            or ``None`` when every kept channel has weight 1.
        channels: ``F``, the width of the dense FFN; of experts, how many there are.
        origin: how it was made.
        fingerprint: float16 ``[D]``, the final norm's weights of the model it was
            made for, or ``None`` when unknown.
        text: token ids of a task's examples or of an instruction, from which the kept
            channels can learn to make up for the dropped ones, or ``None``.
        compensation: by which text they do so; ``None`` if they do not.
        trained: how the weights that it came with were trained further, in words, or
            ``None``.
        unit: what is kept or dropped.
        adapter: the digest of the adapter that was fused into the model it was made
            with, 12 hex digits; ``None`` without one.
    """

    indices: tuple[mx.array, ...] = field(repr=False)
    gates: tuple[mx.array, ...] | None = field(repr=False)
    channels: int
    origin: Origin = Origin()
    fingerprint: mx.array | None = field(default=None, repr=False)
    text: tuple[int, ...] | None = field(default=None, repr=False)
    compensation: Compensation | None = None
    trained: str | None = None
    unit: Literal["channel", "expert"] = "channel"
    adapter: str | None = None

    @property
    def sizes(self) -> list[int]:
        """Kept units ``k_l`` of every layer."""
        return [index.size for index in self.indices]

    @property
    def target_size(self) -> int | None:
        """``k`` when it is the same in every layer, else ``None`` (ragged)."""
        return self.sizes[0] if len(set(self.sizes)) == 1 else None

    @property
    def share(self) -> float:
        """The kept share of all units."""
        return sum(self.sizes) / (self.channels * len(self.sizes))

    @property
    def compensates(self) -> bool:
        """Whether kept channels make up for dropped ones."""
        return self.compensation is not None

    def compensated(
        self,
        tokens: Sequence[int] | None = None,
        source: str = "the task's examples",
        *,
        sketch: str | None = SKETCH_VERSION,
    ) -> "Selection":
        """Return the same channels, compensated.

        Args:
            tokens: ``T`` ids that show how; default: its own ``text``, if there is one.
            source: what they are, in words.
            sketch: which sketch of the calibration text is used with them; ``None`` for
                none, as in version 0.1.

        Raises:
            ValueError: if there is no text, or it keeps experts, or has gates from
                training, which compensation does not know.
        """
        text = self.text if tokens is None else tuple(tokens)
        self._check_compensable()
        if text is None:
            raise ValueError(
                f"The mask {self.mask_id} carries no text that could show how to "
                "compensate; leave compensate out, or use the mask of a task, which "
                "has one."
            )
        how = Compensation(source, len(text), digest_of_text(text), sketch)
        return replace(self, text=text, compensation=how)

    def as_text(self) -> dict[str, str]:
        """Return in words how it was made, and the weights that it came with."""
        said = self.origin.as_text()
        if (how := self.compensation) is not None:
            said[COMPENSATED_BY] = f"{how.tokens} tokens of {how.source}"
        if self.trained is not None:
            said[TRAINED_BY] = self.trained
        if self.adapter is not None:
            said[ADAPTER] = self.adapter
        return said

    def plain(self) -> "Selection":
        """Return the same units, neither compensated nor trained further."""
        if self.compensation is None and self.trained is None:
            return self
        return replace(self, compensation=None, trained=None)

    def check_reproducible(self) -> None:
        """Raise ``ValueError`` if the weights that this selection came with cannot be
        made again from it: its text is not there, or they were trained.
        """
        if self.trained is not None:
            raise ValueError(
                f"The mask {self.mask_id} is of weights that were trained further "
                f"({self.trained}), so they cannot be made from it: use the folder it "
                f"came with as it is, or its {self.unit}s alone (--no-compensate, "
                "Selection.plain)."
            )
        how = self.compensation
        if how:
            self._check_compensable()
        if how and how.sketch not in (None, SKETCH_VERSION):
            raise ValueError(
                f"The mask {self.mask_id} is of weights compensated beside the sketch "
                f"{how.sketch} of a calibration text, and this version has "
                f"{SKETCH_VERSION}: use the folder it came with as it is, or its channels "
                "uncompensated (--no-compensate, Selection.plain)."
            )
        if how and (self.text is None or digest_of_text(self.text) != how.digest):
            raise ValueError(
                f"The mask {self.mask_id} is of weights compensated by {how.tokens} "
                f"tokens of {how.source}, which are not in its file, so those weights "
                "cannot be made from it: use the folder it came with as it is, or its "
                "channels uncompensated (--no-compensate, Selection.plain)."
            )

    def _check_compensable(self) -> None:
        if self.unit == "expert":
            raise ValueError(
                f"The mask {self.mask_id} keeps experts, which cannot make up for dropped "
                "ones; leave compensate out (--no-compensate, Selection.plain)."
            )
        if self.gates is not None:
            raise ValueError(
                f"The mask {self.mask_id} has gates from training, which compensation "
                "does not know; leave compensate out (--no-compensate, Selection.plain)."
            )

    @cached_property
    def mask_id(self) -> str:
        """12 hex digits: a stable hash of indices and gates, equal across machines."""
        digest = hashlib.sha256()
        for layer, index in enumerate(self.indices):
            digest.update(np.array([layer, index.size], dtype="<i4").tobytes())
            digest.update(np.array(index).astype("<i4").tobytes())
            if self.gates is not None:
                digest.update(np.array(self.gates[layer]).astype("<f4").tobytes())
        return digest.hexdigest()[:12]

    @property
    def identity(self) -> str:
        """12 hex digits: a hash of all that decides the compact model's weights, by
        which caches tell compact models apart; it is the ``mask_id`` if channels and
        gates alone decide them.
        """
        how = self.compensation
        plain = how is None and self.trained is None and self.unit == "channel"
        if plain and self.adapter is None:
            return self.mask_id
        decides: list[Any] = [self.mask_id, self.unit, self.trained]
        decides += [] if how is None else [how.tokens, how.digest]
        decides += [how.sketch] if how is not None and how.sketch else []
        decides += [] if self.adapter is None else ["adapter", self.adapter]
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:12]

    def mask(self) -> mx.array:
        """Return the selection as a dense mask, float32 ``[L, F]``."""
        mask = np.zeros((len(self.indices), self.channels), dtype=np.float32)
        for layer, index in enumerate(self.indices):
            value = 1.0 if self.gates is None else np.array(self.gates[layer])
            mask[layer, np.array(index)] = value
        return mx.array(mask)

    def save(
        self, path: str | os.PathLike[str], *, scores: mx.array | None = None
    ) -> None:
        """Write a mask file (safetensors); an existing file is replaced.

        Args:
            path: the file.
            scores: ``[L, F]`` that the selection was made from, to be kept with it
                in float16; :meth:`load` does not return them.
        """
        from safetensors.numpy import save

        arrays = {}
        for layer, index in enumerate(self.indices):
            arrays[f"layers.{layer}.indices"] = np.array(index)
            if self.gates is not None:
                arrays[f"layers.{layer}.gates"] = np.array(self.gates[layer])
        if self.fingerprint is not None:
            arrays["fingerprint"] = np.array(self.fingerprint)
        if self.text is not None:
            arrays["text"] = np.array(self.text, dtype=np.int32)
        if scores is not None:
            arrays["scores"] = np.array(scores).astype(np.float16)
        about = {
            "format": MASK_FORMAT,
            "mask_id": self.mask_id,
            "channels": str(self.channels),
            "unit": self.unit,
        }
        if self.compensation is not None:
            about[TEXT_DIGEST] = self.compensation.digest
            if self.compensation.sketch:
                about[SKETCH] = self.compensation.sketch
        with new_file(path) as scratch:
            scratch.write_bytes(save(arrays, self.as_text() | about))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Selection":
        """Read a mask file written by :meth:`save`.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not a mask file, or is damaged.
        """
        return _read_mask_file(path_of(path))

    def check_fits(self, layers: int, channels: int, fingerprint: mx.array) -> None:
        """Raise ``ValueError`` unless this selection was made for that model.

        Two models of one shape are told apart by their final norm, which neither a
        change of dtype nor quantisation touches by more than a rounding.

        Args:
            layers: ``L`` of the model.
            channels: ``F`` of the model.
            fingerprint: float16 ``[D]``, final norm's weights of the model.
        """
        made_for, here = (len(self.indices), self.channels), (layers, channels)
        if made_for != here:
            raise ValueError(
                f"The mask {self.mask_id} is for a model with {made_for[0]} layers of "
                f"{made_for[1]} {self.unit}s, but this one has {here[0]} layers of "
                f"{here[1]}; use a mask made with this model."
            )
        if self.fingerprint is None:
            return
        if self.fingerprint.shape != fingerprint.shape or not mx.allclose(
            self.fingerprint.astype(mx.float32),
            fingerprint.astype(mx.float32),
            rtol=0.02,
            atol=1e-3,
        ):
            raise ValueError(
                f"The mask {self.mask_id} was made for another model of the same "
                "shape (their final norms differ); use a mask made with this model."
            )


def digest_of_text(tokens: Sequence[int]) -> str:
    """Return a hash of a text's token ids, 16 hex digits."""
    ids = np.array(tokens, dtype="<i4").tobytes()
    return hashlib.sha256(ids).hexdigest()[:16]


def find_mask(name: str, folders: Sequence[Path]) -> Path:
    """Return the mask file of a task in the first of ``folders`` that has it.

    Raises:
        FileNotFoundError: if none has it, naming the tasks there are.
    """
    for folder in folders:
        path = folder / f"{name}.safetensors"
        if os.path.isfile(
            path
        ):  # False, and no error, for a name that no file can have
            return path
    known = {file.stem for folder in folders for file in folder.glob("*.safetensors")}
    where = " or ".join(map(str, folders))
    raise FileNotFoundError(
        f"There is no task {name!r} in {where}; the tasks there are "
        f"{', '.join(sorted(known)) or 'none'}: make one with python -m ifp_mlx.tasks."
    )


def _read_mask_file(path: Path) -> Selection:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"There is no mask file {path}.")
    try:
        with safe_open(path, framework="numpy") as file:
            info = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable mask file: {error}.") from error
    if info.pop("format", None) != MASK_FORMAT:
        raise ValueError(
            f"{path} is not a mask file; one is written by Selection.save or --save-mask."
        )
    try:
        selection = _assemble(arrays, info)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged: {error!r}; make the mask again."
        ) from error
    if selection.mask_id != info.get("mask_id"):
        raise ValueError(
            f"{path} is damaged: its content does not match its mask_id; make the "
            "mask again."
        )
    return selection


def _assemble(arrays: dict[str, np.ndarray], info: dict[str, str]) -> Selection:
    about = dict(info)
    channels, unit = int(about.pop("channels")), about.pop("unit", "channel")
    adapter = about.pop(ADAPTER, None)
    layers = sum(name.endswith(".indices") for name in arrays)
    has_gates = "layers.0.gates" in arrays
    indices, gates = [], []
    for layer in range(layers):
        index = arrays[f"layers.{layer}.indices"]
        increasing = index.size == 1 or bool((np.diff(index) > 0).all())
        if not increasing or index[0] < 0 or index[-1] >= channels:
            raise IndexError(f"layer {layer} has unsorted or impossible indices")
        indices.append(mx.array(index.astype(np.int32)))
        if has_gates:
            gate = arrays[f"layers.{layer}.gates"]
            if gate.shape != index.shape:
                raise IndexError(
                    f"layer {layer} has {gate.size} gates for {index.size}"
                )
            gates.append(mx.array(gate.astype(np.float32)))
    fingerprint, text = arrays.get("fingerprint"), arrays.get("text")
    tokens = None if text is None else tuple(text.tolist())
    compensation, trained = _compensation(about, tokens), about.pop(TRAINED_BY, None)
    about.pop("mask_id", None)
    return Selection(
        tuple(indices),
        tuple(gates) if has_gates else None,
        channels,
        Origin.from_text(about),
        None if fingerprint is None else mx.array(fingerprint),
        tokens,
        compensation,
        trained,
        cast(Any, unit),
        adapter,
    )


def _compensation(
    about: dict[str, str], text: tuple[int, ...] | None
) -> Compensation | None:
    """Take out of a file's words how its weights are compensated."""
    said, digest = about.pop(COMPENSATED_BY, None), about.pop(TEXT_DIGEST, None)
    sketch = about.pop(SKETCH, None)
    if said is None:
        return None
    count, _, source = said.partition(" tokens of ")
    if digest is None:  # version 0.1 left it to the text
        digest = "" if text is None else digest_of_text(text)
    return Compensation(source, int(count), digest, sketch)
