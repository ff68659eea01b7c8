"""A model for Simon Willison's `llm`: its prompts answered by a compact model.

    llm -m ifp -o model FOLDER -o keep 0.75 "What is a fjord?"
    llm models options set ifp model FOLDER        # from then on: llm -m ifp "..."

`llm` finds this module by the package's entry point and imports it; nothing of ours
does. The system prompt selects the channels if there is one, else the first user
message, and a conversation keeps that mask, as everywhere in this package.
"""

from collections.abc import AsyncIterator, Iterator
from functools import cache
from typing import Any

import llm
from llm.parts import TextPart
from pydantic import Field

from .engine import Done, Engine, IFPError, Token


class Options(llm.Options):
    """What `-o` may say."""

    model: str | None = Field(None, description="model folder or Hugging Face Hub id")
    instruction: str | None = Field(None, description="what selects the channels")
    mask_file: str | None = Field(None, description="use the selection in this file")
    keep: float | None = Field(None, description="kept share of the FFN channels")
    target_size: int | None = Field(None, description="kept channels per layer")
    selector: str = Field("auto", description="where the scores come from")
    allocation: str | None = Field(None, description="how layers share the budget")
    max_tokens: int | None = Field(None, description="longest answer, in tokens")
    temp: float = Field(0.0, description="sampling temperature; 0 is greedy")
    top_p: float = Field(1.0, description="sampling top-p")
    seed: int = Field(0, description="of sampling")


@llm.hookimpl
def register_models(register: Any) -> None:
    """Offer the model `ifp` to `llm`."""
    register(IFP(), AsyncIFP())


@cache
def _engine(folder: str) -> Engine:
    return Engine.open(folder)


def _asked(prompt: llm.Prompt) -> tuple[Engine, list[dict[str, str]], dict[str, Any]]:
    """Return the engine, the messages and the engine's options of a prompt."""
    options = {k: v for k, v in prompt.options.model_dump().items() if v is not None}
    folder = options.pop("model", None)
    if folder is None:
        raise llm.ModelError(
            "No model: give -o model FOLDER, or set it once with `llm models options "
            "set ifp model FOLDER`."
        )
    if prompt.schema is not None:
        options["json_schema"] = prompt.schema
    messages = []
    for message in prompt.messages:
        texts = [part.text for part in message.parts if isinstance(part, TextPart)]
        if len(texts) < len(message.parts):
            raise llm.ModelError("The model ifp reads text only; leave out the rest.")
        messages.append({"role": message.role, "content": "\n".join(texts)})
    try:
        return _engine(folder), messages, options
    except IFPError as error:
        raise llm.ModelError(str(error)) from None


def _finish(response: Any, done: Done) -> None:
    response.set_usage(input=done.prompt_tokens, output=done.generation_tokens)
    response.response_json = {
        "mask_id": done.mask_id,
        "kept_channels": done.kept_channels,
        "total_channels": done.total_channels,
        "finish_reason": done.finish_reason,
        "seconds": done.seconds,
        "tokens_per_second": done.tokens_per_second,
    }


class _Shared:
    model_id = "ifp"
    can_stream = True
    supports_schema = True
    Options = Options


class IFP(_Shared, llm.Model):
    """The model `ifp`; where its weights are is an option."""

    def execute(
        self,
        prompt: llm.Prompt,
        stream: bool,
        response: llm.Response,
        conversation: llm.Conversation | None,
    ) -> Iterator[str]:
        """Yield the answer piece by piece; `llm` calls this."""
        engine, messages, options = _asked(prompt)
        try:
            for event in engine.stream(messages, **options):
                if isinstance(event, Token):
                    yield event.text
                elif isinstance(event, Done):
                    _finish(response, event)
        except IFPError as error:
            raise llm.ModelError(str(error)) from None


class AsyncIFP(_Shared, llm.AsyncModel):
    """The same for `async` callers."""

    async def execute(
        self,
        prompt: llm.Prompt,
        stream: bool,
        response: llm.AsyncResponse,
        conversation: llm.AsyncConversation | None,
    ) -> AsyncIterator[str]:
        """Yield the answer piece by piece; `llm` calls this."""
        engine, messages, options = _asked(prompt)
        try:
            async for event in engine.astream(messages, **options):
                if isinstance(event, Token):
                    yield event.text
                elif isinstance(event, Done):
                    _finish(response, event)
        except IFPError as error:
            raise llm.ModelError(str(error)) from None
