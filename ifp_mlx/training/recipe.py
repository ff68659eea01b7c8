"""Every setting of a training run: its meaning, default, key in a file, and flag."""

import argparse
import difflib
import math
from collections.abc import Sequence
from dataclasses import Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np

from ..files.paths import named_path, path_of
from ..selection.config import IFPConfig
from ..selection.request import check_seed
from ..selection.widths import check_multiple, target_size
from ..slicing.shapes import Unit
from .groups import How
from .maskers import Budget
from .records import Stage


def key(default: Any, meaning: str) -> Any:
    """Declare a setting: its default and what it means."""
    return field(default=default, metadata={"help": meaning})


@dataclass
class TrainConfig:
    """The settings of a run, and the only place where a default stands.

    The defaults of ``scores`` and ``decorrelate`` depend on ``from_scratch``. A
    pretrained model has channels that every task needs: its scores are a global prior
    plus what the instruction adds, since centring would no longer keep those channels.
    A model that learns from scratch has none yet, and there centred and decorrelated
    scores keep the masks of different tasks apart. Where tasks compete for capacity in
    a small model of your own, ``scores: centred`` is worth a try after pretraining too.

    A setting that is ``None`` or ``auto`` is open until the model is known: see
    :meth:`of`.
    """

    # fmt: off
    model: str = key("", "folder or hub id of the model")
    data: str = key("", "folder with train.jsonl and valid.jsonl, or a hub data set's id")
    output: str = key("", "folder of the run; one that is there is resumed")
    stage: Stage = key("sft", "sft: the first user message selects, the answer is learned; pretrain: a chunk selects, the next is learned; recover: what a mask keeps learns from the dense model")
    from_scratch: bool = key(False, "start from random weights of the model's shape")
    dtype: Literal["float32", "bfloat16", "float16", "stored"] = key("float32", "type of the model's weights while training and in the result")

    max_length: int = key(2048, "most tokens of an example")
    chunk: int = key(512, "tokens of a chunk in pretrain")
    chunk_masks: Literal["last", "each"] = key("last", "pretrain: last: every chunk is an example, all its context under the mask of the chunk before it; each: a text is read once, every chunk under the mask of the chunk before it, as when channels are selected again while generating; it costs one pass over a text of n chunks, where last costs n - 1")
    skip_bad: bool = key(False, "leave bad rows out instead of refusing the file")

    mask_file: str | None = key(None, "recover: what is kept")
    compensate: bool = key(True, "recover: begin with down_proj solved to make up for the dropped channels")
    prompt_weight: float = key(0.3, "recover: weight of a prompt's tokens, where an answer's have 1")
    parent_top: int = key(48, "recover: most likely tokens of the dense model that are kept for each token")
    parent_samples: int = key(16, "recover: tokens that are drawn from the others")

    masker: Literal["predictor", "static", "dense"] = key("predictor", "where masks come from: a predictor, one learned mask, or none")
    keep: float | None = key(None, "kept share of the FFN channels, or of a mixture's experts; default: what the model was trained for, else 0.5")
    target_size: int | None = key(None, "kept channels, or experts, per layer, instead of keep")
    granularity: int | None = key(None, "channels per selectable block; default: the model's own, else 1")
    shared: int | None = key(None, "channels, or experts, per layer that are always on, out of the kept ones; default: the model's own, else 0")
    gates: Literal["auto", "soft", "binary"] = key("auto", "whether kept channels are weighted by their soft mask, in training and inference; auto: as the model was trained, else soft, and binary for experts, which know no other")
    temperature: float | None = key(None, "of the soft top-k, in units of the scores, whose spread is 1; default: the model's own, else 0.3")
    anneal_keep: int = key(0, "steps over which keep falls from 1 to its value")
    largest_keep: float | None = key(None, "train for larger shares too: every fourth step keeps this one, and every fourth one drawn between it and keep, so that a larger --keep hardly answers worse; default: keep alone")
    anneal_temperature: int = key(0, "steps over which the temperature falls to its value")
    start_temperature: float = key(1.0, "temperature at step 0, if annealed")

    predictor: str = key("auto", "auto: the model's own trained predictor goes on, head and all, else first-layers; first-layers: a copy of the model's own, its experts too; new: small and random, without experts; or the folder of a trained predictor, or the folder or hub id of a language model")
    predictor_layers: int = key(2, "layers of a predictor that is first-layers or new")
    predictor_width: int = key(64, "hidden size of a predictor that is new")
    predictor_rank: int = key(128, "width between the two linear layers of its head")
    pooling: Literal["mean", "last"] = key("mean", "which of its hidden states the head reads; the paper: last")
    warm_start: int = key(512, "training examples from which a new head is solved before step 0; 0: begin with a random head")
    groups: How = key("auto", "whose masks begin the same: task: rows of one task, where rows name theirs; words: rows that seem to ask the same, judged by the words that rows with equal answers share; auto: the first of these that the data allow; off: no one's")
    warm_steps: int = key(300, "steps of the predictor alone, before step 0, in which it learns to tell the groups apart")
    warm_lr: float = key(1e-3, "highest learning rate of these")
    scores: Literal["auto", "layer", "centred", "none"] = key("auto", "how they are normalised before step 0: layer: a spread of 1 per layer, which with a warm start is a global prior plus the instruction's part; centred: that part alone; none: not")
    decorrelate: bool | None = key(None, "make the instruction's part equally strong in all its directions; default: if centred")

    train: Literal["full", "ffn", "lora", "dora", "frozen"] = key("full", "what of the model is trained; ffn: FFNs and norms, of a mixture its blocks with router and all experts; lora: adapters on all linear layers, router and experts too; frozen: the masker only")
    freeze_router: bool = key(False, "of a mixture: leave its routers as they are, while experts are trained as train says")
    lora_rank: int = key(8, "rank of LoRA or DoRA")
    lora_scale: float = key(20.0, "scale of LoRA or DoRA")
    lora_layers: int = key(-1, "last layers that get LoRA; -1: all")

    steps: int = key(1000, "steps of the optimiser; more than a finished run made: it goes on")
    batch_size: int = key(8, "examples of a micro-batch, all machines together")
    accumulate: int = key(1, "micro-batches per step")
    lr: float = key(1e-4, "highest learning rate of the model")
    masker_lr: float | None = key(None, "of the predictor; default: a tenth of lr, since masks that move faster than the model can follow collapse")
    warmup: int = key(0, "steps over which learning rates rise")
    weight_decay: float = key(0.01, "of AdamW")
    clip: float = key(1.0, "largest norm of the gradient, of model and masker apart")
    ce_weight: float = key(1.0, "weight of the cross-entropy")
    kl_weight: float = key(0.0, "weight of the KL from the dense model as it was at the start, or from the teacher")
    balance_weight: float = key(0.0, "of a mixture: weight of the loss that keeps its router from sending all tokens to few experts")
    teacher: str | None = key(None, "folder or hub id of the model that the KL is from, of the same tokens")
    grad_checkpoint: bool = key(False, "compute activations again instead of keeping them: less memory, more time")
    compile: bool = key(True, "use mx.compile; MLX_DISABLE_COMPILE overrules it")
    seed: int = key(0, "of everything random")

    eval_every: int = key(100, "steps between validations")
    eval_batches: int = key(16, "batches of the validation set to use; 0: all")
    log_every: int = key(10, "steps between lines of the log")
    save_every: int = key(100, "steps between checkpoints")
    watch: Literal["stop", "off"] = key("stop", "stop when masks no longer depend on the instruction")
    # fmt: on

    def budget(self, channels: int, step: int | None = None) -> Budget:
        """Return how scores become masks at a step, or at the end.

        Args:
            channels: ``F``, or how many experts there are.
            step: steps already made; ``None`` is the end of annealing.

        Raises:
            ValueError: if keep, target size and granularity do not fit.
        """
        if self != (settled := self.of()):
            return settled.budget(channels, step)
        granularity, temperature = _known(self.granularity), _known(self.temperature)
        k = self.target_size
        if k is None:
            k = target_size(channels, _known(self.keep), granularity)
        check_multiple(k, granularity, channels)
        if step is not None and step < self.anneal_keep:
            # In sixteenths, since a step is compiled anew for every new k.
            left = 1 - int(16 * step / self.anneal_keep) / 16
            k += round((channels - k) * left) // granularity * granularity
        if step is not None and step % 2 and self.largest_keep is not None:
            most = target_size(channels, self.largest_keep, granularity)
            k = max(k, self._larger(k, most, step) // granularity * granularity)
        if step is not None and step < self.anneal_temperature:
            done = step / self.anneal_temperature
            ratio = temperature / self.start_temperature
            temperature = self.start_temperature * ratio**done
        assert self.gates != "auto"
        return Budget(k, temperature, self.gates, granularity)

    def _larger(self, k: int, most: int, step: int) -> int:
        """Return how many units an odd step keeps, above ``k``: ``most`` in every
        second odd step, else a number drawn in sixteenths of the way from ``k`` to it.

        Source: the smallest, the largest and others, as in universally slimmable
        networks (Yu and Huang 2019, arXiv:1903.05134).
        """
        if step % 4 == 1:
            return most
        drawn = int(np.random.default_rng((self.seed, step)).integers(1, 16))
        return k + round((most - k) * drawn / 16)

    def of(self, unit: Unit = "channel", own: IFPConfig | None = None) -> "TrainConfig":
        """Return the settings with the open ones filled in: from the checkpoint that is
        trained further, else by default.

        Args:
            unit: what is kept or dropped.
            own: the ifp_config.json of a checkpoint with a predictor, or ``None``.
        """
        gates: Any = "binary" if unit == "expert" else "soft"
        found: dict[str, Any] = {"temperature": 0.3, "granularity": 1, "shared": 0}
        size: dict[str, Any] = {"keep": 0.5}
        if own is not None:
            gates, found = own.gates, {name: getattr(own, name) for name in found}
            size = {"target_size": own.target_size}
        found = {n: value for n, value in found.items() if getattr(self, n) is None}
        if self.gates == "auto":
            found["gates"] = gates
        if self.keep is None and self.target_size is None:
            found |= size
        return replace(self, **found) if found else self

    def score_kind(self) -> tuple[str, bool]:
        """Return ``scores`` and ``decorrelate`` with their defaults resolved."""
        scores: str = self.scores
        if scores == "auto":
            scores = "centred" if self.from_scratch else "layer"
        if self.decorrelate is None:
            return scores, scores == "centred"
        return scores, self.decorrelate

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return path_of(self.output)

    def check(self) -> None:
        """Raise ``ValueError`` naming the first setting that makes no sense."""
        for name in ("model", "data", "output"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing; give --{name} or the key {name}.")
        check_seed(self.seed)
        self._check_numbers()
        if self.stage == "recover":
            self._check_recovery()
        if self.train == "frozen" and self.masker == "dense":
            raise ValueError(
                "train: frozen with masker: dense leaves nothing to train."
            )
        granularity = self.granularity or 1
        if self.shared and (self.shared % granularity or not self.warm_start):
            raise ValueError(
                f"shared={self.shared} must be a multiple of granularity "
                f"{granularity}, and needs a warm_start to know the channels."
            )
        if self.largest_keep is not None and self.masker == "dense":
            raise ValueError(
                "largest_keep is for masks that are trained; leave it out with masker: "
                "dense and in the stage recover."
            )
        if (self.largest_keep or 1) < (self.keep or 0):
            raise ValueError(
                f"largest_keep={self.largest_keep} must not be below keep={self.keep}."
            )
        if self.ce_weight == self.kl_weight == 0:
            raise ValueError("ce_weight and kl_weight are both 0: nothing to learn.")

    def _check_numbers(self) -> None:
        given = {n: v for n, v in asdict(self).items() if isinstance(v, int | float)}
        for name, value in given.items():
            least = -1 if name == "lora_layers" else 0
            if (
                not math.isfinite(value)
                or value < least
                or (value == 0 and name in POSITIVE)
            ):
                more = "above" if name in POSITIVE else "not below"
                raise ValueError(f"{name}={value} must be a number {more} {least}.")
        for name, most in MOST.items():
            if given.get(name, 0) > most:
                raise ValueError(f"{name}={given[name]} must be at most {most}.")

    def _check_recovery(self) -> None:
        if not self.mask_file:
            raise ValueError(
                "The stage recover needs a mask; give --mask-file or --task."
            )
        if self.masker != "dense" or self.from_scratch:
            raise ValueError(
                "The stage recover trains the compact model of a fixed mask; leave out "
                "masker and from_scratch."
            )
        if self.parent_top < 1 or min(self.parent_samples, self.prompt_weight) < 0:
            raise ValueError(
                f"parent_top={self.parent_top} must be above 0, parent_samples="
                f"{self.parent_samples} and prompt_weight={self.prompt_weight} not below."
            )


POSITIVE = {"steps", "batch_size", "accumulate", "lr", "temperature", "clip", "keep"}
POSITIVE |= {"eval_every", "log_every", "save_every", "granularity", "target_size"}
POSITIVE |= {"largest_keep", "max_length", "chunk", "start_temperature", "lora_rank"}
POSITIVE |= {"predictor_layers", "predictor_width", "predictor_rank"}
# AdamW moves every weight by about the rate: above 1 nothing is left of a model.
MOST = {"keep": 1, "largest_keep": 1, "lr": 1, "masker_lr": 1, "warm_lr": 1}


def _known(value: Any) -> Any:
    """Return a setting that is no longer open."""
    assert value is not None
    return value


# Where the stage recover differs from the others in its defaults.
RECOVER: dict[str, Any] = {
    "masker": "dense",
    "ce_weight": 0.0,
    "kl_weight": 1.0,
    "train": "ffn",
}
RECOVER |= {"watch": "off", "lr": 3e-4}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` a flag for every key, and ``--config``."""
    parser.add_argument(
        "--config", type=named_path, help="YAML or JSON file with any of these keys"
    )
    hints = get_type_hints(TrainConfig)
    for item in fields(TrainConfig):
        kind, choices = _kind(hints[item.name])
        default = "" if item.default in (None, "") else f" (default: {item.default})"
        text = (item.metadata["help"] + default).replace("%", "%%")
        flag = "--" + item.name.replace("_", "-")
        if kind is bool:
            action: Any = argparse.BooleanOptionalAction
            parser.add_argument(flag, action=action, default=None, help=text)
        else:
            parser.add_argument(flag, type=kind, choices=choices, help=text)


def from_options(args: argparse.Namespace) -> TrainConfig:
    """Put defaults, the file and the flags together; the later ones win.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a key or value in it is unknown.
    """
    names = [item.name for item in fields(TrainConfig)]
    given = {n: getattr(args, n) for n in names if getattr(args, n) is not None}
    return complete(args.config, given)


def complete(file: Path | None, given: dict[str, Any]) -> TrainConfig:
    """Return the settings of a file, overridden by those in ``given``.

    Raises:
        FileNotFoundError, ValueError: as :func:`from_options`.
    """
    values = (read_file(file) if file is not None else {}) | given
    if values.get("stage") == "recover":
        values = RECOVER | values
    config = TrainConfig(**values)
    config.check()
    return config


def read_file(path: Path) -> dict[str, Any]:
    """Read a YAML or JSON file of settings, checked key by key."""
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"There is no config file {path}.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is neither YAML nor JSON: {error}.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no keys; see python -m ifp_mlx.train --help.")
    known = {item.name: item for item in fields(TrainConfig)}
    return {
        name: _checked(path, name, value, known)
        for name, value in ((str(n).replace("-", "_"), v) for n, v in values.items())
    }


def _checked(path: Path, name: str, value: Any, known: dict[str, Field]) -> Any:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ValueError(f"{path} has the unknown key {name}{hint}")
    if value is None:
        return known[name].default
    kind, choices = _kind(get_type_hints(TrainConfig)[name])
    try:
        if isinstance(value, bool) != (kind is bool):
            raise ValueError
        made = kind(value)  # YAML takes 1e-4 for a string
        if kind is int and made != float(value):
            raise ValueError
        value = made
        if choices and value not in choices:
            raise ValueError
    except (TypeError, ValueError):
        needed = (
            f"one of {', '.join(choices)}" if choices else f"of type {kind.__name__}"
        )
        raise ValueError(f"{path}: {name}={value!r} must be {needed}.") from None
    return value


def _kind(hint: Any) -> tuple[Any, Sequence[str] | None]:
    """Return the type of a key and, where there are few values, the values."""
    if get_origin(hint) is Literal:
        return str, get_args(hint)
    parts = [part for part in get_args(hint) if part is not NoneType]
    return (parts[0] if parts else hint), None
