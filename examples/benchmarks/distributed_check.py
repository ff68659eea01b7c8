"""Serve a compact folder with mlx-lm's own server on several ranks, and check it.

    python -m examples.benchmarks.distributed_check --model COMPACT --ranks 2

Starts `mlx.launch` with this many ring ranks on this machine, asks a question, decodes
greedily, and compares the answer with that of one process. ifp_mlx takes no part: a
compact folder is an ordinary model. Last line: JSON; the exit status is 1 if the
answers differ.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

QUESTION = "What is a fjord?"


def free_port() -> int:
    """Return a port that nobody listens at, with room for a rank or two above."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve(model: str, ranks: int, port: int, *, pipeline: bool) -> subprocess.Popen:
    """Start mlx-lm's server on `ranks` ring ranks of this machine."""
    launch = Path(sys.executable).with_name("mlx.launch")
    command = [str(launch), "-n", str(ranks), "--backend", "ring"]
    command += ["--starting-port", str(free_port()), "--", sys.executable, "-m"]
    command += ["mlx_lm", "server", "--model", model, "--port", str(port)]
    if pipeline:
        command.append("--pipeline")
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def ask(port: int, tokens: int) -> str:
    """Return the server's greedy answer."""
    body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body | {"max_tokens": tokens}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


def wait_for(port: int, process: subprocess.Popen) -> None:
    """Wait until the server answers."""
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return
        except (urllib.error.URLError, ConnectionError):
            if process.poll() is not None:
                break
            time.sleep(0.2)
    raise SystemExit("mlx_lm.server did not start; run the command by hand to see why.")


def alone(model: str, tokens: int) -> str:
    """Return one process's greedy answer."""
    from mlx_lm import generate, load

    lm, tokenizer = load(model, tokenizer_config={"trust_remote_code": False})
    messages = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return generate(lm, tokenizer, prompt, max_tokens=tokens)


def main() -> None:
    """Compare, and end with the report."""
    parser = argparse.ArgumentParser(description="Check a model on several ranks.")
    parser.add_argument("--model", required=True, help="a compact folder")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument(
        "--pipeline", action="store_true", help="by layers instead of inside them"
    )
    args = parser.parse_args()
    model, port = str(Path(args.model).resolve()), free_port()
    process = serve(model, args.ranks, port, pipeline=args.pipeline)
    try:
        wait_for(port, process)
        answer = ask(port, args.tokens)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
    expected = alone(model, args.tokens)
    same = answer == expected
    print(json.dumps({"ranks": args.ranks, "same_answer": same, "answer": answer}))
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
