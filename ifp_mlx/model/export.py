"""Write a compact model as a plain folder that any mlx-lm program loads."""

import contextlib
import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..files.atomic import new_folder, refuse_existing
from ..files.companions import copy_companions, licence_of
from ..selection.masks import Selection
from ..selection.widths import check_multiple
from ..slicing.pruning import dense_shape, ffn_layers
from .checkpoint import IFPModel, Progress
from .requantisation import requantisation_cost

# Safetensors inside; not in name, for some loaders take every such file for weights,
# those of subfolders too (mlx-swift-lm 3.31.4).
MASK_FILE = "ifp.mask"


UNKNOWN_LICENCE = "not stated in the source folder; see the base model"


UNTRAINED = (
    "The channels were selected without training the model further, unless the selector\n"
    "above is a trained predictor. The quality of this folder was not measured."
)


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
    quantisation: Quantisation | None = None,
    progress: Progress = iter,
) -> Path:
    """Write the selected channels as an ordinary mlx-lm (and HF) folder.

    With the same width in every layer it is the source's own architecture with a
    smaller ``intermediate_size``. Unequal widths need a stock architecture that can
    say them: llama-like models become ``nemotron-nas``, each layer padded with zero
    channels to a multiple of 256.

    Args:
        model: where the weights come from.
        selection: made with this model.
        out: the folder to make.
        quantisation: quantise the result, or leave it as the source is.
        progress: wraps the iteration over layers.

    Returns:
        ``out``. The folder also holds the mask file and a card (README.md), which
        say, where ``down_proj`` had to be quantised again, what that costs.

    Raises:
        FileExistsError: if ``out`` is there.
        ValueError: if the widths fit neither the architecture nor the quantisation.
    """
    out = Path(out)
    refuse_existing(out)
    check_can_write(model, selection, quantisation)
    compact = model.compact(selection, progress=progress)
    selection = _with_slicing(model, compact, selection, progress)
    return write_plain(model, compact, selection, out, quantisation=quantisation)


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
        said: what the card ends with: how good it is.

    Raises:
        FileExistsError, ValueError: as :func:`write_compact`.
    """
    check_can_write(model, selection, quantisation)
    config = dict(model.config)
    if selection.target_size is not None:
        config = _with_width(config, selection.target_size)
    else:
        config |= _as_nemotron_nas(compact, model.config)
        if config.get("rope_scaling") is None:  # transformers warns of a null here
            config.pop("rope_scaling", None)
    if quantisation is not None:
        compact, config = _quantise(compact, config, quantisation)
    with new_folder(out) as scratch:
        _write(compact, config, model.path, scratch)
        # The examples of a task stay with its maker: folders are passed on.
        replace(selection, text=None).save(scratch / MASK_FILE)
        card = _card(model, selection, quantisation, config, said)
        (scratch / "README.md").write_text(card, encoding="utf-8")
    return out


def _with_slicing(
    model: IFPModel, compact: nn.Module, selection: Selection, progress: Progress
) -> Selection:
    """Note with the selection how a quantised ``down_proj`` was sliced, and the cost."""
    slicing = model.slicing(selection)
    if slicing == "not quantised":
        return selection
    about = {"down_proj": slicing}
    if slicing == "requantised" and not selection.compensates:
        cost = requantisation_cost(model, compact, selection, progress=progress)
        about["requantised layers"] = str(len(model.cut_layers(selection)))
        about["requantisation KL"] = f"{cost:.4g} nats per token"
    return replace(selection, info=selection.info | about)


def pad_ffn(ffn: nn.Module, width: int) -> None:
    """Widen one FFN to ``width`` channels, in place, without changing what it computes.

    A channel of zeros adds ``act(0) * 0 = 0`` to the output.

    Args:
        ffn: not quantised, at most ``width`` wide.
        width: channels afterwards.
    """
    extra = width - ffn.gate_proj.weight.shape[0]
    for linear in (ffn.gate_proj, ffn.up_proj):
        linear.weight = mx.pad(linear.weight, [(0, extra), (0, 0)])
        if "bias" in linear:
            linear.bias = mx.pad(linear.bias, (0, extra))
    ffn.down_proj.weight = mx.pad(ffn.down_proj.weight, [(0, 0), (0, extra)])


def can_be_ragged(model: IFPModel) -> bool:
    """Whether a plain folder of this model can have unequal widths per layer."""
    config = model.config
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    return (
        config["model_type"] in ("llama", "mistral")
        and not config.get("rope_traditional")
        and not any("sliding" in kind for kind in config.get("layer_types") or ())
        and config.get("sliding_window") is None
        and config.get("head_dim", hidden // heads) * heads == hidden
        and "quantization" not in config
    )


def check_can_write(
    model: IFPModel, selection: Selection, quantisation: Quantisation | None = None
) -> None:
    """Raise ``ValueError`` unless a plain folder can hold such a compact model."""
    if selection.target_size is None and not can_be_ragged(model):
        raise ValueError(
            f"The mask {selection.mask_id} keeps different widths per layer, which no "
            f"stock architecture for {model.config['model_type']} can say; make the "
            "mask with the allocation uniform."
        )
    if selection.target_size is not None:
        _check_stock_width(model, selection.target_size)
    if quantisation is None:
        return
    if "quantization" in model.config:
        raise ValueError(
            f"{model.path} is quantised already; leave out -q, and the compact model "
            "keeps its quantisation."
        )
    if selection.target_size is not None:
        group = quantisation.group_size
        check_multiple(selection.target_size, group, selection.channels)


def _as_nemotron_nas(compact: nn.Module, source: dict[str, Any]) -> dict[str, Any]:
    """Pad the widths of ``compact`` in place; return the config keys that say them."""
    hidden, heads = source["hidden_size"], source["num_attention_heads"]
    kv_heads = source.get("num_key_value_heads", heads)
    blocks = []
    for _, _, ffn in ffn_layers(compact):
        width = -(-ffn.gate_proj.weight.shape[0] // NAS_MULTIPLE) * NAS_MULTIPLE
        pad_ffn(ffn, width)
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


def _with_width(config: dict[str, Any], width: int) -> dict[str, Any]:
    said = {"intermediate_size": width}
    if "intermediate_size" in config or "text_config" not in config:
        return config | said
    return config | {"text_config": config["text_config"] | said}


def _check_stock_width(model: IFPModel, width: int) -> None:
    """Raise ``ValueError`` unless ``intermediate_size`` is what sets the width: some
    classes compute it from other keys.
    """
    from mlx_lm.utils import _get_classes

    config = _with_width(model.config, width)
    model_class, args_class = _get_classes(config)
    if dense_shape(model_class(args_class.from_dict(config)))[1] != width:
        raise ValueError(
            f"No plain folder of the type {config['model_type']} can have {width} "
            "channels: its width is not set by intermediate_size. Use the compact "
            "model in memory, with ifp_mlx.generate."
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
    info = sorted(selection.info.items())
    rows = {
        "Base model": model.name,
        "Licence of the base": licence or UNKNOWN_LICENCE,
        "Channels": f"{sum(selection.sizes)} of {total} FFN channels",
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
    return CARD.format(data=data, name=model.name, table=table, said=said)


CARD = """---
{data}
---

# {name}, compact

Part of {name}: the FFN channels that one instruction or task needs, sliced out. It
loads like any mlx-lm model:

    mlx_lm.generate --model . --prompt "..."

| | |
|---|---|
{table}

{said}
"""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
