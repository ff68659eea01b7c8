"""Train and test the arms of joint training on SmolLM2, with PyTorch on one GPU.

    python -m examples.benchmarks.joint.run --model models/smollm2 \
        --data models/joint --output OUT

Needs the output of prepare.py. Arms are trained in the order of ``ARMS``, each from the
same weights on the same batches, until the time is up; an arm with results is not
trained again.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from examples.benchmarks.joint import torch_step
from examples.benchmarks.joint.data import Rows, load
from examples.benchmarks.joint.measure import PromptMasks, measure
from examples.benchmarks.joint.torch_step import (
    Batch,
    FixedMasks,
    Predictor,
    Settings,
    Step,
    rate,
    top_k,
)

FACT_ROWS, INSTRUCTION_ROWS = 512, 64  # of a step: 16,384 tokens both
ALWAYS = 1000.0  # a score far above all others, as in ifp_mlx.training.warm_start
RATES = (3e-4, 6e-4, 1.2e-3)  # that the pilot chooses from, by the static arm
WARM_STEPS, WARM_RATE = 200, 1e-3  # of a predictor alone, before joint training
LOOKS = 8  # validations of an arm


@dataclass(frozen=True)
class Arm:
    """One training run.

    Attributes:
        kind: ``dense``; ``static``: one mask for all; ``added``: a predictor, which adds
            to a global prior; ``apart``: a predictor that keeps tasks apart, half of
            the channels being shared; ``oracle``: the masks that ``apart`` is to give,
            by the true task.
        keep: share of the channels.
        seed: of the data's order.
    """

    kind: str
    keep: float
    seed: int

    @property
    def name(self) -> str:
        """What it is called in files."""
        return f"{self.kind}-{self.keep:.3f}-{self.seed}"


HALF, THIRD, EIGHTH = 0.5, 1 / 3, 1 / 8
ARMS = [
    Arm("static", THIRD, 0), Arm("apart", THIRD, 0), Arm("dense", 1.0, 0),
    Arm("static", HALF, 0), Arm("apart", HALF, 0), Arm("oracle", THIRD, 0),
    Arm("static", THIRD, 1), Arm("apart", THIRD, 1),
    Arm("static", EIGHTH, 0), Arm("apart", EIGHTH, 0),
    Arm("static", HALF, 1), Arm("apart", HALF, 1), Arm("added", THIRD, 0),
    Arm("static", THIRD, 2), Arm("apart", THIRD, 2),
    Arm("static", EIGHTH, 1), Arm("apart", EIGHTH, 1),
    Arm("oracle", EIGHTH, 0), Arm("added", THIRD, 1),
]  # fmt: skip


class Data:
    """All rows on the device, and the batches of a seed."""

    def __init__(self, path: Path, device: str) -> None:
        self.rows, about = load(path)
        self.facts, self.tasks = about["facts"], about["tasks"]
        self.device = device

    def batch(self, rows: Rows) -> Batch:
        """Return rows on the device."""
        columns = (getattr(rows, c).astype(np.int64) for c in Batch._fields)
        return Batch(*(torch.from_numpy(c).to(self.device) for c in columns))

    def steps(self, count: int, seed: int) -> Iterator[Batch]:
        """Yield a batch for every step: two of facts, then one of instructions."""
        rng = np.random.default_rng(seed)
        facts, instructions = self.rows["facts"], self.rows["instructions"]
        epochs = np.arange(len(facts)).reshape(-1, self.facts)
        order = np.concatenate([rng.permutation(epoch) for epoch in epochs])
        other = rng.permutation(len(instructions))
        first = second = 0
        for number in range(count):
            if number % 3 < 2:
                chosen = order.take(range(first, first + FACT_ROWS), mode="wrap")
                first += FACT_ROWS
                yield self.batch(facts.pick(chosen))
            else:
                last = second + INSTRUCTION_ROWS
                chosen = other.take(range(second, last), mode="wrap")
                second = last
                yield self.batch(instructions.pick(chosen))

    def tests(self) -> dict[str, Rows]:
        """Return the sets that are only tested."""
        return {n[5:]: r for n, r in self.rows.items() if n.startswith("test ")}


class Lab:
    """The stock model, where maskers begin, and the training of an arm."""

    def __init__(self, model: nn.Module, start: Path, data: Data) -> None:
        self.model, self.data = model, data
        self.weights = {n: v.clone() for n, v in model.state_dict().items()}
        with np.load(start) as found:
            arrays = {name: found[name].astype(np.float32) for name in found}
        self.start = {n: torch.from_numpy(a).to(data.device) for n, a in arrays.items()}

    def kept(self, keep: float) -> int:
        """Return ``k``."""
        return round(keep * self.start["prior"].shape[1])

    def masker(self, arm: Arm) -> tuple[nn.Module, dict[str, float]]:
        """Return the source of an arm's masks, and figures to note about it."""
        prior, k = self.start["prior"], self.kept(arm.keep)
        if arm.kind == "dense":
            return FixedMasks(None), {}
        if arm.kind == "static":
            return FixedMasks(top_k(prior, k)), {}
        shared = ALWAYS * top_k(prior, k // 2)
        if arm.kind == "oracle":
            return FixedMasks(self._by_task(shared, k)), {}
        predictor = self._predictor(arm.kind)
        if arm.kind == "apart":
            left = self._tell_apart(predictor, arm.seed)
            predictor.expand.bias.data += shared.flatten()
            return predictor, {"codes not read": left}
        return predictor, {}

    def _predictor(self, kind: str) -> Predictor:
        weights = self.start
        backbone = copy.deepcopy(self.model.model)
        backbone.layers = backbone.layers[:2]
        backbone.embed_tokens.requires_grad_(False)
        rank = len(weights[f"{kind}.reduce.weight"])
        layers, channels = weights["prior"].shape
        predictor = Predictor(backbone, layers, channels, rank)
        for part in ("reduce", "expand"):
            for what in ("weight", "bias"):
                value = weights[f"{kind}.{part}.{what}"].clone()
                setattr(getattr(predictor, part), what, nn.Parameter(value))
        return predictor.to(self.data.device)

    def _tell_apart(self, predictor: Predictor, seed: int) -> float:
        """Train a predictor alone to read the task off the instruction; return the part
        of the tasks' codes that it does not learn.
        """
        settings = Settings(WARM_STEPS, WARM_RATE, 0.0, WARM_STEPS // 10, 0)
        codes = self.start["codes"]
        trained = [p for n, p in predictor.named_parameters() if "expand" not in n]
        optimizer = torch.optim.AdamW([p for p in trained if p.requires_grad])
        for number, batch in enumerate(self.data.steps(WARM_STEPS, seed)):
            with torch.autocast("cuda", torch.bfloat16, enabled=batch.tokens.is_cuda):
                missed = predictor.reduced(batch) - codes[batch.task]
            left = missed.square().sum() / codes[batch.task].square().sum()
            left.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.param_groups[0]["lr"] = rate(WARM_RATE, settings, number)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(left.detach())

    def _by_task(self, shared: Tensor, k: int) -> Tensor:
        codes, prior = self.start["codes"], self.start["prior"]
        scores = codes @ self.start["apart.expand.weight"].T
        scores = scores + self.start["apart.expand.bias"]
        masks = top_k(scores.unflatten(1, prior.shape) + shared, k)
        masks[codes.abs().sum(dim=1) == 0] = top_k(prior, k)  # no mask of their own
        return masks

    def train(self, arm: Arm, settings: Settings) -> tuple[nn.Module, list[dict]]:
        """Train an arm from the stock weights; return its masker and its log."""
        self.model.load_state_dict(self.weights)
        torch.manual_seed(arm.seed)
        masker, notes = self.masker(arm)
        log: list[dict[str, Any]] = [{"step": 0} | notes]
        step = Step(self.model, masker, settings)
        every = max(1, settings.steps // LOOKS)
        few = {
            n: r.pick(slice(None, None, 4)) if n == "facts" else r
            for n, r in self.data.tests().items()
            if n in ("facts", "seen")
        }
        for number, batch in enumerate(self.data.steps(settings.steps, arm.seed)):
            if number % every == 0:
                log.append({"step": number} | self.look(masker, settings, few))
            report = step([batch])
            kind = "instructions" if number % 3 == 2 else "facts"
            log.append({"step": number + 1, "of": kind} | report)
        done = {"step": settings.steps} | self.look(masker, settings, few)
        return masker, [{n: as_number(v) for n, v in x.items()} for x in [*log, done]]

    def look(self, masker: nn.Module, settings: Settings, sets: dict) -> dict:
        """Return validation losses and overlaps."""
        found: dict[str, float] = {}
        for name, rows in sets.items():
            seen = measure(self.model, masker, settings, self.data.batch, rows)
            found[f"valid {name}"] = float(seen["nll"].sum() / seen["targets"].sum())
            for overlap in ("within", "between"):
                if overlap in seen:
                    found[f"{overlap} {name}"] = float(seen[overlap].mean())
        return found

    def test(self, masker: nn.Module, settings: Settings) -> dict[str, np.ndarray]:
        """Return every measure of every test set, by ``SET.MEASURE``."""
        found: dict[str, np.ndarray] = {}
        for name, rows in self.data.tests().items():
            seen = measure(self.model, masker, settings, self.data.batch, rows)
            found |= {f"{name}.{n}": v for n, v in seen.items()}
            if isinstance(masker, Predictor):
                # With the masks of other rows, to see what a row's own are worth.
                order = np.random.default_rng(0).permutation(len(rows))
                other = measure(
                    self.model, masker, settings, self.data.batch, rows, order
                )
                found[f"{name}.shuffled_nll"] = other["nll"]
        return found

    def training_free(self) -> dict[str, np.ndarray]:
        """Return the test of the current model when prompts select without training."""
        found: dict[str, np.ndarray] = {}
        for keep in (HALF, THIRD, EIGHTH):
            settings = Settings(1, 0, 0, 0, self.kept(keep))
            tested = self.test(PromptMasks(self.model), settings)
            found |= {f"prompt-{keep:.3f}.{n}": v for n, v in tested.items()}
            fixed = FixedMasks(top_k(self.start["prior"], self.kept(keep)))
            tested = self.test(fixed, settings)
            found |= {f"static-{keep:.3f}.{n}": v for n, v in tested.items()}
        return found


def as_number(value: object) -> object:
    """Return a scalar that may still be on the device."""
    return float(value) if isinstance(value, Tensor) else value


def choose_rate(lab: Lab, settings: Settings, say: Callable[[str], None]) -> float:
    """Return the rate at which the static arm's last losses are lowest, on a seed of
    its own.
    """
    found = {}
    for lr in RATES:
        part = replace(settings, lr=lr, masker_lr=0.1 * lr)
        _, log = lab.train(Arm("static", THIRD, 100), part)
        last = [x["loss"] for x in log if "loss" in x][-settings.steps // 10 :]
        found[lr] = sum(last) / len(last)
        say(f"pilot: rate {lr:g}, last losses {found[lr]:.4f}")
    return min(found, key=lambda lr: found[lr])


def main(arguments: list[str] | None = None) -> None:
    """Train and test what the time allows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of SmolLM2")
    parser.add_argument("--data", type=Path, required=True, help="prepare.py's folder")
    parser.add_argument("--output", type=Path, required=True, help="folder of results")
    parser.add_argument("--steps", type=int, default=600, help="of every arm")
    parser.add_argument("--lr", type=float, help="default: chosen by a pilot")
    parser.add_argument("--seconds", type=float, default=1e9, help="time there is")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args(arguments)
    began = time.perf_counter()

    def say(line: str) -> None:
        print(f"{time.perf_counter() - began:6.1f} s  {line}", flush=True)

    lab = open_lab(args.model, args.data, compiled=not args.no_compile)
    args.output.mkdir(parents=True, exist_ok=True)
    say(f"{len(lab.data.tasks)} tasks, {lab.data.facts} facts")
    settings = Settings(args.steps, 0.0, 0.0, max(1, args.steps // 20), lab.kept(THIRD))
    lr = args.lr or choose_rate(lab, replace(settings, steps=args.steps // 2), say)
    settings = replace(settings, lr=lr, masker_lr=0.1 * lr)
    longest = 0.0
    for arm in ARMS:
        path = args.output / f"{arm.name}.npz"
        if path.exists():
            continue
        start = time.perf_counter()
        if start - began + 1.1 * longest > args.seconds:
            say(f"no time for {arm.name}")
            break
        run_arm(lab, arm, replace(settings, k=lab.kept(arm.keep)), path, say)
        longest = max(longest, time.perf_counter() - start)
    say("done")


def open_lab(model: Path, data: Path, *, compiled: bool) -> Lab:
    """Return the lab, on a GPU if there is one."""
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    if compiled:
        torch._dynamo.config.cache_size_limit = 64
        torch_step.layer = torch.compile(torch_step.layer, dynamic=False)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return Lab(loaded.to(device), data / "start.npz", Data(data / "rows.npz", device))


def run_arm(
    lab: Lab, arm: Arm, settings: Settings, path: Path, say: Callable[[str], None]
) -> None:
    """Train and test an arm, and write what was found."""
    began = time.perf_counter()
    masker, log = lab.train(arm, settings)
    seconds = time.perf_counter() - began
    found: dict[str, Any] = lab.test(masker, settings)
    if arm.kind == "dense":
        found |= lab.training_free()
    about = {"arm": arm.__dict__, "settings": settings.__dict__, "seconds": seconds}
    found["about"] = np.array(json.dumps(about | {"log": log}))
    scratch = path.with_suffix(".partial")
    with open(scratch, "wb") as file:
        np.savez_compressed(file, **found)
    scratch.rename(path)
    nll = found["facts.nll"].sum() / found["facts.targets"].sum()
    right = found["facts.right"].mean()
    seen = found["seen.nll"].sum() / found["seen.targets"].sum()
    say(
        f"{arm.name}: facts {nll:.3f} nats, {right:.1%} right; seen {seen:.3f}; "
        f"{seconds:.1f} s of training"
    )


if __name__ == "__main__":
    main()
