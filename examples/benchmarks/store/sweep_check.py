"""A model that does not fit into memory is selected from, compacted and asked.

    python -m examples.benchmarks.store.sweep_check --large models/large

The folder is made, and deleted afterwards. Writes a random model of 3.8 GB (its answers
mean nothing; it only counts that they are the same) and runs under a limit on the
memory of the process: the dense model in mlx_lm, `generate --memory-gb` twice, and
then, without the limit, the same selection with everything in memory. The last line is
JSON.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from .store_check import PROMPT, child, write_large

MEMORY_GB, LIMIT_BYTES = 1.4, 2_200_000_000
FITS = 1038  # channels a layer, the most that may be kept; auto would ask a card first
TOKENS = 16


def ask(folder: Path, *options: Any, limit: int = 0) -> dict[str, Any]:
    """Return what `generate` reported, and its peak of memory."""
    command = ["ifp_mlx.generate", "--model", folder, "--prompt", PROMPT]
    command += ["--max-tokens", TOKENS, "--json", *options]
    status, lines = child(*command, limit=limit)
    if status or len(lines) < 2:
        raise SystemExit(f"generate ended with status {status}: {lines}")
    return json.loads(lines[-2]) | json.loads(lines[-1])


def check(folder: Path, scratch: Path) -> dict[str, Any]:
    """Run everything on a large folder; return the figures."""
    command = ["mlx_lm.generate", "--model", folder, "--prompt", PROMPT]
    dense, _ = child(*command, "--max-tokens", TOKENS, limit=LIMIT_BYTES)
    mask = scratch / "mask.safetensors"
    sweep = ["--memory-gb", MEMORY_GB, "--target-size", FITS]
    # Compensation reads a calibration text first, which takes minutes of a model this big.
    sweep += ["--selector", "activation", "--no-compensate", "--save-mask", mask]
    sweep += ["--cache-folder", scratch / "cache"]
    first, second = (ask(folder, *sweep, limit=LIMIT_BYTES) for _ in range(2))
    whole = ask(folder, "--mask-file", mask)
    kept = first["selection"]
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {
        "model, GB on disk": size / 1e9,
        "limit on the process, GB": LIMIT_BYTES / 1e9,
        "dense model under the limit": "fails" if dense else "runs",
        "memory allowed to --memory-gb, GB": MEMORY_GB,
        "kept channels": f"{kept['kept_channels']} of {kept['total_channels']}",
        "first run": first["cache"],
        "first run, select and load, s": first["seconds"]["select"],
        "first run, MLX's peak, GB": first["peak_memory_bytes"] / 1e9,
        "first run, peak of the process, GB": first["peak"] / 1e9,
        "second run": second["cache"],
        "second run, load, s": second["seconds"]["load"],
        "same text and mask twice": first["text"] == second["text"]
        and kept == second["selection"],
        "same text as with everything in memory": first["text"] == whole["text"],
        "everything in memory, peak of the process, GB": whole["peak"] / 1e9,
    }


def main() -> None:
    """Make the model, check, delete it, and end with the report."""
    parser = argparse.ArgumentParser(description="Check a model larger than memory.")
    parser.add_argument("--large", type=Path, required=True, help="must not be there")
    parser.add_argument("--like", type=Path, default=Path("models/smollm2"))
    args = parser.parse_args()
    scratch = args.large.with_name(args.large.name + "-scratch")
    scratch.mkdir(parents=True)
    try:
        figures = check(write_large(args.large, args.like), scratch)
    finally:
        for folder in (args.large, scratch):
            shutil.rmtree(folder, ignore_errors=True)
    for name, value in figures.items():
        text = f"{value:.3g}" if isinstance(value, float) else value
        print(f"{name:50} {text}", file=sys.stderr)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
