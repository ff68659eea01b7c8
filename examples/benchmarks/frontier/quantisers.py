"""Whole models at few bits, each by mlx-lm's own quantiser.

All quantisers that need a text get the same: the dialogues that ship with the package,
through the model's chat template if it has one, one after another, cut into pieces of
one length.
"""

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx import load
from ifp_mlx.selection.calibration import calibration_chats
from ifp_mlx.selection.prompts import tokenize

from .distilled import RATES, distil
from .points import DYNAMIC, RECIPES, Point

PIECE = 256  # tokens
AWQ_PIECES = 4  # of which AWQ has one
Made = tuple[nn.Module, dict[str, Any]]


def quantised(point: Point, dense: Path) -> Made:
    """Return the model of a point, in memory, and its config; numbers that are not
    quantised, scales and biases are float16, as their bytes are counted.

    Args:
        point: of a whole model.
        dense: folder of the model that it is made of.
    """
    from mlx_lm.utils import load_model

    model, config = load_model(dense)
    with redirect_stdout(sys.stderr):  # they print what they do
        model, config = MAKERS[point.kind](point, model, config, dense)
    model.set_dtype(mx.float16)
    mx.eval(model.parameters())
    return model, config


def calibration(dense: Path, piece: int = PIECE) -> mx.array:
    """Return the calibration text in a model's tokens, int32 ``[N, piece]``."""
    _, tokenizer = load(dense)
    text: list[int] = []
    for chat in calibration_chats():
        text += tokenize(tokenizer, chat)
    whole = len(text) // piece * piece
    return mx.array(text[:whole]).reshape(-1, piece)


def affine(point: Point, model: nn.Module, config: dict, dense: Path) -> Made:
    """Round every weight to the nearest."""
    from mlx_lm.utils import quantize_model

    return quantize_model(model, config, point.group, point.bits)


def mixed(point: Point, model: nn.Module, config: dict, dense: Path) -> Made:
    """Give some layers more bits, as one of the recipes of ``mlx_lm.convert`` says."""
    from mlx_lm.convert import mixed_quant_predicate_builder
    from mlx_lm.utils import quantize_model

    which = mixed_quant_predicate_builder(point.kind, model, point.group)
    about = {"quant_predicate": which}
    return quantize_model(model, config, point.group, point.bits, **about)


def dynamic(point: Point, model: nn.Module, config: dict, dense: Path) -> Made:
    """Give more bits to the layers whose rounding raises the loss most."""
    from mlx_lm.quant.dynamic_quant import estimate_sensitivities, estimate_threshold
    from mlx_lm.utils import quantize_model

    low, high = DYNAMIC[point.bits]
    widths = low, point.group, high, point.group
    # One piece at a time: gradients of all weights and logits of many would not fit.
    found = dict(estimate_sensitivities(model, calibration(dense), *widths, 1))
    threshold = estimate_threshold(model, found, point.bits, *widths)

    def which(path: str, module: nn.Module) -> bool | dict:
        more = {"bits": high, "group_size": point.group}
        return more if found[path] > threshold else True

    about = {"quant_predicate": which}
    return quantize_model(model, config, point.group, low, **about)


def awq(point: Point, model: nn.Module, config: dict, dense: Path) -> Made:
    """Scale and clip weights as activations say, then round (arXiv:2306.00978); the
    embeddings are at 4 bits in groups of 32, as mlx-lm has them.
    """
    from mlx_lm.quant.awq import AWQ_MODEL_CONFIGS, awq_quantize, update_config

    how = AWQ_MODEL_CONFIGS[config["model_type"]]
    # Its search reads the text hundreds of times over: an hour of a CPU for all of it.
    some = calibration(dense)[::AWQ_PIECES]
    awq_quantize(model, some, how, point.group, point.bits)
    return model, update_config(model, config)


def gptq(point: Point, model: nn.Module, config: dict, dense: Path) -> Made:
    """Round column by column, the later ones making up for errors (arXiv:2210.17323);
    the embeddings are at 6 bits in groups of 64, as mlx-lm has them.
    """
    from mlx_lm.quant.gptq import gptq_quantize

    widths = point.bits, point.group, 6, 64
    model, quantisation = gptq_quantize(model, calibration(dense), *widths)
    return model, config | {"quantization": quantisation}


def dwq(point: Point, model: nn.Module, config: dict, dense: Path) -> Made:
    """Round, then train scales and biases on the dense model's predictions."""
    from mlx_lm.utils import load_model

    student, config = affine(point, model, config, dense)
    teacher, _ = load_model(dense)
    distil(student, teacher, calibration(dense), RATES[config["model_type"]])
    return student, config


MAKERS: dict[str, Callable[[Point, nn.Module, dict, Path], Made]] = {
    "affine": affine,
    "dynamic": dynamic,
    "awq": awq,
    "gptq": gptq,
    "dwq": dwq,
    **dict.fromkeys(RECIPES, mixed),
}
