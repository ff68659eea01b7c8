"""SparsityPredictor: small LM + low-rank head, instruction tokens → scores."""

import json
from pathlib import Path
from typing import Any, Literal, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..files.atomic import new_folder
from ..files.config import older_keys, read_config
from ..files.literal import literal
from .tokenizer import open_tokenizer

HEAD = "head.safetensors"


class SparsityPredictor(nn.Module):
    """Read an instruction, score every unit of every layer of a larger LLM.

    The last-layer hidden state of the last instruction token goes through two linear
    layers, D → rank → L·F. The narrow middle is what keeps the head small.

    Args:
        backbone: a stock mlx-lm language model; ``backbone.model(tokens)`` returns its
            normed last hidden states ``[B, T, D]``.
        layers: L, the layers of the LLM to be pruned.
        channels: F, the intermediate size of that LLM.
        rank: width between the two linear layers.
        config: the backbone's ``config.json``; only saving needs it.
        tokenizer: the backbone's own, as mlx-lm loads it; ``None`` if the predictor
            reads the LLM's token ids.
        pooling: which hidden states the head reads: the ``last``, or the ``mean`` of
            all, which tells tasks apart better while the backbone is untrained.

    Raises:
        ValueError: if a size is below 1, or the backbone hides its hidden states.

    Source: Hou et al. 2025 (arXiv:2501.02086) App. A.1. The paper names no activation
    between the two layers and its authors' timing code has none, so there is none.
    """

    def __init__(
        self,
        backbone: nn.Module,
        layers: int,
        channels: int,
        rank: int = 128,
        *,
        config: dict[str, Any] | None = None,
        tokenizer: Any = None,
        pooling: Literal["last", "mean"] = "last",
    ):
        super().__init__()
        if min(layers, channels, rank) < 1:
            raise ValueError(f"{layers=}, {channels=}, {rank=} must be 1 or more.")
        self.backbone = backbone
        self.reduce = nn.Linear(_width(backbone), rank)
        self.expand = nn.Linear(rank, layers * channels)
        self.layers, self.channels, self.tokenizer = layers, channels, tokenizer
        self.pooling = pooling
        # As text: a dict would count as parameters of the module.
        self._config = None if config is None else json.dumps(config)

    def __call__(self, tokens: mx.array, lengths: mx.array | None = None) -> mx.array:
        """Score a batch of instructions; padding on the right changes nothing.

        Args:
            tokens: token ids, integer, shape ``[B, T]``.
            lengths: real tokens of each row, 1 to T, shape ``[B]``; ``None``: all T.

        Returns:
            Scores, float32, shape ``[B, L, F]``, higher is kept first; no unit.

        Raises:
            ValueError: if the shapes are not these.
        """
        if tokens.ndim != 2 or tokens.size == 0:
            raise ValueError(f"tokens must be [B, T], not empty; got {tokens.shape}.")
        B = tokens.shape[0]
        if lengths is not None and lengths.shape != (B,):
            raise ValueError(f"lengths must have shape ({B},); got {lengths.shape}.")
        scores = self.expand(self.reduce(self.features(tokens, lengths)))
        return scores.reshape(B, self.layers, self.channels)

    def features(self, tokens: mx.array, lengths: mx.array | None = None) -> mx.array:
        """Return what the head reads of each instruction, float32 ``[B, D]``."""
        # The backbone is causal: no real token has seen the padding.
        hidden = self.backbone.model(tokens)
        if self.pooling == "last":
            ends = -1 if lengths is None else lengths - 1
            return hidden[mx.arange(len(hidden)), ends].astype(mx.float32)
        if lengths is None:
            return hidden.astype(mx.float32).mean(axis=1)
        real = (mx.arange(tokens.shape[1]) < lengths[:, None]).astype(mx.float32)
        weights = real / lengths[:, None]
        return (hidden.astype(mx.float32) * weights[..., None]).sum(axis=1)

    @classmethod
    def load(cls, folder: str | Path) -> "SparsityPredictor":
        """Load an ordinary mlx-lm model folder that has ``head.safetensors`` in it.

        Raises:
            FileNotFoundError: if the folder lacks the head or the model.
            ValueError: if the head, its metadata and the backbone do not fit together.
        """
        from mlx_lm.utils import load_model

        folder = Path(folder)
        head, layers, channels, pooling = _read_head(folder / HEAD)
        file = folder / "config.json"
        keys = older_keys(read_config(file), file)
        with literal(folder) as path:
            backbone, config = load_model(path, model_config=keys)
        rank = head["reduce.weight"].shape[0] if "reduce.weight" in head else 1
        self = cls(
            backbone, layers, channels, rank, config=config, pooling=cast(Any, pooling)
        )
        found = {name: weight.shape for name, weight in head.items()}
        needed = {name: weight.shape for name, weight in self._head_weights().items()}
        if found != needed:
            raise ValueError(
                f"{folder / HEAD} holds {found}; a backbone of width {_width(backbone)} "
                f"and {layers} layers of {channels} units need {needed}."
            )
        self.load_weights(list(head.items()), strict=False)
        if any(folder.glob("tokenizer*")):
            self.tokenizer = open_tokenizer(folder, config)
        mx.eval(self.parameters())
        return self.eval()

    def save(self, folder: str | Path) -> None:
        """Write a new folder for :meth:`load`, complete or not at all.

        Raises:
            FileExistsError: if ``folder`` is already there.
            ValueError: if the predictor was made without ``config``.
        """
        with new_folder(folder) as scratch:
            self.write(scratch)

    def write(self, folder: Path) -> None:
        """Write into a scratch folder, as part of a larger checkpoint; like save."""
        from mlx_lm.utils import save_config, save_model

        if self._config is None:
            raise ValueError("A predictor made without config= cannot be saved.")
        save_model(folder, self.backbone)  # makes the folder
        save_config(json.loads(self._config), folder / "config.json")
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        about = {
            "layers": str(self.layers),
            "channels": str(self.channels),
            "pooling": self.pooling,
        }
        mx.save_safetensors(str(folder / HEAD), self._head_weights(), metadata=about)

    def _head_weights(self) -> dict[str, mx.array]:
        weights = tree_flatten(self.parameters())
        return {k: v for k, v in weights if not k.startswith("backbone.")}


def _width(backbone: nn.Module) -> int:
    # MLX is lazy: asking for the shape computes nothing.
    inner = getattr(backbone, "model", None)
    hidden = inner(mx.zeros((1, 1), mx.int32)) if callable(inner) else None
    if not isinstance(hidden, mx.array) or hidden.ndim != 3:
        raise ValueError(
            f"{type(backbone).__module__}.{type(backbone).__name__} cannot feed a "
            "predictor: its .model(tokens) gives no hidden states."
        )
    return hidden.shape[-1]


def _read_head(path: Path) -> tuple[dict[str, mx.array], int, int, str]:
    """Return the head's weights, L, F and the pooling."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a predictor needs its head.")
    try:
        head, metadata = cast(Any, mx.load(str(path), return_metadata=True))
        pooling = metadata.get("pooling", "last")
        if pooling not in ("last", "mean"):
            raise ValueError(f"pooling {pooling!r} is unknown")
        return head, int(metadata["layers"]), int(metadata["channels"]), pooling
    except (RuntimeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} lacks a head or its sizes: {error!r}.") from None
