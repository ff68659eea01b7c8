"""A Selection, its identity, and the mask file it is kept in."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..files.atomic import new_file

MASK_FORMAT = "ifp_mlx.mask.1"


COMPENSATED = "compensated by"


@dataclass(frozen=True, eq=False)
class Selection:
    """Which FFN channels are kept, layer by layer.

    Attributes:
        indices: ``L`` arrays, int32 ``[k_l]``, sorted ascending.
        gates: ``L`` arrays, float32 ``[k_l]``, multiplied onto the kept channels,
            or ``None`` when every kept channel has weight 1.
        channels: ``F``, the width of the dense FFN.
        info: how it was made (selector, allocation, instruction, ...), free text;
            ``compensated by`` is there if it :attr:`compensates`.
        fingerprint: float16 ``[D]``, the final norm's weights of the model it was
            made for, or ``None`` when unknown.
        text: token ids of a task's examples or of an instruction, from which the kept
            channels can learn to make up for the dropped ones, or ``None``.
    """

    indices: tuple[mx.array, ...] = field(repr=False)
    gates: tuple[mx.array, ...] | None = field(repr=False)
    channels: int
    info: dict[str, str] = field(default_factory=dict)
    fingerprint: mx.array | None = field(default=None, repr=False)
    text: tuple[int, ...] | None = field(default=None, repr=False)

    @property
    def sizes(self) -> list[int]:
        """Kept channels ``k_l`` of every layer."""
        return [index.size for index in self.indices]

    @property
    def target_size(self) -> int | None:
        """``k`` when it is the same in every layer, else ``None`` (ragged)."""
        return self.sizes[0] if len(set(self.sizes)) == 1 else None

    @property
    def compensates(self) -> bool:
        """Whether kept channels make up for dropped ones, as ``text`` shows."""
        return self.text is not None and COMPENSATED in self.info

    def compensated(
        self, tokens: Sequence[int] | None = None, source: str = "the task's examples"
    ) -> "Selection":
        """Return the same channels, compensated.

        Args:
            tokens: ``T`` ids that show how; default: its own ``text``, if there is one.
            source: what they are, in words.
        """
        text = self.text if tokens is None else tuple(tokens)
        assert text is not None
        how = {COMPENSATED: f"{len(text)} tokens of {source}"}
        return replace(self, text=text, info=self.info | how)

    def plain(self) -> "Selection":
        """Return the same channels, not compensated."""
        info = {name: how for name, how in self.info.items() if name != COMPENSATED}
        return replace(self, info=info) if info != self.info else self

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
                in float16; :meth:`load` leaves them where they are.
        """
        from safetensors.numpy import save_file

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
        }
        with new_file(path) as scratch:
            save_file(arrays, scratch, metadata=self.info | about)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Selection":
        """Read a mask file written by :meth:`save`.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not a mask file, or is damaged.
        """
        return _read_mask_file(Path(path))

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
                f"{made_for[1]} channels, but this one has {here[0]} layers of "
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


def find_mask(name: str, folders: Sequence[Path]) -> Path:
    """Return the mask file of a task in the first of ``folders`` that has it.

    Raises:
        FileNotFoundError: if none has it, naming the tasks there are.
    """
    for folder in folders:
        if (path := folder / f"{name}.safetensors").is_file():
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
        selection = _assemble(arrays, int(info.pop("channels")), info)
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged: {error!r}; make the mask again."
        ) from error
    if selection.mask_id != info.pop("mask_id", None):
        raise ValueError(
            f"{path} is damaged: its content does not match its mask_id; make the "
            "mask again."
        )
    return selection


def _assemble(
    arrays: dict[str, np.ndarray], channels: int, info: dict[str, str]
) -> Selection:
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
    return Selection(
        tuple(indices),
        tuple(gates) if has_gates else None,
        channels,
        info,
        None if fingerprint is None else mx.array(fingerprint),
        None if text is None else tuple(text.tolist()),
    )
