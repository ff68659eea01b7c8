"""One training step: model and masker together, each with its own optimiser.

Sums, not means, are accumulated, and divided by the number of targets once: so the
same global batch gives the same step however it is split, over micro-batches or over
machines. The one exception is a mixture's balance, which is of the tokens that a machine
reads at once: every micro-batch's is weighted by its number of targets, so that the
total, divided by all targets, is the cross-entropy plus ``balance_weight`` times the
mean of the balances.
"""

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.nn.utils import average_gradients
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from ..slicing.masked import set_masks
from ..slicing.routing import overheard
from ..slicing.shapes import Plan
from .balance import balance_of
from .batches import Batch
from .maskers import Budget, Form, Masker, masked_layers

# What the dense model says at every token: logits [B, T - 1, V], or ids, weights and
# log-probabilities of some of them, [B, T - 1, W] each; see parent_cache.
Said = mx.array | tuple[mx.array, mx.array, mx.array]
Parent = Callable[[Batch], Said]
PARTS = ("llm", "masker")


class StepConfig(Protocol):
    """What a step needs to know; :class:`.recipe.TrainConfig` has it all."""

    steps: int
    lr: float
    masker_lr: float | None
    warmup: int
    weight_decay: float
    clip: float
    ce_weight: float
    kl_weight: float
    balance_weight: float


class Pair(nn.Module):
    """The model and its masker as one module.

    Args:
        llm: a stock mlx-lm model; its FFNs are masked in place.
        masker: where its masks come from.
    """

    def __init__(self, llm: nn.Module, masker: Masker) -> None:
        super().__init__()
        self.llm, self.masker = llm, masker

    @cached_property
    def inlets(self) -> list[nn.Module]:
        """The masked inlet of every layer."""
        return masked_layers(self.llm)

    def logits(self, batch: Batch, budget: Budget, form: Form | None) -> mx.array:
        """Return the masked model's logits, float32 ``[B, T - 1, V]``."""
        masks = self.masker(batch, budget, form)
        layers = self.inlets
        dense = mx.array(1.0)
        set_masks(layers, mx.ones((len(layers), 1)) if masks is None else masks)
        logits = self.llm(batch.tokens[:, :-1]).astype(mx.float32)
        for layer in layers:  # a mask left behind would be state of the next step
            layer._mask = dense
        return logits


def target_losses(logits: mx.array, batch: Batch) -> mx.array:
    """Return the cross-entropy of every target, 0 where it does not count.

    Args:
        logits: ``[B, T - 1, V]``.
        batch: the examples.

    Returns:
        Nats, float32 ``[B, T - 1]``.
    """
    losses = nn.losses.cross_entropy(logits, batch.tokens[:, 1:])
    return losses * batch.loss_mask[:, 1:]


def divergence(logits: mx.array, parent: Said, batch: Batch) -> mx.array:
    """Return KL(parent ‖ model) at every target, 0 where it does not count.

    Args:
        logits: ``[B, T - 1, V]``.
        parent: the dense parent's logits, same shape; or some of its ids with weights
            and log-probabilities, for an estimate. No gradient flows to it.
        batch: the examples.

    Returns:
        Nats, float32 ``[B, T - 1]``.
    """
    if not isinstance(parent, mx.array):
        ids, weights, logp = parent
        found = mx.take_along_axis(logits, ids, axis=-1)
        found = found - mx.logsumexp(logits, axis=-1, keepdims=True)
        return (weights * (logp - found)).sum(axis=-1) * batch.loss_mask[:, 1:]
    parent = mx.stop_gradient(parent.astype(mx.float32))
    truth, found = (nn.log_softmax(said, axis=-1) for said in (parent, logits))
    return (mx.exp(truth) * (truth - found)).sum(axis=-1) * batch.loss_mask[:, 1:]


class Step:
    """The state of training, and the step that changes it.

    Args:
        pair: model and masker; their trainable parameters are trained.
        config: learning rates, schedule, clipping, weights of the loss.
        compiled: use mx.compile (``MLX_DISABLE_COMPILE`` overrules it).
        plan: the plan of a mixture; needed if ``balance_weight`` is above 0.
    """

    def __init__(
        self,
        pair: Pair,
        config: StepConfig,
        *,
        compiled: bool = True,
        plan: Plan | None = None,
    ) -> None:
        self.pair, self.config, self._plan = pair, config, plan
        masker_lr = 0.1 * config.lr if config.masker_lr is None else config.masker_lr
        rates = dict(zip(PARTS, (config.lr, masker_lr), strict=True))
        self.optimizers = {
            part: optim.AdamW(
                schedule(rate, config.warmup, config.steps),
                weight_decay=config.weight_decay,
                bias_correction=True,
            )
            for part, rate in rates.items()
        }
        _check_types(pair)
        _ = pair.inlets  # masked before anything looks at the model's structure
        for part, optimizer in self.optimizers.items():
            optimizer.init(pair[part].trainable_parameters())
        self._backward, self._apply = self._gradient, self._descend
        if compiled:
            self._backward = _compile(self._gradient, [pair.state, mx.random.state])
            self._apply = _compile(self._descend, [pair.state, self.optimizer_state])

    @property
    def optimizer_state(self) -> dict[str, Any]:
        """The state of both optimisers, by part; the dictionaries are theirs."""
        return {part: o.state for part, o in self.optimizers.items()}

    def tensors(self) -> dict[str, mx.array]:
        """Return all that a later run needs to go on: what is trained, and the
        state of the optimisers.
        """
        trees = {
            "model": self.pair.trainable_parameters(),
            "optimizer": self.optimizer_state,
        }
        return dict(tree_flatten(trees))

    def restore(self, tensors: dict[str, mx.array]) -> None:
        """Take over what :meth:`tensors` of another run gave.

        Raises:
            ValueError: if it is of another model, masker or optimiser.
        """
        here = {name: array.shape for name, array in self.tensors().items()}
        there = {name: array.shape for name, array in tensors.items()}
        if here != there:
            odd = sorted(here.items() ^ there.items())[0][0]
            raise ValueError(
                f"The checkpoint does not fit this run ({odd} differs); use the same "
                "model and settings, or another output folder."
            )

        def take(prefix: str, tree: Any) -> Any:
            return tree_map_with_path(lambda p, _: tensors[f"{prefix}.{p}"], tree)

        self.pair.update(take("model", self.pair.trainable_parameters()))
        for part, optimizer in self.optimizers.items():
            # In place: the compiled step holds on to these dictionaries.
            optimizer.state.update(take(f"optimizer.{part}", optimizer.state))

    def __call__(
        self,
        batches: Iterable[Batch],
        budget: Budget,
        parent: Parent | None = None,
    ) -> dict[str, mx.array]:
        """Accumulate the gradient over micro-batches and descend once.

        Args:
            batches: micro-batches of this step; under mlx.launch, this machine's share.
            budget: how scores become masks, now.
            parent: returns the dense parent's logits; needed if ``kl_weight`` is above
                0.

        Raises:
            FloatingPointError: if the loss is NaN or infinite; nothing has changed.

        Returns:
            Scalars not evaluated yet: ``loss`` and ``ce`` (nats per target), ``kl``
            with a parent, ``balance`` if it has a weight, ``targets``, and the
            gradients' norms before clipping.
        """
        self.pair.train()
        sums, grads = None, None
        for batch in batches:
            logits = parent(batch) if parent is not None else None
            found, grads = self._backward(
                list(batch), logits, grads, budget.k, mx.array(budget.temperature),
                budget.gates, budget.granularity,
            )  # fmt: skip
            sums = found if sums is None else sums + found
            mx.eval(sums, grads)
        if sums is None or not mx.isfinite(sums[0]):
            raise FloatingPointError("The loss is not a finite number")
        totals, norms = self._apply(grads, sums)
        mx.eval(self.pair.parameters(), self.optimizer_state)
        targets = mx.maximum(totals[-1], 1)
        report = {"loss": totals[0] / targets, "ce": totals[1] / targets}
        if parent is not None:
            report["kl"] = totals[2] / targets
        if self.config.balance_weight:
            report["balance"] = totals[3] / targets
        report |= {f"{p}_grad_norm": n for p, n in zip(PARTS, norms, strict=True)}
        return report | {"targets": totals[-1]}

    def _gradient(
        self, arrays: list, parent: Any, before: Any, k: int, temperature: mx.array,
        gates: Any, granularity: int,
    ) -> tuple[mx.array, Any]:  # fmt: skip
        budget = Budget(k, temperature, gates, granularity)
        batch = Batch(*arrays)

        def loss() -> tuple[mx.array, mx.array]:
            logits, balance = self._forward(batch, budget)
            targets = batch.loss_mask[:, 1:].sum()
            ce = target_losses(logits, batch).sum()
            kl = mx.array(0.0)
            if parent is not None:
                kl = divergence(logits, parent, batch).sum()
            total = self.config.ce_weight * ce + self.config.kl_weight * kl
            total = total + self.config.balance_weight * targets * balance
            sums = [total, ce, kl, targets * balance, targets]
            return total, mx.stop_gradient(mx.stack(sums))

        (_, sums), grads = nn.value_and_grad(self.pair, loss)()
        if before is not None:
            grads = tree_map(mx.add, grads, before)
        return sums, grads

    def _forward(self, batch: Batch, budget: Budget) -> tuple[mx.array, mx.array]:
        """Return the logits, and the balance, 0 where it has no weight."""
        form = budget.training_form
        if not self.config.balance_weight:
            return self.pair.logits(batch, budget, form), mx.array(0.0)
        assert self._plan is not None
        with overheard(self.pair.llm, self._plan) as routing:
            logits = self.pair.logits(batch, budget, form)
        return logits, balance_of(*routing, batch.real)

    def _descend(self, grads: Any, sums: mx.array) -> tuple[mx.array, list[mx.array]]:
        world = mx.distributed.init()
        if world.size() > 1:
            grads = average_gradients(grads)
            sums = mx.distributed.all_sum(sums, stream=mx.cpu)
        # average_gradients has divided by the number of machines; undo that, and
        # divide by the number of targets on all of them.
        scale = world.size() / mx.maximum(sums[-1], 1)
        norms = []
        for part, optimizer in self.optimizers.items():
            own = tree_map(lambda g: g * scale.astype(g.dtype), grads.get(part, {}))
            if not tree_flatten(own):
                norms.append(mx.array(0.0))
                continue
            own, norm = optim.clip_grad_norm(own, self.config.clip)
            norms.append(norm)
            optimizer.update(self.pair[part], own)
        return sums, norms


def _check_types(pair: Pair) -> None:
    """Refuse weights that AdamW cannot train.

    Raises:
        ValueError: naming one.
    """
    for name, weight in tree_flatten(pair.trainable_parameters()):
        if weight.dtype == mx.float16:
            raise ValueError(
                f"{name} is float16, in which the squares of gradients that AdamW keeps "
                "become 0, so that the second step divides by 0; train in dtype: "
                "bfloat16, which is as small, or float32."
            )


def _compile(function: Callable, state: list) -> Callable:
    return mx.compile(function, inputs=state, outputs=state)


def schedule(rate: float, warmup: int, steps: int) -> Callable[[Any], mx.array]:
    """Return a learning rate that rises linearly, then falls to 0 along a cosine.

    Args:
        rate: the highest value.
        warmup: steps of the rise.
        steps: of the whole run.
    """
    fall = optim.cosine_decay(rate, max(1, steps - warmup))
    if not warmup:
        return fall
    rise = optim.linear_schedule(rate / (warmup + 1), rate, warmup)
    return optim.join_schedules([rise, fall], [warmup])
