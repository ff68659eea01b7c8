"""The rows of the table: settings of the trainer from a file, and what is no setting.

Every row is trained by ``python -m ifp_mlx.train``'s own ``run``. Around it there is
what no setting says: a model that is cut once and for all, the two oracles, which are
told the true task, and selection without training.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import yaml
from mlx.utils import tree_flatten

from ifp_mlx import Selection, load
from ifp_mlx.files.atomic import new_folder
from ifp_mlx.files.config import read_config
from ifp_mlx.model.export import write_plain
from ifp_mlx.selection.top_k import select
from ifp_mlx.slicing.masked import set_masks
from ifp_mlx.slicing.plan import plan_of
from ifp_mlx.slicing.stock import build
from ifp_mlx.training import warm_start
from ifp_mlx.training.batches import Batch, in_order
from ifp_mlx.training.maskers import (
    Budget,
    FixedMask,
    Masker,
    PredictorMasker,
    ScoreTable,
    masked_layers,
)
from ifp_mlx.training.recipe import TrainConfig
from ifp_mlx.training.records import Reader

from .lab import DENSE, Scale, Trained
from .tasks import all_tasks

ROWS = Path(__file__).with_name("rows.yaml")
OWN = {"about", "hidden", "from", "data", "prune", "split", "oracle", "select", "steps"}
SEEN = 64  # batches of examples that a mask is made from


@dataclass(frozen=True)
class Table:
    """What the file of rows says, for one mix.

    Attributes:
        scale: sizes.
        steps: what start, second and both mean.
        rates: that each row's is chosen from.
        chooses: the seed that chooses.
        seeds: of the table.
        common: settings of every row.
        rows: by name.
        examples: rows of training data.
    """

    scale: Scale
    steps: dict[str, int]
    rates: list[float]
    chooses: int
    seeds: list[int]
    common: dict[str, Any]
    rows: dict[str, dict[str, Any]]
    examples: int

    @staticmethod
    def read(path: Path, mix: str, *, tiny: bool = False) -> "Table":
        """Read the file; ``tiny`` leaves a few steps, to see that all runs."""
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        sizes = dict(found["mixes"][mix])
        start, second = (4, 4) if tiny else (sizes.pop("start"), sizes.pop("second"))
        rows, test = (2048, 2) if tiny else (sizes.pop("rows"), sizes.pop("test"))
        names = {field.name for field in fields(Scale)}
        known = {name: size for name, size in sizes.items() if name in names}
        scale = Scale(mix=sizes.get("tasks", mix), test_per_task=test, **known)
        common = found["common"] | ({"warmup": 1} if tiny else {})
        if tiny:
            for row in found["rows"].values():
                row |= (
                    {"warm_steps": 2, "warm_start": 64} if "warm_steps" in row else {}
                )
        return Table(
            scale,
            {"start": start, "second": second, "both": start + second},
            sizes.get("rates", found["rates"]),
            found["chooses"],
            found["seeds"],
            common,
            found["rows"],
            rows,
        )

    def needs(self, row: str) -> list[str]:
        """Return the rows that a row goes on from, the first first, and itself."""
        before = self.rows[row]["from"]
        earlier = self.needs(before) if before in self.rows else []
        return [*earlier, row]

    def settings(self, row: str, rate: float, seed: int) -> dict[str, Any]:
        """Return a row's settings of the trainer, without steps and folders."""
        found = {n: v for n, v in self.rows[row].items() if n not in OWN}
        if found.get("masker_lr") == 1:  # as fast as the model
            found["masker_lr"] = rate
        depth = len(self.needs(row))  # each stage reads in another order
        chosen: dict[str, Any] = {"batch_size": self.scale.batch_size, "lr": rate}
        chosen |= {"target_size": self.scale.kept, "seed": 10 * seed + depth}
        return self.common | chosen | found


def prune(start: Path, data: Path, kept: int, out: Path) -> None:
    """Cut a model once, by activation × weight over training examples."""
    if out.exists():
        return
    model, _ = load(start)
    dense = model.dense()
    used = [
        np.exp(warm_start.channel_importance(dense, b)) for b in _first(model, data)
    ]
    inlets = plan_of(dense).inlets(dense)
    down = np.stack([np.linalg.norm(np.array(m.weight), axis=0) for m in inlets])
    scores = mx.array((np.concatenate(used).mean(axis=0) * down).astype(np.float32))
    selection = select(scores, [kept] * model.layers)
    write_plain(model, model.compact(selection), selection, out)


def split(start: Path, shape: Path, seed: int, out: Path) -> None:
    """Cut a model's FFNs into the experts of a mixture, once, of as many channels each.

    An expert is channels that lie side by side. A trained FFN's channels have no order
    that means anything, so this is as good as drawing them; channels that are used
    together would only help a router that knows it, and this one is small and random.
    Whichever ``K`` of ``E`` experts it takes, their weights are near ``1 / K``. Outputs
    of experts are about uncorrelated, so ``K`` of them, averaged, are as long as all,
    summed, if each is ``√(E · K)`` as long: by this ``down_proj`` is multiplied. With
    ``K = E`` and even weights it is the model as it was.

    Args:
        start: folder of the dense model.
        shape: folder of a mixtral without weights.
        seed: of the routers.
        out: where the mixture is written, unless it is there.
    """
    from mlx_lm.utils import save_config, save_model

    if out.exists():
        return
    model, _ = load(start)
    dense, config = model.dense(), read_config(shape / "config.json")
    mixture = build(config)
    E, K = config["num_local_experts"], config["num_experts_per_tok"]
    weights = dict(tree_flatten(dense.parameters()))
    for number, layer in enumerate(mixture.layers):
        for part in ("gate_proj", "up_proj", "down_proj"):
            whole = weights.pop(f"model.layers.{number}.mlp.{part}.weight")
            down = part == "down_proj"
            parts = mx.stack([*mx.split(whole, E, axis=int(down))])
            home = f"model.layers.{number}.block_sparse_moe"
            scale = (E * K) ** 0.5 if down else 1.0
            weights[f"{home}.switch_mlp.{part}.weight"] = scale * parts
        router, key = layer.block_sparse_moe.gate, mx.random.key(seed + number)
        drawn = mx.random.normal(router.weight.shape, scale=0.02, key=key)
        weights[f"{home}.gate.weight"] = drawn
    mixture.load_weights([*weights.items()])
    with new_folder(out) as scratch:
        shutil.copytree(shape, scratch, dirs_exist_ok=True)
        save_model(scratch, mixture)
        save_config(config, scratch / "config.json")


def oracle_table(start: Path, data: Path, kind: str, scale: Scale, seed: int) -> Masker:
    """Return masks of the true task, ``random`` or ``learned`` from what a task uses."""
    tasks = len(all_tasks(scale.mix))
    if kind == "random":
        scores = np.random.default_rng(seed).random(
            (tasks, scale.layers, scale.channels)
        )
        order = np.argsort(np.argsort(-scores, axis=-1), axis=-1)
        return FixedMask(mx.array((order < scale.kept).astype(np.float32)))
    model, _ = load(start)
    sums, counts = np.zeros((tasks, *model.plan.shape)), np.zeros(tasks)
    for batch in _first(model, data, scale.mix):
        np.add.at(
            sums,
            np.array(batch.tasks),
            warm_start.channel_importance(model.dense(), batch),
        )
        np.add.at(counts, np.array(batch.tasks), 1)
    mean = sums / np.maximum(counts, 1)[:, None, None]
    centred = mean - mean[counts > 0].mean(axis=0)
    centred /= centred[counts > 0].std(axis=-1).mean(axis=0)[:, None] + 1e-6
    return ScoreTable(mx.array(centred.astype(np.float32)))


def reader_of(tokenizer: Any, mix: str) -> Reader:
    """Return a reader that numbers tasks as the mix does."""
    reader = Reader(tokenizer, "sft", max_length=256)
    reader.tasks |= {task.name: number for number, task in enumerate(all_tasks(mix))}
    return reader


def _first(model: Any, data: Path, mix: str = "plain") -> list[Batch]:
    records = reader_of(model.tokenizer, mix).read(str(data), "train")
    return in_order(records[: SEEN * 32], 32)


class ActivationMasker(Masker):
    """Training-free selection: what the instruction's tokens use.

    Args:
        model: the dense model, which reads the instruction.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = [model]  # in a list, so that it is not a part of this module

    def scores(self, batch: Batch) -> mx.array:
        """Return the log of each channel's use, ``[B, L, F]``."""
        layers = masked_layers(self._model[0])
        set_masks(layers, mx.ones((len(layers), 1)))
        width = batch.instruction.shape[1]
        last = mx.arange(width) == batch.lengths[:, None] - 1
        alone = batch._replace(
            tokens=mx.pad(batch.instruction, [(0, 0), (0, 1)]),
            loss_mask=mx.pad(last.astype(mx.float32), [(0, 0), (0, 1)]),
        )
        return mx.array(warm_start.channel_importance(self._model[0], alone))


def opened(result: Path, scale: Scale, *, activation: bool = False) -> Trained:
    """Return what a run wrote, ready to be tested as it would answer."""
    from mlx_lm.utils import load_model

    model, masker, budget = load_model(result)[0], DENSE, Budget(scale.kept)
    mask = result.parent / "mask.safetensors"
    if activation:
        masker, budget = ActivationMasker(model), Budget(scale.kept, gates="binary")
    elif mask.exists():
        masker = FixedMask(Selection.load(mask).mask())
    elif (result.parent / "tasks.safetensors").exists():
        masker = _oracle(result.parent / "tasks.safetensors")
        budget = Budget(scale.kept, 0.3)
    elif (result / "predictor").exists():
        checkpoint, _ = load(result)
        own = checkpoint.ifp
        assert checkpoint.predictor is not None and own.target_size is not None
        masker = PredictorMasker(checkpoint.predictor)
        budget = Budget(own.target_size, own.temperature, own.gates)
    return Trained(model, masker, budget)


def _oracle(file: Path) -> Masker:
    found: Any = mx.load(str(file))
    return FixedMask(found["mask"]) if "mask" in found else ScoreTable(found["table"])


def train_oracle(
    config: TrainConfig, kind: str, scale: Scale, run: Callable[..., Any]
) -> dict[str, Any]:
    """Train a model that is told the true task; write it as a run of the trainer does.

    Args:
        config: complete settings; its masker is left out.
        kind: ``random`` or ``learned``.
        scale: sizes.
        run: the package's loop, :func:`ifp_mlx.training.run.train`.
    """
    from ifp_mlx.training.batches import Batches
    from ifp_mlx.training.trainee import adapt, open_trainee, write_checkpoint

    output = config.folder
    trainee = open_trainee(config)
    config = config.of()
    start, data = Path(config.model), Path(config.data)
    masker = oracle_table(start, data, kind, scale, config.seed)
    records = reader_of(trainee.tokenizer, scale.mix).read(config.data, "train")
    adapt(trainee.model, trainee.plan, config)
    batches = Batches(records, config.batch_size, config.seed)
    lines = run(trainee.model, masker, batches, config, folder=output)
    found = (
        {"table": masker.table}
        if isinstance(masker, ScoreTable)
        else {"mask": masker._mask}
    )
    mx.save_safetensors(str(output / "tasks.safetensors"), found)
    write_checkpoint(output / "model", trainee, None, None)
    return {"loss": lines[-1]["loss"]}
