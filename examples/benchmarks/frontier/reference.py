"""The dense model that all points are compared with, and its logits for rows.

The models here were published at 4 bits. Rounding them to 4 bits again, on nearly the
grid that they are on, may cost too little, and then everything else is at a
disadvantage. So noise as wide as a step of that grid is added: the result is one of the
many models that the file may have been rounded from.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from ifp_mlx.evaluation.rows import Row
from ifp_mlx.evaluation.teacher import PREFILL_STEP
from ifp_mlx.files.atomic import new_file, new_folder
from ifp_mlx.files.companions import copy_companions
from ifp_mlx.slicing.stock import prefill

GROUP, BITS, SEED = 32, 4, 0  # of the grid that the file is thought to be on


def perturbed(weight: mx.array, key: mx.array) -> mx.array:
    """Return a weight ``[..., D]`` with uniform noise of the width of its own 4-bit step,
    which each group of 32 along ``D`` has for itself.

    Raises:
        ValueError: if ``D`` is no multiple of 32.
    """
    if weight.shape[-1] % GROUP:
        raise ValueError(
            f"A weight of the shape {weight.shape} has no whole groups of {GROUP}; take "
            "a model whose widths are multiples of it."
        )
    groups = weight.reshape(*weight.shape[:-1], -1, GROUP)
    span = groups.max(axis=-1, keepdims=True) - groups.min(axis=-1, keepdims=True)
    noise = mx.random.uniform(-0.5, 0.5, groups.shape, key=key)
    return (groups + noise * span / (2**BITS - 1)).reshape(weight.shape)


def write_reference(source: Path, folder: Path) -> None:
    """Write a perturbed copy of a folder that is not quantised, in float32."""
    from mlx_lm.utils import load_model

    model, config = load_model(source)
    model.set_dtype(mx.float32)
    layers = [m for _, m in model.named_modules() if hasattr(m, "to_quantized")]
    keys = mx.random.split(mx.random.key(SEED), len(layers))
    for layer, key in zip(layers, keys, strict=True):
        layer.weight = perturbed(layer.weight, key)
    write_model(folder, model, config, source)


def write_model(folder: Path, model: nn.Module, config: dict, source: Path) -> None:
    """Write an mlx-lm folder, with the tokenizer of ``source``."""
    from mlx_lm.utils import save_config, save_model

    with new_folder(folder) as scratch:
        save_model(scratch, model, donate_model=False)
        save_config(config, scratch / "config.json")
        copy_companions(source, scratch)


def logits_of(model: nn.Module, row: Row) -> np.ndarray:
    """Return a model's logits at the answer, float32 ``[A, V]``; it has read the prompt."""
    return np.array(_at_answer(model, model, row))


class Dense:
    """A dense model's logits at the answers of rows.

    For each row the last hidden states, ``[A, D]``, are kept on disk. The output layer
    makes the whole model's logits from them, in a fraction of the time, and they take a
    fraction of the logits' space.

    Args:
        folder: of the model.
        states: where the hidden states are kept.
    """

    def __init__(self, folder: Path, states: Path) -> None:
        from mlx_lm.utils import load_model

        self._model, _ = load_model(
            folder, lazy=True
        )  # the rest is not read for logits
        self._states = states

    def read(self, rows: dict[tuple[str, int], Row]) -> None:
        """Compute the hidden states that are not there yet."""
        missing = [key for key in rows if not self._file(key).exists()]
        for key in tqdm(missing, desc="dense", disable=None):
            states = _at_answer(self._model, self._model.model, rows[key])
            with new_file(self._file(key)) as scratch:
                mx.save_safetensors(str(scratch), {"states": states})

    def logits(self, key: tuple[str, int]) -> np.ndarray:
        """Return the logits at the answer of a row, by family and number, ``[A, V]``."""
        found: Any = mx.load(str(self._file(key)))
        tied = "lm_head" not in self._model
        head = self._model.model.embed_tokens.as_linear if tied else self._model.lm_head
        return np.array(head(found["states"]))

    def _file(self, key: tuple[str, int]) -> Path:
        return self._states / f"{key[0]}-{key[1]}.safetensors"


def _at_answer(model: nn.Module, body: nn.Module, row: Row) -> mx.array:
    """Return what ``body`` makes of the answer's places after ``model`` read the prompt."""
    cache = prefill(model, row.prompt[:-1], PREFILL_STEP)
    tokens = [row.prompt[-1], *row.answer[:-1]]
    return body(mx.array(tokens)[None], cache=cache)[0]


def compare(found: np.ndarray, dense: np.ndarray, answer: list[int]) -> dict[str, Any]:
    """Return how near a model's logits at an answer are to the dense model's.

    As :func:`ifp_mlx.evaluation.teacher.metrics`, but by numpy, which computes many
    exponentials at a time where MLX on a CPU computes one; a large vocabulary has many.

    Args:
        found, dense: float32 ``[A, V]``.
        answer: ``A`` ids.

    Returns:
        ``kl`` from the dense model's next token and ``nll``, nats per token; and
        ``agreement``, how often both would choose the same token.
    """
    q, p = log_softmax(found), log_softmax(dense)
    kl = np.einsum("av,av->a", np.exp(p), p - q)
    same = found.argmax(axis=-1) == dense.argmax(axis=-1)
    nll = -q[np.arange(len(answer)), answer]
    values = {"kl": kl.mean(), "agreement": same.mean(), "nll": nll.mean()}
    return {name: round(float(value), 6) for name, value in values.items()}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log-probabilities, float32 ``[A, V]``."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
