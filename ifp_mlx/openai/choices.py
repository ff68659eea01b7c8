"""Several answers to one request, their events as they come."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Any

from ..engine.events import Done, Event, Progress

Numbered = tuple[int, Event]


async def begun(streams: Sequence[AsyncIterator[Event]]) -> AsyncIterator[Numbered]:
    """Return the events of all streams, each with its stream's number, once all have
    selected and loaded, which may fail.

    Raises:
        IFPError: of the first stream that fails.
    """
    events, waiting = together(streams), set(range(len(streams)))
    early: list[Numbered] = []
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(aclosing(events))  # type: ignore[type-var]
        while waiting:
            number, event = await anext(events)
            early.append((number, event))
            if not isinstance(event, Progress) or event.stage in ("prefill", "decode"):
                waiting.discard(number)
        stack.pop_all()
    return _chained(early, events)


async def together(
    streams: Sequence[AsyncIterator[Event]],
) -> AsyncIterator[Numbered]:
    """Yield the events of all streams, each with its stream's number, until the last of
    them is done or one fails; the others are then closed.
    """
    queue: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()

    async def pump(number: int, stream: AsyncIterator[Event]) -> None:
        try:
            async with aclosing(stream) as events:  # type: ignore[type-var]
                async for event in events:
                    queue.put_nowait((number, event))
        except Exception as error:
            queue.put_nowait((number, error))

    pumps = [asyncio.create_task(pump(n, s)) for n, s in enumerate(streams)]
    left = len(pumps)
    try:
        while left:
            number, event = await queue.get()
            if isinstance(event, Exception):
                raise event
            left -= isinstance(event, Done)
            yield number, event
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _chained(
    first: list[Numbered], rest: AsyncIterator[Numbered]
) -> AsyncIterator[Numbered]:
    async with aclosing(rest) as events:  # type: ignore[type-var]
        for event in first:
            yield event
        async for event in events:
            yield event
