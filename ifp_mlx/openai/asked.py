"""A request as the engine takes it, whichever of the API's paths it came by."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..engine import Calling, Dialect
from ..selection.request import Keep


@dataclass(frozen=True)
class Defaults:
    """The defaults of requests.

    Attributes:
        keep: kept share.
        decoding: fields of :class:`ifp_mlx.decoding.options.Decoding`.
        chat_template_config: options of the chat template; a request's override them.
    """

    keep: Keep | None = None
    decoding: Mapping[str, Any] = field(default_factory=dict)
    chat_template_config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """A request as the engine takes it.

    Attributes:
        model: the ``model`` field.
        prompt: messages, a text, or token ids.
        chat: whether the chat template applies.
        calling: the tools that the answer may call.
        choices: how many answers.
        stream: whether the answer is streamed.
        include_usage: whether the stream ends with the usage.
        options: of ``Engine.astream``.
        echo: fields of the request that the answer repeats.
    """

    model: str
    prompt: Any
    chat: bool
    calling: Calling | None = None
    choices: int = 1
    stream: bool = False
    include_usage: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    echo: dict[str, Any] = field(default_factory=dict)


def opening(asked: Asked, dialect: Dialect) -> str:
    """Return the state that the answer to a chat begins in."""
    return dialect.opening(asked.prompt, asked.options.get("chat_template_config"))
