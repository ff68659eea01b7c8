"""Write a compact model as a plain folder that any mlx-lm program loads."""

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..files.atomic import new_folder, refuse_existing
from ..files.companions import UNKNOWN_LICENCE, copy_companions, licence_of
from ..files.progress import ProgressBar
from ..selection.masks import Selection
from ..selection.request import Request
from ..selection.widths import check_multiple
from ..slicing.shapes import dense_shapes
from ..slicing.sliced import count_units, pad
from ..slicing.stock import build
from .card import Card, load_card
from .checkpoint import IFPModel
from .decide import decide
from .requantisation import requantisation_cost

# The mask is a safetensors file without that ending, since some loaders take every file
# with it for weights, also in subfolders (mlx-swift-lm 3.31.4).
MASK_FILE = "ifp.mask"
UNTRAINED = (
    "They were selected without training the model further, unless the selector\n"
    "above is a trained predictor. The quality of this folder was not measured."
)
# What the dense model's card says goes into the README: a card file of its own would
# look like a measurement of this folder.
CURVE = """

The dense model has a card: {sample}, in which
each question selected for itself ({selector}). For each kept share the table says how often
the compact model would choose the same token, and for which kind of question it does so
least often. This folder keeps {share:.2g} and was not measured itself.

| kept | same token | least often |
|---|---|---|
{rows}"""
NAS_MULTIPLE = 256  # nemotron-nas rounds every FFN width up to this


@dataclass(frozen=True)
class Quantisation:
    """How a compact folder is quantised, in mlx-lm's words."""

    bits: int = 4
    group_size: int = 64
    mode: str = "affine"


def write_compact(
    model: IFPModel,
    selection: Selection,
    out: str | os.PathLike[str],
    *,
    compact: nn.Module | None = None,
    quantisation: Quantisation | None = None,
    progress: ProgressBar = iter,
) -> Path:
    """Write the selected units as an ordinary mlx-lm (and HF) folder.

    With the same number of units in every layer it is the source's own architecture
    with a smaller number in its config.json. Unequal widths need a stock architecture
    whose config can state them: llama-like models become ``nemotron-nas``, each layer
    padded with zero channels to a multiple of 256.

    Args:
        model: where the weights come from.
        selection: made with this model.
        out: the folder to make.
        compact: the selection's compact model if it is in memory; may be changed.
        quantisation: quantise the result, or leave it as the source is.
        progress: wraps the iteration over layers.

    Returns:
        ``out``. The folder also holds the mask file and a card (README.md). Both say
        whether a quantised ``down_proj`` had to be quantised again, and, except for a
        compensated selection, what that costs.

    Raises:
        FileExistsError: if ``out`` is there.
        ValueError: if the widths fit neither the architecture nor the quantisation.
    """
    out = Path(out)
    refuse_existing(out)
    check_can_write(model, selection.sizes, quantisation)
    card = load_card(model)
    if compact is None:
        compact = model.compact(selection, progress=progress)
    selection = _with_slicing(model, compact, selection, progress)
    said = UNTRAINED + _curve(card, selection)
    return _written(model, compact, selection, out, quantisation, said)


def write_requested(
    model: IFPModel,
    request: Request,
    out: str | os.PathLike[str],
    *,
    quantisation: Quantisation | None = None,
    progress: ProgressBar = iter,
) -> Path:
    """Select what a request asks for and :func:`write_compact` it.

    Args:
        model: where the weights come from.
        request: whose widths a plain folder can hold.
        out, quantisation, progress: see :func:`write_compact`.

    Raises:
        FileExistsError, ValueError: as :func:`write_compact`.
    """
    refuse_existing(Path(out))
    group = quantisation.group_size if quantisation else 1
    multiple = group if model.plan.unit == "channel" else 1
    options: dict[str, Any] = {"lasting": True, "multiple": multiple}
    decision = decide(request, model, **options, progress=progress)
    check_can_write(model, decision.sizes, quantisation)
    made = model.prepare(decision, progress=progress)
    how: dict[str, Any] = {"compact": made.model, "quantisation": quantisation}
    return write_compact(model, made.selection, out, **how, progress=progress)


def write_plain(
    model: IFPModel,
    compact: nn.Module,
    selection: Selection,
    out: Path,
    *,
    quantisation: Quantisation | None = None,
    said: str = UNTRAINED,
) -> Path:
    """Write a compact model that is in memory as :func:`write_compact` does.

    Args:
        model: what it was made from.
        compact: of the selection's widths; it may be changed, in place.
        selection: what it keeps.
        out: the folder to make.
        quantisation: quantise the result, or leave it as it is.
        said: the end of the card, which says how good the folder is.

    Raises:
        FileExistsError, ValueError: as :func:`write_compact`.
    """
    check_can_write(model, selection.sizes, quantisation)
    return _written(model, compact, selection, out, quantisation, said)


def _written(
    model: IFPModel,
    compact: nn.Module,
    selection: Selection,
    out: Path,
    quantisation: Quantisation | None,
    said: str,
) -> Path:
    """Do what :func:`write_plain` does, after its checks."""
    config = dict(model.config)
    if selection.target_size is not None:
        config = model.plan.resized(config, selection.target_size)
    else:
        config |= _as_nemotron_nas(compact, model)
        if config.get("rope_scaling") is None:  # transformers warns of a null here
            config.pop("rope_scaling", None)
    if quantisation is not None:
        compact, config = _quantise(compact, config, quantisation)
    with new_folder(out) as scratch:
        _write(compact, config, model.path, scratch)
        # Without the text it was made from: folders are passed on to others, and a
        # task's examples are its maker's own.
        replace(selection, text=None).save(scratch / MASK_FILE)
        card = _card(model, selection, quantisation, config, said)
        (scratch / "README.md").write_text(card, encoding="utf-8")
    return out


def _curve(card: Card | None, selection: Selection) -> str:
    """Return the dense model's curve for the compact folder's card; empty without one."""
    if card is None:
        return ""
    rows = []
    for keep in card.keeps():
        kind, least = card.worst(keep) or ("", 1.0)
        rows.append(f"| {keep:.2g} | {card.promise(keep):.0%} | {kind}, {least:.0%} |")
    about = {"sample": card.sample, "selector": card.selector}
    return CURVE.format(**about, share=selection.share, rows="\n".join(rows))


def _with_slicing(
    model: IFPModel, compact: nn.Module, selection: Selection, progress: ProgressBar
) -> Selection:
    """Note with the selection how a quantised ``down_proj`` was sliced, and the cost."""
    slicing = model.slicing(selection)
    if slicing == "not quantised":
        return selection
    about: dict[str, Any] = {"slicing": slicing}
    if slicing == "requantised" and not selection.compensates:
        about["requantised_layers"] = len(model.cut_layers(selection))
        about["requantisation_kl"] = requantisation_cost(
            model, compact, selection, progress=progress
        )
    return replace(selection, origin=replace(selection.origin, **about))


def can_be_ragged(model: IFPModel) -> bool:
    """Whether a plain folder of this model can have unequal widths per layer."""
    config = model.config
    if config["model_type"] not in ("llama", "mistral"):
        return False
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    return (
        not config.get("rope_traditional")
        and not any("sliding" in kind for kind in config.get("layer_types") or ())
        and config.get("sliding_window") is None
        and (config.get("head_dim") or hidden // heads) * heads == hidden
        and "quantization" not in config
    )


def check_can_write(
    model: IFPModel, sizes: Sequence[int], quantisation: Quantisation | None = None
) -> None:
    """Raise ``ValueError`` unless a plain folder can hold such a compact model.

    Args:
        model: what it is made from.
        sizes: the units that each layer keeps.
        quantisation: how it is to be quantised.
    """
    equal = len({*sizes}) == 1
    if not equal and not can_be_ragged(model):
        raise ValueError(
            f"From {min(sizes)} to {max(sizes)} {model.plan.unit}s are kept per layer, "
            f"and no stock architecture for {model.config['model_type']} can say "
            "different widths; select with the allocation uniform."
        )
    if equal:
        _check_stock_width(model, sizes[0])
    if quantisation is None:
        return
    if "quantization" in model.config:
        raise ValueError(
            f"{model.path} is quantised already; leave out -q, and the compact model "
            "keeps its quantisation."
        )
    if equal and model.plan.unit == "channel":
        check_multiple(sizes[0], quantisation.group_size, model.channels)


def _as_nemotron_nas(compact: nn.Module, model: IFPModel) -> dict[str, Any]:
    """Pad the widths of ``compact`` in place; return the config keys that state
    them.
    """
    source, plan = model.config, model.plan
    hidden, heads = source["hidden_size"], source["num_attention_heads"]
    kv_heads = source.get("num_key_value_heads") or heads
    blocks = []
    for module, layer in zip(plan.modules(compact), plan.layers, strict=True):
        width = -(-count_units(module, layer) // NAS_MULTIPLE) * NAS_MULTIPLE
        pad(module, layer, width)
        # The class computes int(2 * ffn_mult * hidden / 3), rounded up: aim at the
        # middle of the last 256 so that no rounding can reach the next multiple.
        multiplier = (width - NAS_MULTIPLE / 2) * 3 / (2 * hidden)
        attention = {"n_heads_in_group": heads // kv_heads}
        blocks.append({"attention": attention, "ffn": {"ffn_mult": multiplier}})
    return {
        "model_type": "nemotron-nas",
        "architectures": ["DeciLMForCausalLM"],
        "block_configs": blocks,
    }


def _quantise(
    compact: nn.Module, config: dict[str, Any], how: Quantisation
) -> tuple[nn.Module, dict[str, Any]]:
    from mlx_lm.utils import quantize_model

    with contextlib.redirect_stdout(sys.stderr):  # it prints
        return quantize_model(compact, config, how.group_size, how.bits, how.mode)


def _check_stock_width(model: IFPModel, units: int) -> None:
    """Raise ``ValueError`` unless a config.json can state the number of units: some
    classes round it, or compute it from other keys.
    """
    config = model.plan.resized(model.config, units)
    shapes, dense = dense_shapes(build(config)), dense_shapes(model.source.skeleton)
    for layer in model.plan.layers:
        for piece in layer.slices:
            path = (layer.path, piece.module, piece.tensor)
            name = ".".join(step for step in path if step)
            kept = dense[name][piece.axis] // model.plan.units * units
            if shapes[name][piece.axis] != kept:
                raise ValueError(
                    f"No plain folder of the type {config['model_type']} can have "
                    f"{units} {model.plan.unit}s in a layer: its class makes {name} "
                    f"{shapes[name][piece.axis]} wide instead. Use the compact model in "
                    "memory, with ifp_mlx.generate."
                )


def _write(
    compact: nn.Module, config: dict[str, Any], source: Path, folder: Path
) -> None:
    from mlx_lm.utils import save_config, save_model

    save_model(folder, compact)
    save_config(config, folder / "config.json")
    copy_companions(source, folder)


def _card(
    model: IFPModel,
    selection: Selection,
    quantisation: Quantisation | None,
    config: dict[str, Any],
    said: str,
) -> str:
    """Return the model card: what this is, how it was made, from what."""
    from importlib.metadata import version

    from huggingface_hub import ModelCardData

    licence = licence_of(model.path)
    data = ModelCardData(
        library_name="mlx",
        pipeline_tag="text-generation",
        tags=["mlx", "ifp_mlx", "pruned"],
        base_model=model.name,
        license=licence,
    )
    total = selection.channels * len(selection.sizes)
    info = sorted(selection.as_text().items())
    rows = {
        "Base model": model.name,
        "Licence of the base": licence or UNKNOWN_LICENCE,
        "Channels"
        if selection.unit == "channel"
        else "Experts": f"{sum(selection.sizes)} "
        f"of {total}" + (" FFN channels" if selection.unit == "channel" else ""),
        "Per layer": str(selection.target_size or selection.sizes),
        "Mask": f"`{selection.mask_id}`, in {MASK_FILE}",
        **{key[0].upper() + key[1:]: value for key, value in info},
        "Architecture": config["model_type"],
        "Quantisation": json.dumps(config.get("quantization") or "none").strip('"')
        if quantisation is None
        else f"{quantisation.bits} bits, groups of {quantisation.group_size}, "
        f"{quantisation.mode}",
        "Made with": ", ".join(
            f"{name} {version(name)}" for name in ("ifp_mlx", "mlx", "mlx-lm")
        ),
    }
    table = "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows.items())
    unit = {"channel": "FFN channel", "expert": "expert"}[selection.unit]
    return CARD.format(data=data, name=model.name, table=table, said=said, unit=unit)


CARD = """---
{data}
---

# {name}, compact

Part of {name}: the {unit}s that one instruction or task needs, sliced out. It
loads like any mlx-lm model:

    mlx_lm.generate --model . --prompt "..."

| | |
|---|---|
{table}

{said}
"""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
