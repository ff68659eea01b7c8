"""Load a server the way many clients do, and check every answer.

    python -m examples.benchmarks.server.server_load \
        --model models/smollm2 --clients 32 --seconds 180

Starts a server of its own on a free port, with four tasks, and measures four things:

- every answer under load equals the answer to the same request alone (greedy), and
  names the same mask; if the model's template knows tools, some requests have tools
  that may or must be called;
- fairness: the slowest client's mean wait for an answer over the fastest's;
- throughput of requests for one mask, together over one at a time;
- a client that is killed (SIGKILL) while it streams leaves no work behind.

Needs `pip install '.[server]' httpx`. The figures are those of the machine it runs on.
Last line: JSON; the exit status is 1 if an answer was wrong or anything failed.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from statistics import mean, median
from typing import Any

import httpx

TASKS = {
    "french": "You translate English into French.",
    "code": "You write short Python functions.",
    "story": "You tell bedtime stories for small children.",
    "sums": "You solve arithmetic problems step by step.",
}
PROMPTS = [
    "Good morning, how are you today?",
    "What is seven times eight?",
    "A dog finds a key.",
    "Sort a list of names by their length, and say how it works in one sentence.",
    "Why?",
]
STREAMER = """
import json, sys, urllib.request
url, model = sys.argv[1:]
body = {"model": model, "messages": [{"role": "user", "content": "Count to 900."}],
        "max_tokens": 400, "stream": True, "logit_bias": json.loads(sys.stdin.read())}
request = urllib.request.Request(url + "/v1/chat/completions", json.dumps(body).encode(),
                                 {"Content-Type": "application/json"})
with urllib.request.urlopen(request) as answer:
    for line in answer:
        print(line.decode().strip(), flush=True)
"""
ADD = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": ADD}},
    {"type": "function", "function": {"name": "now", "description": "Tells the time."}},
]
# Model, prompt, and the choice of tools; none is no tools at all.
Case = tuple[str, str, str]
Answered = tuple[str, str, int]


class Server:
    """A server in a process of its own.

    Attributes:
        url: where it listens.
        model: its name of the model.
    """

    def __init__(self, model: str, options: list[str]) -> None:
        prepare = [f"--prepare={name}={text}" for name, text in TASKS.items()]
        command = [sys.executable, "-m", "ifp_mlx.server", "--model", model]
        self.process = subprocess.Popen(
            [*command, "--port", "0", *prepare, *options],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        said = ""
        for line in self.process.stderr:
            said += line
            if found := re.match(r"(.+) is served at (http://\S+)/v1", line):
                self.model, self.url = found.groups()
                return
        raise RuntimeError(f"The server did not start: {said}")

    def stop(self) -> int:
        """Ask it to stop, and return its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def running(self) -> int:
        """Return how many requests it is working on."""
        return int(httpx.get(f"{self.url}/health").json()["running"])


async def ask(
    client: httpx.AsyncClient, case: Case, tokens: int, *, stream: bool
) -> Answered:
    """Return the text and calls, the mask and the token count of one answer."""
    model, prompt, choice = case
    body: dict[str, Any] = {"model": model, "max_tokens": tokens, "temperature": 0}
    body["messages"] = [{"role": "user", "content": prompt}]
    if choice != "none":
        body |= {"tools": TOOLS, "tool_choice": choice}
    path = "/v1/chat/completions"
    if not stream:
        response = await client.post(path, json=body)
        response.raise_for_status()
        whole = response.json()
        text = said([whole["choices"][0]["message"]])
        return text, whole["ifp"]["mask_id"], whole["usage"]["completion_tokens"]
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    chunks = []
    async with client.stream("POST", path, json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                chunks.append(json.loads(line[6:]))
    assert line == "data: [DONE]" or not line
    deltas = [c["choices"][0]["delta"] for c in chunks if c["choices"]]
    text = said(deltas)
    mask = next(c["ifp"]["mask_id"] for c in chunks if "ifp" in c)
    return text, mask, chunks[-1]["usage"]["completion_tokens"]


def said(messages: list[dict[str, Any]]) -> str:
    """Return all text of a message, or of its pieces: thoughts, text and calls."""
    text = "".join(m.get("reasoning") or "" for m in messages)
    text += "".join(m.get("content") or "" for m in messages)
    for called in (call for m in messages for call in m.get("tool_calls") or ()):
        function = called["function"]
        text += f"{function.get('name', '')}{function['arguments']}"
    return text


async def knows_tools(client: httpx.AsyncClient, model: str) -> bool:
    """Whether the server's model takes tools."""
    body = {"model": model, "max_tokens": 1, "tools": TOOLS}
    body |= {"messages": [{"role": "user", "content": "Hello"}]}
    response = await client.post("/v1/chat/completions", json=body)
    return response.status_code == 200


async def crowd(
    client: httpx.AsyncClient, alone: dict[Case, Answered], args: argparse.Namespace
) -> dict[str, Any]:
    """Let all clients ask for a while; compare each answer with that alone."""
    end = time.monotonic() + args.seconds
    wrong: list[Any] = []
    waits: list[list[float]] = [[] for _ in range(args.clients)]

    async def one(number: int) -> None:
        rng = random.Random(number)
        while time.monotonic() < end or not waits[number]:
            case = rng.choice(sorted(alone))
            start = time.monotonic()
            found = await ask(client, case, args.tokens, stream=rng.random() < 0.5)
            waits[number].append(time.monotonic() - start)
            if found != alone[case]:
                wrong.append((case, found, alone[case]))

    start = time.monotonic()
    await asyncio.gather(*(one(number) for number in range(args.clients)))
    means = [mean(times) for times in waits]
    for case, found, expected in wrong[:3]:
        print(f"WRONG {case}: {found} instead of {expected}", file=sys.stderr)
    return {
        "clients": args.clients,
        "seconds": round(time.monotonic() - start, 1),
        "answers": sum(map(len, waits)),
        "wrong_answers": len(wrong),
        "mean_wait_fastest_client": round(min(means), 3),
        "mean_wait_slowest_client": round(max(means), 3),
        "fairness": round(max(means) / min(means), 2),
    }


async def throughput(
    client: httpx.AsyncClient, model: str, args: argparse.Namespace
) -> dict[str, Any]:
    """Compare requests for one mask, one at a time and together, in turns."""

    async def alone(cases: list[Case]) -> list[Answered]:
        return [await ask(client, c, args.tokens, stream=False) for c in cases]

    async def together(cases: list[Case]) -> list[Answered]:
        jobs = (ask(client, c, args.tokens, stream=False) for c in cases)
        return list(await asyncio.gather(*jobs))

    async def speed(
        way: Callable[[list[Case]], Awaitable[list[Answered]]], turn: str
    ) -> float:
        # Other words every time, so that no answer comes from the prompt cache.
        cases = [
            (f"{model}@story", f"{turn}: story {n}", "none") for n in range(args.batch)
        ]
        start = time.monotonic()
        tokens = sum(count for *_, count in await way(cases))
        return tokens / (time.monotonic() - start)

    ratios, speeds = [], []
    for turn in range(args.turns):
        one = await speed(alone, f"alone {turn}")
        all_ = await speed(together, f"joint {turn}")
        ratios.append(all_ / one)
        speeds.append((one, all_))
    return {
        "same_mask_requests": args.batch,
        "tokens_per_second_one_at_a_time": round(median(s[0] for s in speeds), 1),
        "tokens_per_second_together": round(median(s[1] for s in speeds), 1),
        "throughput_ratio": round(median(ratios), 2),
    }


def kill_a_client(server: Server, eos: dict[str, int]) -> dict[str, Any]:
    """Kill a streaming client; return how long its work went on."""
    command = [sys.executable, "-c", STREAMER, server.url, f"{server.model}@sums"]
    client = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert client.stdin is not None and client.stdout is not None
    client.stdin.write(json.dumps(eos))
    client.stdin.close()
    chunks = 0
    for line in client.stdout:
        chunks += line.startswith("data: {")
        if chunks == 3:
            break
    during = server.running()
    os.kill(client.pid, signal.SIGKILL)
    client.wait()
    killed = time.monotonic()
    while server.running() and time.monotonic() < killed + 60:
        time.sleep(0.01)
    freed = server.running() == 0
    return {
        "killed_client_was_served": during == 1 and chunks == 3,
        "killed_client_freed": freed,
        "seconds_to_free": round(time.monotonic() - killed, 2),
    }


async def measure(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """Ask everything alone, then in a crowd, then for the throughput."""
    models = [f"{server.model}@{task}" for task in TASKS]
    limits = httpx.Limits(max_connections=args.clients)
    async with httpx.AsyncClient(
        base_url=server.url, timeout=600, limits=limits
    ) as client:
        choices = ["none"]
        if await knows_tools(client, models[0]):
            choices += ["auto", "required"]
        alone = {
            case: await ask(client, case, args.tokens, stream=False)
            for case in itertools.product(models, PROMPTS, choices)
        }
        report = await crowd(client, alone, args)
        report["choices_of_tools"] = choices
        return report | await throughput(client, server.model, args)


def main() -> None:
    """Start a server, load it, and end with the report."""
    parser = argparse.ArgumentParser(description="Load a server and check it.")
    parser.add_argument("--model", required=True, help="a model folder")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--tokens", type=int, default=24, help="of each answer")
    parser.add_argument("--batch", type=int, default=16, help="of the throughput part")
    parser.add_argument("--turns", type=int, default=3, help="of the throughput part")
    parser.add_argument("--prompt-cache-bytes", default=str(64 << 20))
    args = parser.parse_args()
    server = Server(args.model, ["--prompt-cache-bytes", args.prompt_cache_bytes])
    try:
        report = asyncio.run(measure(server, args))
        # Nothing else may end the killed client's answer: no end of turn.
        report |= kill_a_client(server, no_end(args.model))
    finally:
        status = server.stop()
    print(json.dumps(report | {"server_exit_status": status}))
    good = report["killed_client_freed"] and status == 0
    sys.exit(0 if good and not report["wrong_answers"] else 1)


def no_end(folder: str) -> dict[str, int]:
    """Return a logit bias against the end of turn."""
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        end = json.load(file)["eos_token_id"]
    return {str(token): -100 for token in (end if isinstance(end, list) else [end])}


if __name__ == "__main__":
    main()
