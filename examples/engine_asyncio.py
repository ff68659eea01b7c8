"""Ask an engine from an event loop: one answer as a stream, then two at the same time.

    python examples/engine_asyncio.py [MODEL]

An engine gives the model a thread of its own, so that an app stays alive while it works.
A prepared task keeps its channels in memory; a question without one chooses its own.
Expect Norwegia piece by piece, then Allemagne and Espagne together.
"""

import asyncio
import sys

from ifp_mlx import load
from ifp_mlx.engine import Done, Engine, Token

QUESTIONS = "What is Germany called in French?", "Say Spain in French."

model, _ = load(*sys.argv[1:])
keep = None if model.predictor else 0.75  # a trained model has its own keep


async def main() -> None:
    """Ask all questions."""
    with Engine.open(model.path) as engine:
        question = "How do you say Norway in Polish?"
        print(question, end=" ")
        async for event in engine.astream(question, keep=keep, max_tokens=32):
            if isinstance(event, Token):
                print(event.text, end="", flush=True)
            elif isinstance(event, Done):
                print(
                    f"\n  {event.kept_channels} of {event.total_channels} {event.unit}s"
                )

        engine.prepare("What is Italy called in French?", name="french", keep=keep)
        print(*QUESTIONS, sep="\n")
        asked = [engine.agenerate(q, task="french", max_tokens=32) for q in QUESTIONS]
        for answer in await asyncio.gather(*asked):
            print(answer)


asyncio.run(main())
