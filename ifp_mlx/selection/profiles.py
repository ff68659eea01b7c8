"""Lists of experts per layer, as other tools write them.

A profile is JSON that says which experts of a mixture are kept, or how they rank. Layers
go by their number in the whole model, dense layers counted, and experts by their number
in the whole model too. These forms are known, each as it was seen in code or on a page:

``llm-compressor``: ``{"model.layers.3.mlp": [0, 5], ...}``, those kept. ``report_path`` of
its REAPPruningModifier (vllm-project/llm-compressor, @ab1ba3e).

``llm-compressor scores``: ``{"saliency": [[0.1, ...], ...]}``, a number for each expert, in
the order of the layers that have any; read, not written. Its ExpertPruner (@44f09e9).

``reap``: ``{"3": [0, 5], ...}``, those kept; read inside ``"layers"``, ``"pinned_experts"``
or ``"kept_experts"`` too. What oMLX's page on SSD expert streaming calls an official REAP
map (jundot/omlx, omlx/expert_streaming/manifest.py, @cc6d213).

``vllm``: ``{"version": 1, "pruned_experts": [[3, 7], ...]}``, pairs of a layer and an expert
that is dropped there. Pull requests 37824 (which adds version 2) and 42613 of
vllm-project/vllm; not merged.

``mlx-moe``: ``{"layers": {"3": {"activation_counts": {"0": 20, ...}}}, ...}``, how many
prompts used an expert, so a ranking. Its benchmarks/profile_experts.py and
persistence.py (mu-hashmi/flash-moe, @1af8ec8, since renamed to mlx-moe).

The code of the REAP paper (CerebrasResearch/reap, @1970473) writes no list: it keeps what
it observed as a torch file, and the pruned model.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from .masks import Selection
from .top_k import select

REMEDY = "use a profile of this model"
HUGE = 1e30  # larger than any saliency or count


@dataclass(frozen=True)
class Profile:
    """What a profile says of a model's layers that have experts.

    Attributes:
        form: what it was read as.
        scores: float32 ``[L, E]``; of a list, 1 for those kept and 0 for the others; of
            a ranking, shares of a layer's largest number.
        sizes: how many each layer keeps, or ``None`` where experts are only ranked.
    """

    form: str
    scores: np.ndarray
    sizes: list[int] | None

    def selection(self) -> Selection:
        """Return the experts that are kept, where the profile says which."""
        assert self.sizes is not None, "a ranking keeps what is asked for"
        return replace(select(mx.array(self.scores), self.sizes), unit="expert")


class _Layers:
    """The layers of a model that have experts."""

    def __init__(self, paths: Sequence[str], experts: int) -> None:
        self.paths, self.experts = paths, experts
        self.numbers = [_number(path) for path in paths]

    def in_order(self, said: dict[str, Any]) -> list[Any]:
        """Return what a profile says of every layer, in the model's order."""
        found: dict[int, Any] = {}
        for name, value in said.items():
            number = self.known(name)
            if number in found:
                raise ValueError(f"The profile names layer {number} twice; correct it.")
            found[number] = value
        if missing := [n for n in self.numbers if n not in found]:
            raise ValueError(
                f"The profile says nothing of layer {missing[0]}, and this model has "
                f"experts in layers {self}; {REMEDY}."
            )
        return [found[number] for number in self.numbers]

    def known(self, name: Any) -> int:
        """Return the number of a layer that a profile names."""
        if (number := _number(str(name))) not in self.numbers:
            raise ValueError(
                f"The profile names the layer {_short(name)}, and this model has experts "
                f"in layers {self}; {REMEDY}."
            )
        return number

    def mask(self, lists: list[Any]) -> np.ndarray:
        """Return lists of experts, one for each layer, as ``[L, E]`` of 0 and 1."""
        mask = np.zeros((len(lists), self.experts), dtype=np.float32)
        for row, number, ids in zip(mask, self.numbers, lists, strict=True):
            if not isinstance(ids, list):
                raise ValueError(
                    f"The profile has {_short(ids)} for layer {number}, where a list of "
                    "experts belongs."
                )
            for expert in ids:
                self.check(number, expert)
                if row[expert]:
                    raise ValueError(
                        f"The profile lists expert {expert} of layer {number} twice; "
                        "correct it."
                    )
                row[expert] = 1
        return mask

    def check(self, number: int, expert: Any) -> None:
        """Raise ``ValueError`` unless this is the number of an expert."""
        if type(expert) is not int or not 0 <= expert < self.experts:
            raise ValueError(
                f"The profile names the expert {_short(expert)} of layer {number}, and "
                f"this model's are 0 to {self.experts - 1}; {REMEDY}."
            )

    def __str__(self) -> str:
        first, last = self.numbers[0], self.numbers[-1]
        if self.numbers == [*range(first, last + 1)]:
            return f"{first} to {last}"
        return ", ".join(map(str, self.numbers))


def read(text: str | bytes, paths: Sequence[str], experts: int) -> Profile:
    """Read a profile of any form.

    Args:
        text: of the file.
        paths: where in the model the layers are that have experts, ``L`` names.
        experts: ``E``, how many there are in each.

    Raises:
        ValueError: if it is no profile, or not one of such a model.
    """
    data, layers = _parsed(text), _Layers(paths, experts)
    form = _form_of(data)
    found = _READERS[form](data, layers)
    if form in _RANKINGS:
        largest = np.abs(found).max(axis=1, keepdims=True)
        return Profile(form, found / np.where(largest > 0, largest, 1), None)
    sizes = [int(row.sum()) for row in found]
    if 0 in sizes:
        raise ValueError(
            f"The profile keeps no expert of layer {layers.numbers[sizes.index(0)]}; "
            "make one that keeps some in every layer."
        )
    return Profile(form, found, sizes)


def write(selection: Selection, paths: Sequence[str], form: str) -> str:
    """Return a selection of experts as the text of a profile.

    Args:
        selection: of experts.
        paths: where in the model its layers are.
        form: one of :data:`FORMS`.

    Raises:
        ValueError: if the selection is of channels.
    """
    if selection.unit != "expert":
        raise ValueError(
            f"The mask {selection.mask_id} keeps {selection.unit}s, and a profile is a "
            "list of experts; use the mask of a mixture."
        )
    layers = _Layers(paths, selection.channels)
    kept: list[Any] = [index.tolist() for index in selection.indices]
    return json.dumps(_WRITERS[form](kept, layers)) + "\n"


def _parsed(text: str | bytes) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        [(name, times)] = Counter(name for name, _ in pairs).most_common(1) or [("", 0)]
        if times > 1:
            raise ValueError(f"The profile says {name!r} twice; correct it.")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=once)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(
            f"A profile is JSON, and this is none ({error}); the forms that are read are "
            f"{', '.join(_READERS)}."
        ) from error


def _form_of(data: Any) -> str:
    """Return which form a profile has, by the names in it."""
    if isinstance(data, dict) and data:
        if "pruned_experts" in data:
            return "vllm"
        if "saliency" in data:
            return "llm-compressor scores"
        inside = _unwrapped(data)
        if isinstance(inside, dict):
            about = [value for value in inside.values() if isinstance(value, dict)]
            if any("activation_counts" in value for value in about):
                return "mlx-moe"
            if not about and any(_number(name) >= 0 for name in inside):
                return "reap" if all(map(str.isdecimal, inside)) else "llm-compressor"
    raise ValueError(
        f"This JSON is no profile of experts that is known here; the forms that are read "
        f"are {', '.join(_READERS)}."
    )


def _unwrapped(data: dict[str, Any]) -> Any:
    wrappers = ("layers", "pinned_experts", "kept_experts")
    return next((data[name] for name in wrappers if name in data), data)


def _read_kept(data: dict[str, Any], layers: _Layers) -> np.ndarray:
    return layers.mask(layers.in_order(_unwrapped(data)))


def _read_scores(data: dict[str, Any], layers: _Layers) -> np.ndarray:
    rows = data["saliency"]
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise ValueError(
            f"The profile has {_short(rows)} where a list of numbers for each layer "
            "belongs."
        )
    here = (len(layers.paths), layers.experts)
    lengths = {len(row) for row in rows}
    if len(rows) != here[0] or lengths != {here[1]}:
        raise ValueError(
            f"The profile has scores of {len(rows)} layers with "
            f"{' or '.join(map(str, sorted(lengths))) or 'no'} experts, and this model has "
            f"{here[0]} layers with {here[1]}; {REMEDY}."
        )
    return np.array([[_score(value) for value in row] for row in rows], np.float32)


def _read_dropped(data: dict[str, Any], layers: _Layers) -> np.ndarray:
    version, mode = data.get("version"), data.get("routing_mode")
    if (version, mode) not in ((1, None), (2, "pre_topk_mask")):
        raise ValueError(
            f"The profile has version {version!r} and routing_mode {mode!r}; read are "
            "version 1, and 2 with the mode pre_topk_mask, in which the router chooses "
            "among the experts that are left."
        )
    pairs = data["pruned_experts"]
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in pairs
    ):
        raise ValueError(
            f"The profile has {_short(pairs)} for pruned_experts, where pairs of a layer "
            "and an expert belong."
        )
    dropped: dict[int, list[Any]] = {number: [] for number in layers.numbers}
    for layer, expert in pairs:
        dropped[layers.known(layer)].append(expert)
    return 1 - layers.mask([dropped[number] for number in layers.numbers])


def _read_counts(data: dict[str, Any], layers: _Layers) -> np.ndarray:
    experts = data.get("num_experts", layers.experts)
    if experts != layers.experts:
        raise ValueError(
            f"The profile is of a model with {experts} experts a layer, and this one has "
            f"{layers.experts}; {REMEDY}."
        )
    scores = np.zeros((len(layers.paths), layers.experts), dtype=np.float32)
    said = layers.in_order(_unwrapped(data))
    for row, number, about in zip(scores, layers.numbers, said, strict=True):
        counts = about.get("activation_counts") if isinstance(about, dict) else about
        if not isinstance(counts, dict):
            raise ValueError(
                f"The profile has {_short(counts)} for the activation_counts of layer "
                f"{number}, where a number for each expert belongs."
            )
        for name, count in counts.items():
            expert = int(name) if name.isascii() and name.isdecimal() else name
            layers.check(number, expert)
            row[expert] = _score(count)
    return scores


def _score(value: Any) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        if -HUGE < value < HUGE:
            return float(value)
    raise ValueError(
        f"The profile has the score {_short(value)}, which is no finite number; make it "
        "again."
    )


def _write_by_path(kept: list[list[int]], layers: _Layers) -> dict[str, Any]:
    return dict(zip(layers.paths, kept, strict=True))


def _write_by_number(kept: list[list[int]], layers: _Layers) -> dict[str, Any]:
    return dict(zip(map(str, layers.numbers), kept, strict=True))


def _write_dropped(kept: list[list[int]], layers: _Layers) -> dict[str, Any]:
    pairs = [
        [number, expert]
        for number, ids in zip(layers.numbers, kept, strict=True)
        for expert in sorted({*range(layers.experts)} - {*ids})
    ]
    return {"version": 1, "pruned_experts": pairs}


def _write_counts(kept: list[list[int]], layers: _Layers) -> dict[str, Any]:
    """Return counts as if one prompt had used the kept experts."""
    said = {
        str(number): {
            "universal": ids,
            "activation_counts": {str(expert): 1 for expert in ids},
            "total_unique": len(ids),
        }
        for number, ids in zip(layers.numbers, kept, strict=True)
    }
    about = {"num_prompts": 1, "threshold": 1.0, "capacity": max(map(len, kept))}
    about |= {"num_experts": layers.experts, "moe_layers": len(kept)}
    return about | {"layers": said}


def _number(name: str) -> int:
    """Return the number in a layer's name, -1 unless there is just one."""
    found = [s for s in name.split(".") if s.isascii() and s.isdecimal()]
    return int(found[0]) if len(found) == 1 else -1


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


_READERS: dict[str, Callable[[Any, _Layers], np.ndarray]] = {
    "llm-compressor": _read_kept,
    "llm-compressor scores": _read_scores,
    "reap": _read_kept,
    "vllm": _read_dropped,
    "mlx-moe": _read_counts,
}
_RANKINGS = {"llm-compressor scores", "mlx-moe"}
_WRITERS: dict[str, Callable[[list[list[int]], _Layers], dict[str, Any]]] = {
    "llm-compressor": _write_by_path,
    "reap": _write_by_number,
    "vllm": _write_dropped,
    "mlx-moe": _write_counts,
}
FORMS = tuple(_WRITERS)
