"""The time that the server adds to a token, beside ``ifp_mlx.generate``'s loop.

    python -m examples.benchmarks.server.server_overhead --model models/smollm2

One process has both: the loop of `stream_generate`, and the server with one client on a
socket, each with the mask of one task. They answer the same prompt in turns, without
tools, and, if the model's template knows tools, with tools that it may call. The time
after the first token counts. Needs `pip install '.[server]' httpx`. Last line: JSON
with tokens per second and the median of the turns' ratios.
"""

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import uvicorn
from mlx_lm.sample_utils import make_logits_processors

from ifp_mlx import load, stream_generate
from ifp_mlx.engine import Engine
from ifp_mlx.openai.api import Policy, make_app
from ifp_mlx.selection.prompts import as_messages, tokenize

from .server_load import TOOLS

PROMPT = "Tell a long story about a dog that finds a key."


def speed(steps: Iterable[Any], tokens: int) -> float:
    """Return the tokens per second after the first; not every token has a step."""
    times = [time.perf_counter() for _ in steps]
    return (tokens - 1) / (times[-1] - times[0])


def chunks(client: httpx.Client, tokens: int, eos: dict[str, int], tools: bool) -> Any:
    """Yield the chunks of one streamed answer that say something."""
    body: dict[str, Any] = {"model": "m@task", "max_tokens": tokens, "stream": True}
    body |= {"messages": [{"role": "user", "content": PROMPT}], "logit_bias": eos}
    body |= {"tools": TOOLS} if tools else {}
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: {") and '"content": ""' not in line:
                yield line


def main() -> None:
    """Measure, and end with the ratios."""
    parser = argparse.ArgumentParser(description="Measure the server's overhead.")
    parser.add_argument("--model", required=True, help="a model folder")
    parser.add_argument("--keep", type=float, default=0.75)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    mask = Path(tempfile.mkdtemp()) / "task.safetensors"
    with Engine.open(args.model) as engine:
        engine.prepare("You tell stories.", name="task", keep=args.keep)
        engine.save("task", mask)
        app = make_app(engine, Policy("m"))
        config = uvicorn.Config(app, port=0, log_level="warning")
        server, listener = uvicorn.Server(config), config.bind_socket()
        listener.listen()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            print(json.dumps(measure(args, url, mask, engine.dialect.tools)))
        finally:
            server.should_exit = True
            thread.join()


def measure(
    args: argparse.Namespace, url: str, mask: Path, tools: bool
) -> dict[str, Any]:
    """Answer in turns, and return the report."""
    model, tokenizer = load(args.model)
    bias = dict.fromkeys(tokenizer.eos_token_ids, -100.0)
    eos = {str(token): -100 for token in bias}
    client = httpx.Client(base_url=url, timeout=600)

    messages, processors = as_messages(PROMPT), make_logits_processors(bias)

    def loop(shown: Sequence[Any]) -> float:
        how: Any = {"mask_file": str(mask), "max_tokens": args.tokens}
        how["logits_processors"] = processors
        prompt = tokenize(tokenizer, messages, tools=shown)
        return speed(stream_generate(model, tokenizer, prompt, **how), args.tokens)

    def served(tools: bool) -> float:
        return speed(chunks(client, args.tokens, eos, tools), args.tokens)

    ways = {"generate": lambda: loop(()), "server": lambda: served(False)}
    if tools:
        ways["generate_with_tools"] = lambda: loop(TOOLS)
        ways["server_with_tools"] = lambda: served(True)
    for way in ways.values():
        way()  # loads
    turns = [{name: way() for name, way in ways.items()} for _ in range(args.turns)]
    report = {
        f"tokens_per_second_{name}": round(median(turn[name] for turn in turns), 2)
        for name in ways
    }
    for more in ("", "_with_tools") if tools else ("",):
        ratios = [turn[f"generate{more}"] / turn[f"server{more}"] - 1 for turn in turns]
        report[f"overhead{more}"] = round(median(ratios), 3)
    return report


if __name__ == "__main__":
    main()
