"""Test a masked model: losses, right answers, overlap of masks."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from examples.benchmarks.joint.data import Rows
from examples.benchmarks.joint.torch_step import (
    Batch,
    Settings,
    last_hidden,
    layer,
    top_k,
)

SIZES = {32: 512, 256: 64}  # rows of a batch, by their width: as in training


@torch.no_grad()
def measure(
    model: nn.Module,
    masker: nn.Module,
    settings: Settings,
    to_batch: Callable[[Rows], Batch],
    rows: Rows,
    masks_of: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Test on rows.

    Args:
        model: ``LlamaForCausalLM`` or one of the same structure.
        masker: where masks come from.
        settings: of the run.
        to_batch: puts rows on the device.
        rows: to test on.
        masks_of: numbers of the rows whose masks are used instead of each one's own.

    Returns:
        For every row ``nll`` (the sum, nats), ``targets`` (answer tokens), ``right``
        (whether all of them were the likeliest) and ``task``; where masks differ also ``within`` and
        ``between``: the mean overlap of two rows' masks, of one task and of two.
    """
    found: dict[str, list[Tensor]] = {"nll": [], "targets": [], "right": []}
    size = SIZES.get(rows.tokens.shape[1], 64)
    counts: dict[int, list] = {}
    for start in range(0, len(rows), size):
        numbers = np.arange(start, start + size)
        real = int((numbers < len(rows)).sum())
        numbers = numbers % len(rows)  # a last batch of the same size: one compilation
        batch = to_batch(rows.pick(numbers))
        chooser = batch if masks_of is None else to_batch(rows.pick(masks_of[numbers]))
        with torch.autocast("cuda", torch.bfloat16, enabled=batch.tokens.is_cuda):
            masks = masker(chooser, settings)
            nll, right = _answers(model, batch, masks)
        found["nll"].append(nll[:real])
        found["right"].append(right[:real])
        found["targets"].append(batch.targets.sum(dim=1)[:real])
        if masks is not None and len(masks) > 1:
            _count(counts, masks[:real] > 0, batch.task[:real])
    result = {n: torch.cat(parts).cpu().numpy() for n, parts in found.items()}
    result["task"] = rows.task
    return result | (_overlaps(counts, settings.k) if counts else {})


def _answers(
    model: nn.Module, batch: Batch, masks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return each row's summed loss, and whether every answer token was likeliest."""
    hidden = last_hidden(model.model, batch.tokens, masks)[:, :-1]
    targets = batch.targets
    logits = model.lm_head(hidden[targets]).float()
    wanted = batch.tokens[:, 1:][targets]
    losses = nn.functional.cross_entropy(logits, wanted, reduction="none")
    row = targets.nonzero()[:, 0]
    nll = torch.zeros(len(targets), device=losses.device).index_add_(0, row, losses)
    wrong = (logits.argmax(dim=-1) != wanted).float()
    missed = torch.zeros(len(targets), device=losses.device).index_add_(0, row, wrong)
    return nll, missed == 0


def _count(counts: dict[int, list], kept: Tensor, tasks: Tensor) -> None:
    """Add up in how many rows of each task a channel is kept."""
    for task in tasks.unique().tolist():
        own = kept[tasks == task]
        some = counts.setdefault(task, [0, 0.0])
        some[0] += len(own)
        some[1] = some[1] + own.sum(dim=0).float()


def _overlaps(counts: dict[int, list], k: int) -> dict[str, np.ndarray]:
    """Return the mean share of channels that two masks have in common, ``[L]`` each."""
    n = torch.tensor([c[0] for c in counts.values()], dtype=torch.float32)
    kept = torch.stack([c[1] for c in counts.values()]).cpu()  # [tasks, L, F]
    pairs = (kept**2).sum(dim=-1) - n[:, None] * k  # a row with itself does not count
    within = pairs / (n * (n - 1) * k)[:, None]
    share = kept / n[:, None, None]
    total = share.sum(dim=0).square().sum(dim=-1) - share.square().sum(dim=(0, -1))
    between = total / (len(n) * (len(n) - 1) * k)
    return {"within": within[n > 1].mean(dim=0).numpy(), "between": between.numpy()}


class PromptMasks(nn.Module):
    """Selection without training: the channels that a prompt uses most, GRIFFIN's
    statistic over all of its tokens, read off the dense model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.read = [model]  # in a list it is no part of this module

    @torch.no_grad()
    def forward(self, batch: Batch, settings: Settings) -> Tensor:
        """Return masks, float32 ``[B, L, F]``."""
        place = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
        real = (place < batch.prompt[:, None]).float()[..., None]
        found: list[Tensor] = []

        def record(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            square = inputs[0].float().square()
            share = square / square.sum(dim=-1, keepdim=True).clamp(min=1e-30)
            found.append((share * real).sum(dim=1).sqrt())

        blocks = self.read[0].model.layers
        hooks = [b.mlp.down_proj.register_forward_pre_hook(record) for b in blocks]
        try:
            last_hidden(self.read[0].model, batch.tokens, None, run=layer)
        finally:
            for hook in hooks:
                hook.remove()
        return top_k(torch.stack(found, dim=1), settings.k)
