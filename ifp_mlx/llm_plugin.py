"""A model for Simon Willison's `llm`: its prompts answered by a compact model.

    llm -m ifp -o model FOLDER -o keep 0.75 "What is a fjord?"
    llm models options set ifp model FOLDER        # from then on: llm -m ifp "..."

`llm` finds this module by the package's entry point and imports it; nothing of ours
does. System prompt and first user message select, and a conversation keeps
that mask, as everywhere in this package.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import llm
from llm.parts import TextPart
from pydantic import Field

from .engine import Done, Engine, Event, IFPError, Token
from .selection.masks import find_mask


class Options(llm.Options):
    """What `-o` may say."""

    model: str | None = Field(None, description="model folder or Hugging Face Hub id")
    instruction: str | None = Field(None, description="what selects")
    task: str | None = Field(None, description="a task of MODEL/tasks, or of ./tasks")
    mask_file: str | None = Field(None, description="use the selection in this file")
    keep: float | str | None = Field(
        None,
        union_mode="left_to_right",
        description="kept share of FFN channels, or experts; or auto",
    )
    target_size: int | None = Field(None, description="kept units of each layer")
    selector: str = Field("auto", description="where the scores come from")
    allocation: str | None = Field(None, description="how layers share the budget")
    min_agreement: float | None = Field(
        None, description="refuse what agrees less with the whole model, 0 to 1"
    )
    check: float | str | None = Field(
        None,
        union_mode="left_to_right",
        description="exact, or T from 0 to 1: the whole model checks",
    )
    draft_tokens: int | None = Field(
        None, description="most tokens drafted for one check"
    )
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
    if (task := options.pop("task", None)) is not None:
        if "mask_file" in options:
            raise llm.ModelError(f"-o task {task} and -o mask_file: give one of them.")
        libraries = [Path(folder) / "tasks", Path("tasks")]
        options["mask_file"] = str(find_mask(task, libraries))
    if prompt.schema is not None:
        options["json_schema"] = prompt.schema
    messages = []
    for message in prompt.messages:
        texts = [part.text for part in message.parts if isinstance(part, TextPart)]
        if len(texts) < len(message.parts):
            raise llm.ModelError("The model ifp reads text only; leave out the rest.")
        messages.append({"role": message.role, "content": "\n".join(texts)})
    return _engine(folder), messages, options


def _heard(event: Event, response: Any) -> str:
    """Return an event's text; the last event tells the response what it took."""
    if isinstance(event, Done):
        response.set_usage(input=event.prompt_tokens, output=event.generation_tokens)
        response.response_json = {
            "mask_id": event.mask_id,
            "identity": event.identity,
            "kept_channels": event.kept_channels,
            "total_channels": event.total_channels,
            "unit": event.unit,
            "agreement": event.agreement,
            "promise": event.promise,
            "router_mass": event.router_mass,
            "finish_reason": event.finish_reason,
            "seconds": event.seconds,
            "tokens_per_second": event.tokens_per_second,
            "check": event.check,
        }
    return event.text if isinstance(event, Token) else ""


@contextmanager
def _errors_of_llm() -> Iterator[None]:
    try:
        yield
    except (IFPError, FileNotFoundError) as error:
        raise llm.ModelError(str(error)) from None


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
        with _errors_of_llm():
            engine, messages, options = _asked(prompt)
            for event in engine.stream(messages, **options):
                yield _heard(event, response)


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
        with _errors_of_llm():
            engine, messages, options = _asked(prompt)
            async for event in engine.astream(messages, **options):
                yield _heard(event, response)
