"""The engine's long checks, in one command.

    python -m examples.benchmarks.engine_check --model models/smollm2

- ends: processes that close the engine, forget it, or fail while it streams, eight of
  each, must end with their own exit status (a worker that is not ended aborts);
- rounds: fifty times prepare, generate, unload, then fifty times open and close: the
  memory after each must not grow;
- cancel: the steps that still run after a stop in prefill and in decode.

Last line: JSON; the exit status is 1 if a check fails.
"""

import argparse
import json
import subprocess
import sys
import time
from typing import Any

from tqdm import tqdm

from ifp_mlx.engine import CancelToken, Engine, Progress, Token

INSTRUCTION = "You translate English into French."
ENDING = """
import sys
from ifp_mlx.engine import Engine, Token
folder, how = sys.argv[1:]
engine = Engine.open(folder, prefill_step=16)
for event in engine.stream("Hello there, how are you?", max_tokens=50):
    if isinstance(event, Token):
        break
if how == "closed":
    engine.close()
elif how == "failed":
    sys.exit(3)
"""


def resident_kb() -> int:
    """Return the process's resident memory in kB, or 0 where /proc does not say."""
    try:
        with open("/proc/self/status", encoding="utf-8") as status:
            return next(int(x.split()[1]) for x in status if x.startswith("VmRSS"))
    except OSError:
        return 0


def ends(model: str, times: int) -> dict[str, list[int]]:
    """Return the exit statuses of processes that leave in different ways."""
    statuses: dict[str, list[int]] = {"closed": [], "forgotten": [], "failed": []}
    for _ in tqdm(range(times), desc="ends", disable=None):
        for how, found in statuses.items():
            command = [sys.executable, "-c", ENDING, model, how]
            found.append(subprocess.run(command, check=False).returncode)
    return statuses


def rounds(model: str, times: int) -> dict[str, Any]:
    """Return MLX's bytes after each round, and the process's memory in kB."""
    unloaded, closed, resident = [], [], []
    with Engine.open(model) as engine:
        for _ in tqdm(range(times), desc="unload", disable=None):
            engine.prepare(INSTRUCTION, name="french")
            engine.generate("Hi", task="french", max_tokens=2)
            engine.unload()
            unloaded.append(engine.memory()["active"])
            resident.append(resident_kb())
    import mlx.core as mx

    for _ in tqdm(range(times), desc="open", disable=None):
        with Engine.open(model) as engine:
            engine.prepare(INSTRUCTION)
        closed.append(mx.get_active_memory() + mx.get_cache_memory())
    half = len(resident) // 2
    return {
        "rounds": times,
        "active_after_first_unload": unloaded[0],
        "active_after_last_unload": unloaded[-1],
        "bytes_after_first_close": closed[0],
        "bytes_after_last_close": closed[-1],
        "resident_kb_halfway": resident[half],
        "resident_kb_last": resident[-1],
        "flat": unloaded[-1] <= unloaded[0] and closed[-1] <= closed[0],
    }


def cancel(model: str) -> dict[str, Any]:
    """Return how far prefill and decode went on after the stop."""
    step = 32
    with Engine.open(model, prefill_step=step, prompt_cache_bytes=0) as engine:
        engine.prepare(INSTRUCTION, name="french")
        stop, seen, seconds = CancelToken(), [], 0.0
        prompt = "word " * min(300, engine.context_length // 8)
        for event in engine.stream(prompt, task="french", stop=stop, max_tokens=9):
            if isinstance(event, Progress) and event.stage == "prefill":
                seen.append(event.done)
                if event.done and not stop.cancelled:
                    stop.cancel()
                    seconds = time.perf_counter()
        seconds = time.perf_counter() - seconds
        stop, tokens, at = CancelToken(), 0, 5
        for event in engine.stream("Count.", task="french", stop=stop, max_tokens=99):
            if isinstance(event, Token):
                tokens = event.number
                if tokens == at:
                    stop.cancel()
    first = next(done for done in seen if done)
    return {
        "prefill_steps_after_the_stop": (max(seen) - first) / step,
        "prefill_seconds_after_the_stop": round(seconds, 3),
        "tokens_after_the_stop": tokens - at,
    }


def main() -> None:
    """Run the checks and end with the report."""
    parser = argparse.ArgumentParser(description="Check the engine at length.")
    parser.add_argument("--model", required=True, help="a model folder")
    parser.add_argument("--times", type=int, default=8, help="processes of each kind")
    parser.add_argument("--rounds", type=int, default=50)
    args = parser.parse_args()
    report: dict[str, Any] = {"ends": ends(args.model, args.times)}
    report |= rounds(args.model, args.rounds) | cancel(args.model)
    print(json.dumps(report))
    expected = {"closed": {0}, "forgotten": {0}, "failed": {3}}
    clean = {how: set(found) for how, found in report["ends"].items()} == expected
    prompt = report["prefill_steps_after_the_stop"] <= 1
    sys.exit(0 if clean and report["flat"] and prompt else 1)


if __name__ == "__main__":
    main()
