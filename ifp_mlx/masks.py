"""Scores to a Selection: soft top-k, hard top-k, widths per layer, mask files."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import mlx.core as mx
import numpy as np

from .atomic import new_file

Allocation = Literal["uniform", "first-layer", "sensitivity"]
ALLOCATIONS: tuple[Allocation, ...] = ("uniform", "first-layer", "sensitivity")
MASK_FORMAT = "ifp_mlx.mask.1"

# The kept shares of F at which a layer's sensitivity is measured.
MEASURED_SHARES = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)
COMPENSATED = "compensated by"
LEAST_SHARE = 0.125  # that every layer keeps under the allocation by sensitivity


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


def select(
    scores: mx.array,
    sizes: Sequence[int],
    *,
    granularity: int = 1,
    gates: Literal["binary", "soft"] = "binary",
    temperature: float = 1.0,
) -> Selection:
    """Keep the highest-scored channels of every layer.

    Equal scores are decided in favour of the lower index, so that the same scores
    give the same selection everywhere.

    Args:
        scores: ``[L, F]``.
        sizes: kept channels ``k_l`` per layer, multiples of ``granularity``.
        granularity: channels per selectable block; a block's score is its mean.
        gates: ``"soft"`` keeps λ of :func:`soft_top_k` on the kept channels.
        temperature: of the soft top-k, in units of the scores.

    Raises:
        ValueError: if the scores are not finite.

    Source: Hou et al. 2025 (arXiv:2501.02086) eq. 3, ``m = λ ⊙ Top(λ, k)``.
    """
    L, F = scores.shape
    if not mx.all(mx.isfinite(scores)):
        raise ValueError("The channel scores hold NaN or infinity; check the weights.")
    blocks = scores.astype(mx.float32).reshape(L, F // granularity, granularity)
    block_scores = np.array(blocks.mean(axis=-1))
    indices, values = [], []
    for layer, k in enumerate(sizes):
        order = np.argsort(-block_scores[layer], kind="stable")
        kept = np.sort(order[: k // granularity])
        channels = (kept[:, None] * granularity + np.arange(granularity)).ravel()
        indices.append(mx.array(channels.astype(np.int32)))
        if gates == "soft":
            soft = soft_top_k(
                mx.array(block_scores[layer]), k // granularity, temperature
            )
            values.append(mx.repeat(soft[mx.array(kept)], granularity))
    return Selection(tuple(indices), tuple(values) if gates == "soft" else None, F)


def soft_top_k(scores: mx.array, k: int, temperature: float = 1.0) -> mx.array:
    """Relax top-k to λ in [0, 1] with the sum over channels held at ``k``.

    λ = min(1, exp((s − τ) / temperature)). With the scores sorted, τ has a closed
    form for every possible number of saturated channels; the first that is
    consistent is the solution. Gradients flow through τ and respect the budget.

    Args:
        scores: masking scores s, ``[..., F]``; computed in float32.
        k: channels to keep, ``0 < k <= F``.
        temperature: ε; smaller is closer to a hard top-k.

    Returns:
        λ, ``[..., F]`` float32.

    Raises:
        ValueError: if ``k`` is outside ``(0, F]``.

    Source: the fixed point of the coordinate descent in Lei et al. 2023
    (arXiv:2304.04947), which Hou et al. 2025 (arXiv:2501.02086) use in eq. 3.
    """
    F = scores.shape[-1]
    if not 0 < k <= F:
        raise ValueError(f"k={k} must be between 1 and the {F} channels.")
    if k == F:
        return mx.ones(scores.shape)
    s = scores.astype(mx.float32) / temperature
    fixed = mx.stop_gradient(s)
    order = mx.argsort(-fixed, axis=-1)
    descending = mx.take_along_axis(fixed, order, axis=-1)[..., :k]
    tail = mx.logcumsumexp(
        mx.take_along_axis(fixed, order, axis=-1), axis=-1, reverse=True
    )
    tau_if = tail[..., :k] - mx.log(k - mx.arange(k, dtype=mx.float32))
    saturated = mx.argmax(descending <= tau_if, axis=-1, keepdims=True)
    rank = mx.argsort(order, axis=-1)
    free = rank >= saturated
    tau = mx.logsumexp(mx.where(free, s, -mx.inf), axis=-1, keepdims=True)
    tau = tau - mx.log((k - saturated).astype(mx.float32))
    return mx.where(free, mx.exp(mx.where(free, s - tau, 0.0)), 1.0)


def target_size(channels: int, keep: float, granularity: int = 1) -> int:
    """Return ``k`` for a kept share of ``F``, rounded to the granularity.

    Args:
        channels: ``F``.
        keep: kept share, ``0 < keep <= 1``.
        granularity: channels per selectable block.

    Raises:
        ValueError: if ``keep`` is outside ``(0, 1]``.
    """
    if not 0 < keep <= 1:
        raise ValueError(
            f"keep={keep} is not a share of the channels; choose a number above 0 "
            "and up to 1 (1 keeps them all)."
        )
    return max(1, round(keep * channels / granularity)) * granularity


def layer_sizes(
    k: int,
    layers: int,
    channels: int,
    allocation: Allocation,
    granularity: int = 1,
    costs: mx.array | None = None,
) -> list[int]:
    """Return the kept channels of every layer; their total is at most ``L * k``.

    Args:
        k: kept channels per layer on average, a multiple of ``granularity``.
        layers: ``L``.
        channels: ``F``.
        allocation: ``uniform`` (the paper's rule); ``first-layer``: layer 0 is kept
            whole and the others share what is left of the same total; or
            ``sensitivity``: a layer loses the less, the higher its ``costs``.
        granularity: channels per selectable block.
        costs: ``[L, 6]``, what it costs to prune a layer alone to each of
            ``MEASURED_SHARES``, nats; needed by ``sensitivity``.

    Raises:
        ValueError: if ``k`` does not fit the channels, the granularity or the
            allocation.
    """
    check_multiple(k, granularity, channels)
    if allocation not in ALLOCATIONS:
        raise ValueError(
            f"allocation={allocation!r} is unknown; choose {' or '.join(ALLOCATIONS)}."
        )
    if allocation == "uniform" or layers == 1:
        return [k] * layers
    if allocation == "sensitivity":
        if costs is None:
            raise ValueError(
                "The allocation sensitivity needs a measurement of this model, minutes "
                "once: run python -m ifp_mlx.sensitivity --model with its folder."
            )
        return _sizes_by_cost(k, channels, granularity, np.array(costs))
    rest = (layers * k - channels) // (layers - 1) // granularity * granularity
    if rest < granularity:
        raise ValueError(
            f"{k} channels in each of {layers} layers do not pay for a whole first "
            f"layer of {channels}; keep more, or use the allocation uniform."
        )
    return [channels] + [rest] * (layers - 1)


def _sizes_by_cost(
    k: int, channels: int, granularity: int, costs: np.ndarray
) -> list[int]:
    """Let every layer lose channels in inverse proportion to what that costs there.

    Costs are known at this budget, of one layer at a time. Taking channels where they
    are cheapest, by the whole curves, would empty some layers; together they cost far
    more than each alone.
    """
    blocks, budget = channels // granularity, k // granularity
    most = blocks - max(1, min(budget, round(LEAST_SHARE * blocks)))
    cost = np.array([np.interp(k / channels, MEASURED_SHARES, row) for row in costs])
    ease = 1 / np.maximum(cost, max(1e-3 * cost.max(), 1e-9))
    wanted = len(costs) * (blocks - budget)
    full = np.zeros(len(costs), dtype=bool)  # layers that can lose no more
    while True:
        rest = wanted - most * full.sum()
        lost = np.where(full, most, ease * rest / max(ease[~full].sum(), 1e-9))
        if not (over := ~full & (lost > most)).any():
            break
        full |= over
    whole = np.floor(lost + 1e-9).astype(int)
    nearest = np.argsort(whole - lost, kind="stable")
    whole[nearest[: wanted - whole.sum()]] += 1
    return [int(size) for size in (blocks - whole) * granularity]


def check_multiple(k: int, granularity: int, channels: int) -> None:
    """Raise ``ValueError`` naming the nearest valid ``k`` unless ``k`` fits.

    Args:
        k: kept channels per layer.
        granularity: channels per selectable block.
        channels: ``F``.
    """
    if not 0 < k <= channels:
        raise ValueError(
            f"target_size={k} must be between 1 and the {channels} channels of a layer."
        )
    if k % granularity:
        below = k // granularity * granularity
        valid = [v for v in (below, below + granularity) if 0 < v <= channels]
        raise ValueError(
            f"target_size={k} is not a multiple of the group of {granularity} "
            f"channels; use {' or '.join(map(str, valid))}."
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
