"""The official client against an application in this process, and a model that says what
a test has written.
"""

import asyncio
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import openai
from conftest import TOOLS_TEMPLATE, write_folder, write_tokenizer

from ifp_mlx.engine.host import Host

try:
    import httpx2 as httpx  # what the newer openai clients use
except ImportError:
    import httpx

HELLO = [{"role": "user", "content": "Hello"}]


def http(app, **options):
    """Return an HTTP client of an application."""
    transport = httpx.ASGITransport(app)
    return httpx.AsyncClient(
        transport=transport, base_url="http://127.0.0.1", timeout=60, **options
    )


def ask(app, act, **options):
    """Run ``act(client)`` with the official client against ``app``."""

    async def run():
        async with http(app) as transport:
            client = openai.AsyncOpenAI(
                base_url="http://127.0.0.1/v1",
                max_retries=0,
                http_client=transport,
                **{"api_key": "none"} | options,
            )
            return await act(client)

    return asyncio.run(run())


def chat(app, **options):
    """Return the answer to a chat."""
    options = {"model": "tiny", "messages": HELLO, "max_tokens": 6} | options
    return ask(app, lambda client: client.chat.completions.create(**options))


def chunks_of(app, **options):
    """Return the chunks of a streamed chat."""
    options = {"model": "tiny", "messages": HELLO, "max_tokens": 200} | options

    async def stream(client):
        chunks = await client.chat.completions.create(stream=True, **options)
        return [chunk async for chunk in chunks]

    return ask(app, stream)


def post(app, path, **options):
    """Return the raw answer to a POST."""

    async def run():
        async with http(app) as client:
            return await client.post(path, **options)

    return asyncio.run(run())


def get(app, path):
    """Return the raw answer to a GET."""

    async def run():
        async with http(app) as client:
            return await client.get(path)

    return asyncio.run(run())


def write_able(folder: Path, template: str = TOOLS_TEMPLATE, *marks: str) -> Path:
    """Write a model whose template knows tools, and whose tokenizer has marks."""
    size = 259 + len(marks)
    write_folder(folder, vocab_size=size, max_position_embeddings=4096)
    write_tokenizer(folder, template, *marks)
    return folder


class Script:
    """A logits processor that lets through one text, and then the end."""

    def __init__(self, tokenizer, says):
        self._tokenizer, self._says = tokenizer, says
        self._left = None

    def __call__(self, tokens, logits):
        if self._left is None:
            said = self._says(self._tokenizer.decode(tokens.tolist()))
            ids = self._tokenizer.encode(said, add_special_tokens=False)
            self._left = ids
        # After the end one more step is computed, and thrown away.
        end = next(iter(self._tokenizer.eos_token_ids))
        only = mx.arange(logits.shape[-1]) == (self._left.pop(0) if self._left else end)
        return mx.where(only, logits, -mx.inf)


def script(monkeypatch, what):
    """Make engines say a text, or what a function makes of the prompt."""
    answer = what if callable(what) else lambda _: what
    usual = getattr(Host._sampling, "usual", Host._sampling)

    def scripted(host, ticket):
        sampling = usual(host, ticket)
        more = [*sampling.processors, Script(host.tokenizer, answer)]
        return replace(sampling, processors=more)

    scripted.usual = usual
    monkeypatch.setattr(Host, "_sampling", scripted)
