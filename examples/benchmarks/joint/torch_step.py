"""The step of joint training in PyTorch, for a GPU that MLX does not run on.

It computes the same as ``ifp_mlx.training.step``, which is the reference:
tests/examples/test_joint.py compares the two. The models are those of transformers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Batch(NamedTuple):
    """Examples of one step, padded on the right.

    Attributes:
        tokens: int64 ``[B, T]``; a row's prompt is its beginning, and selects.
        prompt: tokens of each prompt, int64 ``[B]``.
        length: tokens of prompt and answer, int64 ``[B]``.
        task: number of each row's task, int64 ``[B]``.
    """

    tokens: Tensor
    prompt: Tensor
    length: Tensor
    task: Tensor

    @property
    def targets(self) -> Tensor:
        """Where the next token is one of the answer, bool ``[B, T - 1]``."""
        place = torch.arange(1, self.tokens.shape[1], device=self.tokens.device)
        return (place >= self.prompt[:, None]) & (place < self.length[:, None])


@dataclass(frozen=True)
class Settings:
    """A run's settings; names and meanings are those of
    :class:`ifp_mlx.training.recipe.TrainConfig`.
    """

    steps: int
    lr: float
    masker_lr: float
    warmup: int
    k: int
    temperature: float = 0.3
    weight_decay: float = 0.01
    clip: float = 1.0


def soft_top_k(scores: Tensor, k: int, temperature: float) -> Tensor:
    """Relax top-k to λ in [0, 1] whose sum is ``k``; see ``ifp_mlx.selection.top_k.soft_top_k``.

    Args:
        scores: ``[..., F]``.
        k: channels to keep, below ``F``.
        temperature: ε.

    Returns:
        λ, float32 ``[..., F]``.
    """
    s = scores.float() / temperature
    with torch.no_grad():
        descending, order = s.sort(dim=-1, descending=True, stable=True)
        tail = descending.flip(-1).logcumsumexp(dim=-1).flip(-1)
        count = torch.arange(k, device=s.device, dtype=torch.float32)
        tau_if = tail[..., :k] - (k - count).log()
        consistent = (descending[..., :k] <= tau_if).int()
        saturated = consistent.argmax(dim=-1, keepdim=True)
        free = order.argsort(dim=-1) >= saturated
    tau = s.masked_fill(~free, -torch.inf).logsumexp(dim=-1, keepdim=True)
    tau = tau - (k - saturated).float().log()
    return torch.where(free, torch.where(free, s - tau, 0.0).exp(), 1.0)


def top_k(scores: Tensor, k: int) -> Tensor:
    """Return 1 for the ``k`` highest scores, the lower index first among equals."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return (order.argsort(dim=-1) < k).float()


class FixedMasks(nn.Module):
    """Masks that are given: one for all, ``[L, F]``, or one a task, ``[tasks, L, F]``."""

    def __init__(self, masks: Tensor | None) -> None:
        super().__init__()
        self.masks = masks

    def forward(self, batch: Batch, settings: Settings) -> Tensor | None:
        """Return masks ``[B or 1, L, F]``, or ``None`` for the dense model."""
        if self.masks is None or self.masks.ndim == 2:
            return None if self.masks is None else self.masks[None]
        return self.masks[batch.task]


class Predictor(nn.Module):
    """``ifp_mlx.selection.predictor.SparsityPredictor`` with mean pooling, as a source of masks.

    Args:
        backbone: ``LlamaModel`` or one built alike.
        layers, channels: ``L`` and ``F`` of the model to be pruned.
        rank: of the head.
    """

    def __init__(self, backbone: nn.Module, layers: int, channels: int, rank: int):
        super().__init__()
        self.backbone = backbone
        self.reduce = nn.Linear(backbone.config.hidden_size, rank)
        self.expand = nn.Linear(rank, layers * channels)
        self.layers = layers

    def reduced(self, batch: Batch) -> Tensor:
        """Return the values in the narrow middle of the head, float32 ``[B, r]``."""
        # It is causal: no token of the prompt has seen the answer.
        hidden = last_hidden(self.backbone, batch.tokens, None).float()
        place = torch.arange(batch.tokens.shape[1], device=hidden.device)
        real = (place < batch.prompt[:, None]).float() / batch.prompt[:, None]
        with torch.autocast(hidden.device.type, enabled=False):
            return self.reduce((hidden * real[..., None]).sum(dim=1))

    def scores(self, batch: Batch) -> Tensor:
        """Return scores, float32 ``[B, L, F]``."""
        reduced = self.reduced(batch)
        with torch.autocast(reduced.device.type, enabled=False):
            return self.expand(reduced).unflatten(-1, (self.layers, -1))

    def forward(self, batch: Batch, settings: Settings) -> Tensor:
        """Return the soft mask on the kept channels, float32 ``[B, L, F]``."""
        scores = self.scores(batch)
        soft = soft_top_k(scores, settings.k, settings.temperature)
        return soft * top_k(scores.detach(), settings.k)


def layer(block: nn.Module, hidden: Tensor, mask: Tensor, rotary: Any) -> Tensor:
    """Run one layer of a llama-like model with a mask on its FFN's channels.

    Args:
        block: of transformers.
        hidden: ``[B, T, D]``.
        mask: ``[B, 1, F]``.
        rotary: the position embeddings.
    """
    attention = block.self_attn(
        block.input_layernorm(hidden), position_embeddings=rotary, attention_mask=None
    )[0]
    hidden = hidden + attention
    x = block.post_attention_layernorm(hidden)
    ffn = block.mlp
    channels = ffn.act_fn(ffn.gate_proj(x)) * ffn.up_proj(x)
    return hidden + ffn.down_proj(channels * mask)


def last_hidden(
    inner: nn.Module,
    tokens: Tensor,
    masks: Tensor | None,
    run: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Return the normed last hidden states of a masked llama-like model, ``[B, T, D]``.

    Args:
        inner: ``LlamaModel`` or one built alike.
        tokens: int64 ``[B, T]``.
        masks: ``[B or 1, L, F]``, or ``None``.
        run: runs a layer; default: :func:`layer`.
    """
    hidden = inner.embed_tokens(tokens)
    places = torch.arange(tokens.shape[1], device=tokens.device)[None]
    rotary = inner.rotary_emb(hidden, places)
    # All masks have one shape, so that a layer is compiled only once.
    size = len(tokens), len(inner.layers), inner.layers[0].mlp.down_proj.in_features
    given = hidden.new_ones(1) if masks is None else masks.to(hidden.dtype)
    every = given.expand(size).contiguous()
    for number, block in enumerate(inner.layers):
        hidden = (run or layer)(block, hidden, every[:, number, None], rotary)
    return inner.norm(hidden)


def losses(model: nn.Module, batch: Batch, masks: Tensor | None) -> Tensor:
    """Return the cross-entropy of every target, in the order of the rows, float32."""
    hidden = last_hidden(model.model, batch.tokens, masks)[:, :-1]
    logits = model.lm_head(hidden[batch.targets])
    wanted = batch.tokens[:, 1:][batch.targets]
    return nn.functional.cross_entropy(logits.float(), wanted, reduction="none")


def rate(highest: float, settings: Settings, step: int) -> float:
    """Return the learning rate of a step, counted from 0: a rise, then a cosine."""
    warmup, steps = settings.warmup, settings.steps
    if step < warmup:
        first = highest / (warmup + 1)
        return first + (highest - first) * step / warmup
    fall = torch.pi * min((step - warmup) / max(1, steps - warmup), 1.0)
    return (
        highest * 0.5 * (1 + float(torch.cos(torch.tensor(fall, dtype=torch.float64))))
    )


class Step:
    """The state of training, and one step of it.

    Args:
        model: ``LlamaForCausalLM`` or one built alike.
        masker: where its masks come from.
        settings: of the run.
    """

    def __init__(self, model: nn.Module, masker: nn.Module, settings: Settings) -> None:
        self.model, self.masker, self.settings = model, masker, settings
        self.rates = (settings.lr, settings.masker_lr)
        self.parts = [
            [p for p in part.parameters() if p.requires_grad]
            for part in (model, masker)
        ]
        self.optimizers = [
            torch.optim.AdamW(
                part, weight_decay=settings.weight_decay, fused=part[0].is_cuda
            )
            for part in self.parts
            if part
        ]
        self.made = 0

    def __call__(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Accumulate the gradient over micro-batches and descend once.

        Returns:
            Scalars, still on the device: ``loss`` in nats per target, and the
            gradients' norms before clipping, of the model and of the masker.
        """
        total = sum(batch.targets.sum() for batch in batches)
        loss: Any = 0.0
        for batch in batches:
            with torch.autocast("cuda", torch.bfloat16, enabled=batch.tokens.is_cuda):
                masks = self.masker(batch, self.settings)
                part = losses(self.model, batch, masks).sum() / total
            part.backward()
            loss = loss + part.detach()
        report = {"loss": loss}
        names = ("llm_grad_norm", "masker_grad_norm")
        for name, part, optimizer, highest in zip(
            names, self.parts, self.optimizers, self.rates, strict=False
        ):
            report[name] = nn.utils.clip_grad_norm_(part, self.settings.clip)
            for group in optimizer.param_groups:
                group["lr"] = rate(highest, self.settings, self.made)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.made += 1
        return report
