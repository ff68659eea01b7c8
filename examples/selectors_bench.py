"""Compare ways of selecting on ten families of tasks: the evidence for the defaults.

    python examples/selectors_bench.py [smollm2|gemma3] [--keep 0.5] [--rows 40] [--jobs 2]

Writes examples/selectors-MODEL.md. Every answer token is compared with the dense model's
next-token distribution. Rows that are measured already are not measured again, so a
stopped run goes on where it was. The masks of `others` saw only the other nine families,
those of `task` other examples of the same family, `blend` only the package's own
calibration text.
"""

import argparse
import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from bench_report import write_report
from fetch import MODELS, fetch
from task_families import write as write_families
from tqdm import tqdm

from ifp_mlx import Selection, load, selectors
from ifp_mlx.compensation import compensated_down
from ifp_mlx.evaluate import Row, read_rows
from ifp_mlx.pruning import PROJECTIONS, TappedFFN, ffn_layers, slice_ffn
from ifp_mlx.sensitivity import measure_sensitivity

ANSWER_TOKENS = 96
TASK_TOKENS = 1500  # of the calibration examples, for the task's own compensation

# name → where the scores come from, allocation, compensation, who reads the prompt
SETTINGS = {
    "activation, dense prompt": ("activation", "uniform", None, "dense"),
    "activation": ("activation", "uniform", None, "compact"),
    "activation, first layer": ("activation", "first-layer", None, "compact"),
    "blend, first layer": ("blend", "first-layer", None, "compact"),
    "blend, first layer, prompt": ("blend", "first-layer", "prompt", "compact"),
    "blend, sensitivity": ("blend", "sensitivity", None, "compact"),
    "blend, sensitivity, prompt": ("blend", "sensitivity", "prompt", "compact"),
    "others, first layer": ("others", "first-layer", None, "compact"),
    "task, sensitivity": ("task", "sensitivity", None, "compact"),
    "task, sensitivity, examples": ("task", "sensitivity", "examples", "compact"),
}
STATIC = ("others", "task")


class Bench:
    """One resident dense model whose FFNs are swapped for sliced ones."""

    def __init__(self, folder: Path, keep: float) -> None:
        self.model, self.tokenizer = load(folder)
        self.keep = keep
        prior = self.model.prior
        self.prior = self.model.compute_prior() if prior is None else prior
        if self.model.sensitivity is None:
            measure_sensitivity(self.model)
        self.dense = self.model.dense()
        mx.eval(self.dense.parameters())
        self.ffns = ffn_layers(self.dense)

    def read(self, tokens: list[int]) -> tuple[mx.array, list[mx.array]]:
        """Return the dense logits, ``[T, V]``, and each layer's channels, ``[T, F]``."""
        channels: list[mx.array] = []

        def keep(h: mx.array) -> mx.array:
            channels.append(h[0])
            return h

        with self.swapped([TappedFFN(ffn.module, keep) for ffn in self.ffns]):
            logits = self.dense(mx.array(tokens)[None])[0]
            mx.eval(logits, channels)
        return logits, channels

    @contextmanager
    def swapped(self, modules: list[nn.Module]) -> Iterator[None]:
        """Put other FFNs into the dense model for a while."""
        try:
            for (block, name, _), module in zip(self.ffns, modules, strict=True):
                setattr(block, name, module)
            yield
        finally:
            for block, name, module in self.ffns:
                setattr(block, name, module)

    def sliced(
        self, selection: Selection, channels: list[mx.array] | None
    ) -> list[nn.Module]:
        """Return the selected FFNs, compensated by what a text showed."""
        modules = []
        for layer, (_, _, ffn) in enumerate(self.ffns):
            index = selection.indices[layer]
            part = copy.copy(ffn)
            for name in PROJECTIONS:
                part[name] = copy.copy(ffn[name])
            slice_ffn(part, index)
            if channels is not None:
                down = ffn.down_proj.weight
                part.down_proj.weight = compensated_down(down, channels[layer], index)
            mx.eval(part.parameters())
            modules.append(part)
        return modules

    def answer(self, row: Row, modules: list[nn.Module], prompt: str) -> mx.array:
        """Return the log-probabilities at the answer, ``[A, V]``, the prompt read by
        the ``dense`` or the ``compact`` model.
        """
        from mlx_lm.models.cache import make_prompt_cache

        cache = make_prompt_cache(self.dense)
        first = mx.array([row.prompt])
        rest = mx.array([row.answer[:-1]], dtype=mx.int32)
        if prompt == "dense":
            logits = [self.dense(first, cache=cache)[0, -1:]]
            mx.eval(logits)
            with self.swapped(modules):
                logits += [self.dense(rest, cache=cache)[0]] if rest.size else []
                mx.eval(logits)
        else:
            with self.swapped(modules):
                both = mx.concatenate([first, rest], axis=1)
                logits = [self.dense(both, cache=cache)[0, first.size - 1 :]]
                mx.eval(logits)
        return log_probabilities(mx.concatenate(logits))

    def energy(self, texts: list[list[int]]) -> mx.array:
        """Return the statistic of some texts, ``[L, F]``."""
        return mx.square(selectors.prior_scores(self.dense, texts))


def log_probabilities(logits: mx.array) -> mx.array:
    """Return them in float32, evaluated."""
    found = nn.log_softmax(logits.astype(mx.float32), axis=-1)
    mx.eval(found)
    return found


def metrics(row: Row, reference: mx.array, found: mx.array) -> dict[str, float]:
    """Return a row's nll and kl in nats per token, and the agreement."""
    truth = mx.array(row.answer)[:, None]
    same = found.argmax(axis=-1) == reference.argmax(axis=-1)
    return {
        "nll": float(-mx.take_along_axis(found, truth, axis=-1).mean()),
        "kl": float((mx.exp(reference) * (reference - found)).sum(axis=-1).mean()),
        "agreement": float(same.astype(mx.float32).mean()),
    }


def measure_family(
    bench: Bench, family: str, rows: int, energies: dict, log: Path
) -> None:
    """Measure what is not in ``log`` yet of one family."""
    data = write_families()
    done = {(r["row"], r["setting"]) for r in read_log(log) if r["family"] == family}
    test = data / "test" / f"{family}.jsonl"
    texts = calibration(bench, family)
    static = static_scores(bench, family, energies)
    kept_modules: dict[str, list[nn.Module]] = {}
    test_rows = read_rows(
        test, bench.tokenizer, limit=rows, answer_tokens=ANSWER_TOKENS
    )
    for number, row in enumerate(tqdm(test_rows, family, disable=None)):
        todo = [name for name in SETTINGS if (number, name) not in done]
        if not todo:
            continue
        logits, channels = bench.read(row.prompt + row.answer[:-1])
        reference = log_probabilities(logits[len(row.prompt) - 1 :])
        channels = [h[: len(row.prompt)] for h in channels]
        scores = row_scores(bench, channels)
        for name in todo:
            source, allocation, text, prompt = SETTINGS[name]
            modules = kept_modules.get(name)
            if modules is None:
                selection = bench.model.select(
                    row.prompt,
                    keep=bench.keep,
                    allocation=allocation,  # type: ignore[arg-type]
                    scores=(static if source in STATIC else scores)[source],
                )
                seen = channels if text == "prompt" else None
                if text == "examples":
                    seen = bench.read(sum(texts, [])[:TASK_TOKENS])[1]
                modules = bench.sliced(selection, seen)
                if source in STATIC:
                    kept_modules[name] = modules
            found = bench.answer(row, modules, prompt)
            line = {"family": family, "row": number, "setting": name}
            with log.open("a") as file:
                file.write(json.dumps(line | metrics(row, reference, found)) + "\n")


def row_scores(bench: Bench, channels: list[mx.array]) -> dict[str, mx.array]:
    """Return the scores that a row's own prompt gives."""
    energy = []
    for h in channels:
        square = mx.square(h.astype(mx.float32))
        share = square / mx.maximum(square.sum(axis=-1, keepdims=True), 1e-30)
        energy.append(share.sum(axis=0))
    local = mx.sqrt(mx.stack(energy))
    return {
        "activation": local,
        "blend": selectors.blend_scores(local, bench.prior),
    }


def static_scores(bench: Bench, family: str, energies: dict) -> dict[str, mx.array]:
    """Return the scores that are the same for every row of a family."""
    shares = {name: e / e.sum(axis=1, keepdims=True) for name, e in energies.items()}
    return {
        "others": mx.sqrt(sum(s for name, s in shares.items() if name != family)),
        "task": mx.sqrt(energies[family]),
    }


def calibration(bench: Bench, family: str) -> list[list[int]]:
    """Return the tokens of a family's calibration examples, answers included."""
    file = write_families() / "calibration" / f"{family}.jsonl"
    rows = read_rows(file, bench.tokenizer, answer_tokens=ANSWER_TOKENS)
    return [row.prompt + row.answer for row in rows]


def family_energies(bench: Bench, families: list[str], file: Path) -> dict:
    """Return every family's statistic, kept in a file."""
    if not file.exists():
        found = {name: bench.energy(calibration(bench, name)) for name in families}
        mx.save_safetensors(str(file), found)
    return dict(mx.load(str(file)))  # type: ignore[arg-type]


def read_log(log: Path) -> list[dict]:
    """Return the results so far; a line that a kill cut short is left out."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def own_copy(source: Path) -> Path:
    """Return a linked copy of a model, to keep its prior and sensitivity apart: a
    stored prior would change what `--selector auto` means for the model's users.
    """
    copy = MODELS / "bench" / source.name
    if not copy.exists():
        scratch = copy.with_suffix(".partial")
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(source, scratch, copy_function=os.link)
        for file in ("prior.safetensors", "sensitivity.safetensors"):
            (scratch / file).unlink(missing_ok=True)
        scratch.rename(copy)
    return copy


def main() -> None:
    """Measure, in one process per job, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", default="smollm2")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--job", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = MODELS / "bench" / f"{args.name}-{args.keep:.3g}"
    folder.mkdir(parents=True, exist_ok=True)
    families = sorted(f.stem for f in (write_families() / "test").glob("*.jsonl"))
    bench = None
    if args.job is not None or not (folder / "energies.safetensors").exists():
        bench = Bench(own_copy(fetch(args.name)), args.keep)
        energies = family_energies(bench, families, folder / "energies.safetensors")
    if args.job is None:
        again = [sys.executable, __file__, *sys.argv[1:], "--job"]
        jobs = [subprocess.Popen([*again, str(job)]) for job in range(args.jobs)]
        if any(job.wait() for job in jobs):
            sys.exit("A job failed; run this again to go on.")
        logs = [read_log(folder / f"{family}.jsonl") for family in families]
        lines = [line for log in logs for line in log if line["setting"] in SETTINGS]
        write_report(args.name, args.keep, lines)
        return
    assert bench is not None
    for family in families[args.job :: args.jobs]:
        measure_family(bench, family, args.rows, energies, folder / f"{family}.jsonl")


if __name__ == "__main__":
    main()
