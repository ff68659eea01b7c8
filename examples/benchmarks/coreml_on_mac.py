"""Run an exported package on a Mac: are the logits right, how fast, and on what.

    python -m examples.benchmarks.coreml_on_mac OUT.mlpackage [--function NAME]
                                                              [--units all]

NOT RUN ON A MAC: written on Linux against coremltools 9.0's interface, where nothing
after the check of the system can run. Needs macOS 15, `pip install coremltools`, and
beside the package the folder `OUT` that the export made: its `reference.npz` holds a
prompt and MLX's logits for it and 8 greedy tokens, its `manifest.json` the interface.

Prints one line each for the largest logit error, the tokens, the seconds of loading
(the first load compiles) and of prefill, the tokens per second, and how many operations
run on each kind of compute unit. Exits with 1 if the logits are off by more than 2 %.
"""

import argparse
import json
import platform
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

UNITS = {
    "gpu": "CPU_AND_GPU",  # what the exported layout is made for
    "ane": "CPU_AND_NE",
    "cpu": "CPU_ONLY",
    "all": "ALL",
}
LIMIT, SPEED_TOKENS = 0.02, 64


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("package", type=Path, help="the .mlpackage")
    parser.add_argument("--folder", type=Path, help="what the export wrote beside it")
    parser.add_argument("--function", help="one of the manifest's; default: the first")
    parser.add_argument("--units", choices=UNITS, default="gpu", help="default: gpu")
    args = parser.parse_args(argv)
    check_system()
    folder = companions(args.package, args.folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    function = args.function or next(iter(manifest["functions"]))
    stored = np.load(folder / "reference.npz")
    tokens, greedy = (
        stored[f"{function}.{name}"].tolist() for name in ("tokens", "continuation")
    )
    expected = stored[f"{function}.logits"].astype(np.float32)  # [steps + 1, V]

    started = time.perf_counter()
    model = load(args.package, function, UNITS[args.units])
    print(f"loaded in {time.perf_counter() - started:.1f} s")
    host = Host(model, int(manifest["consumer"] == "hf"), manifest["query_length"])
    started = time.perf_counter()
    rows = [host.feed(tokens)]
    print(f"prefill of {len(tokens)} tokens: {time.perf_counter() - started:.3f} s")
    rows += [host.feed([token]) for token in greedy[:-1]]
    found = np.stack(rows)
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    same = int((found.argmax(-1) == np.array(greedy)).sum())
    print(f"largest logit error: {error:.2%} of the largest logit")
    print(f"greedy tokens: {same} of {len(expected)} as MLX")

    print(f"decode: {speed(host, rows[-1], manifest['context_length']):.1f} tokens/s")
    for unit, count in plan(model, function, UNITS[args.units]).most_common():
        print(f"{count} operations on {unit}")
    sys.exit(0 if error <= LIMIT else 1)


def check_system() -> None:
    """Exit with 2 and a sentence where Core ML cannot run a package with a state."""
    version = platform.mac_ver()[0] or "0"
    if sys.platform != "darwin" or int(version.split(".")[0]) < 15:
        system = f"macOS {version}" if sys.platform == "darwin" else platform.system()
        fail(
            f"this needs macOS 15 or newer, and here is {system}; on other systems "
            "convert/coreml_verify.py runs the package in numpy."
        )


def fail(sentence: str) -> NoReturn:
    """Print a sentence on standard error and exit with 2."""
    print(f"coreml_on_mac.py: error: {sentence}", file=sys.stderr)
    sys.exit(2)


def companions(package: Path, folder: Path | None) -> Path:
    """Return the folder with manifest.json and reference.npz."""
    for place in [folder] if folder else [package.with_suffix(""), package.parent]:
        if all((place / name).is_file() for name in ("manifest.json", "reference.npz")):
            return place
    fail(
        f"no manifest.json and reference.npz were found beside {package}; name their "
        "folder with --folder."
    )


def load(package: Path, function: str, units: str) -> Any:
    """Return the model with one of its functions loaded."""
    import coremltools as ct

    return ct.models.MLModel(
        str(package), compute_units=ct.ComputeUnit[units], function_name=function
    )


class Host:
    """Does what an app does: keeps the state, counts tokens, makes the mask.

    Args:
        model: a loaded package.
        surplus: positions by which its mask is longer than the tokens so far.
        piece: the most tokens it takes at once.
    """

    def __init__(self, model: Any, surplus: int, piece: int) -> None:
        self.model, self.surplus, self.piece = model, surplus, piece
        self.state, self.past = model.make_state(), 0

    def feed(self, tokens: list[int]) -> np.ndarray:
        """Return the logits ``[V]`` after ``tokens``, float32."""
        logits = np.zeros((1, 1, 1))
        for start in range(0, len(tokens), self.piece):
            ids = np.array([tokens[start : start + self.piece]], np.int32)
            q = ids.shape[1]
            end = self.past + q + self.surplus
            mask = np.zeros((1, 1, 1 if self.surplus else q, end), np.float16)
            inputs = {"inputIds": ids, "causalMask": mask}
            logits = self.model.predict(inputs, state=self.state)["logits"]
            self.past += q
        return logits[0, -1].astype(np.float32)


def speed(host: Host, logits: np.ndarray, context: int) -> float:
    """Return greedy tokens per second from here on."""
    count = min(SPEED_TOKENS, context - host.past)
    started = time.perf_counter()
    for _ in range(count):
        logits = host.feed([int(logits.argmax())])
    return count / (time.perf_counter() - started)


def plan(model: Any, function: str, units: str) -> Counter[str]:
    """Count operations by the kind of unit that Core ML plans to run them on."""
    import coremltools as ct
    from coremltools.models.compute_plan import MLComputePlan

    plan = MLComputePlan.load_from_path(
        path=model.get_compiled_model_path(), compute_units=ct.ComputeUnit[units]
    )
    program = plan.model_structure.program
    counts: Counter[str] = Counter()
    for operation in program.functions[function].block.operations:
        usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
        if usage is not None:  # constants run nowhere
            counts[type(usage.preferred_compute_device).__name__] += 1
    return counts


if __name__ == "__main__":
    main()
