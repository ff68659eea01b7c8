"""The figures of a conversation, in words."""

from typing import Any

from ..engine import Done, Task
from ..files.amounts import in_words
from .conversation import Conversation


def status(done: Done, memory: dict[str, int]) -> str:
    """Return one line on an answer: how much was kept, how good and how quick that is.

    Args:
        done: the answer's figures.
        memory: from :meth:`Engine.memory`.
    """
    parts = []
    if done.total_channels:
        parts = [f"{share_of(done)} of the {done.unit}s kept", *quality(done)]
    if done.generation_tokens > 1:
        parts.append(f"{done.tokens_per_second:.1f} tokens/s")
    parts.append(f"{in_words(memory['active'])} in memory")
    if done.finish_reason != "stop":
        ends = {"length": "cut off at the longest answer", "cancelled": "stopped"}
        parts.append(ends[done.finish_reason])
    return f"[{' · '.join(parts)}]"


def share_of(found: Done | Task) -> str:
    """Return how much is kept."""
    return f"{found.kept_channels / found.total_channels:.0%}"


def quality(found: Done | Task) -> list[str]:
    """Return how far it agrees with the whole model, if that is known."""
    said = []
    if found.agreement is not None:
        said.append(f"agreement {found.agreement:.0%}")
    if found.promise is not None and found.kept_channels < found.total_channels:
        said.append(f"card {found.promise:.0%}")
    check = getattr(found, "check", None)
    if check and check["drafted"]:
        said.append(f"checked, {check['accepted']} of {check['drafted']} drafts stood")
    return said


def selected(talk: Conversation) -> str:
    """Return what selects, and what is selected now."""
    if talk.source is not None:
        who = f"{talk.source.words[0].upper()}{talk.source.words[1:]} selects"
    else:
        who = "The first message of the conversation selects"
        who += ", with the system message" if talk.system else ""
    if (found := talk.found) is None:
        return f"{who}; nothing is selected yet."
    about = ", ".join([share_of(found), *quality(found)])
    return (
        f"{who}: {found.kept_channels} of {found.total_channels} {found.unit}s "
        f"({about}), mask {found.mask_id}."
    )


def statistics(talk: Conversation) -> str:
    """Return all figures of a conversation, a line each."""
    engine, lines = talk.engine, [selected(talk)]
    said = sum(message["role"] == "user" for message in talk.messages)
    lines.append(
        f"Messages of yours: {said}. Since the start, answers: {talk.answers}, tokens "
        f"read: {talk.read}, generated: {talk.generated}."
    )
    if (done := talk.last) is not None:
        held = done.prompt_tokens + done.generation_tokens
        spent = ", ".join(f"{name} {s:.2f} s" for name, s in done.seconds.items())
        lines += [
            f"Context: {held} of {engine.context_length} tokens.",
            f"Last answer: {done.cached_tokens} of {done.prompt_tokens} prompt tokens "
            f"from the KV cache, {done.generation_tokens} generated at "
            f"{done.tokens_per_second:.1f} tokens/s; {spent}.",
        ]
    lines.append(f"Memory: {_bytes(engine.memory())}.")
    checks = engine.checking()
    if checks["checks"]:
        lines.append(
            f"Checking: {checks['checks']} checks, {checks['accepted']} of "
            f"{checks['drafted']} drafted tokens stood, "
            f"{in_words(checks['bytes_read'])} read."
        )
    return "\n".join(lines)


def _bytes(memory: dict[str, Any]) -> str:
    parts = (f"{n.replace('_', ' ')} {in_words(b)}" for n, b in memory.items())
    return ", ".join(parts)
