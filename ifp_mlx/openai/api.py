"""The OpenAI API as an ASGI application over the engine."""

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Callable, MutableMapping
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine import Engine, IFPError
from ..engine.events import CancelToken, Done, Progress
from ..selection.masks import find_mask
from . import page
from .asked import Asked, Defaults
from .choices import Numbered, begun
from .fields import FieldError
from .items import ResponseAnswer
from .protocol import read_chat, read_completion, read_json
from .replies import Answer, error_body, error_of
from .responses import read_response

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response


LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
Scope = MutableMapping[str, Any]


@dataclass(frozen=True)
class Policy:
    """Who may ask for what.

    Attributes:
        name: the model's name in requests.
        api_key: needed as ``Authorization: Bearer``, or ``None``.
        hosts: values of the ``Host`` header that are served; ``*`` is any.
        max_body: bytes of a request.
        body_seconds: seconds in which a request's body must arrive.
        libraries: folders of mask files that requests may name.
        defaults: of requests.
    """

    name: str
    api_key: str | None = None
    hosts: tuple[str, ...] = LOOPBACK
    max_body: int = 1 << 20
    body_seconds: float = 30.0
    libraries: tuple[Path, ...] = ()
    defaults: Defaults = field(default_factory=Defaults)


class HTTPError(Exception):
    """A request that is refused before it reaches the engine."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def make_app(engine: Engine, policy: Policy) -> "Starlette":
    """Return the ASGI application; it does not close the engine.

    Args:
        engine: what answers.
        policy: who may ask for what.
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.routing import Route

    service = Service(engine, policy)
    routes = [
        Route("/health", service.health),
        Route("/v1/models", service.models),
        Route("/v1/models/{model:path}", service.models),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/completions", service.complete, methods=["POST"]),
        Route("/v1/responses", service.respond, methods=["POST"]),
    ]
    keep, temp = policy.defaults.keep, policy.defaults.decoding.get("temp", 0.0)
    routes += page.routes(engine, name=policy.name, keep=keep, temp=temp)
    refusals = (HTTPError, HTTPException, IFPError)
    return Starlette(
        routes=routes,
        middleware=[Middleware(Door, policy=policy)],
        exception_handlers=dict.fromkeys(refusals, _refused),
    )


class Door:
    """Middleware: checks ``Host`` against DNS rebinding, and the API key."""

    def __init__(self, app: Any, policy: Policy) -> None:
        self._app, self._policy = app, policy

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Let a request in, or answer it."""
        if scope["type"] == "http" and (error := self._objection(scope)):
            await _error_response(error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _objection(self, scope: Scope) -> HTTPError | None:
        headers = dict(reversed(scope["headers"]))
        host = headers.get(b"host", b"").decode("latin-1")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if "*" not in self._policy.hosts and name.lower() not in self._policy.hosts:
            return HTTPError(
                403,
                f"The Host {host!r} is not served; name it with --allow-host.",
                "host_not_allowed",
            )
        key = self._policy.api_key
        if key is None or scope["path"] in ("/health", *page.FILES):
            return None
        given = headers.get(b"authorization", b"")
        # The environment may hold bytes that are not UTF-8.
        expected = b"Bearer " + key.encode(errors="surrogateescape")
        if hmac.compare_digest(given, expected):
            return None
        return HTTPError(401, "The API key is missing or wrong.", "invalid_api_key")


class Service:
    """The endpoints."""

    def __init__(self, engine: Engine, policy: Policy) -> None:
        self._engine, self._policy = engine, policy
        self._running = 0

    async def health(self, request: "Request") -> "Response":
        """``GET /health``: 200 while the worker serves, 503 once it has died; also what
        checking cost so far.
        """
        alive = self._engine.alive
        status = "ok" if alive else "the engine's worker has ended; restart the server"
        body: dict[str, Any] = {"status": status, "model": self._policy.name}
        body |= {"running": self._running, "check": self._engine.checking()}
        return _json(body, 200 if alive else 503)

    async def models(self, request: "Request") -> "Response":
        """``GET /v1/models``: the model, and ``MODEL@TASK`` for each prepared task."""
        try:
            tasks = await asyncio.to_thread(self._engine.tasks)
        except Exception as error:
            return _failed(error)
        name = self._policy.name
        names = [name, *(f"{name}@{task.name}" for task in tasks)]
        listed = [
            {"id": n, "object": "model", "created": 0, "owned_by": "ifp_mlx"}
            for n in names
        ]
        wanted = request.path_params.get("model")
        if wanted is None:
            return _json({"object": "list", "data": listed})
        if wanted in names:
            return _json(listed[names.index(wanted)])
        raise HTTPError(404, f"There is no model {wanted!r}.", "model_not_found")

    async def chat(self, request: "Request") -> "Response":
        """``POST /v1/chat/completions``."""
        return await self._answer(request, read_chat, Answer)

    async def complete(self, request: "Request") -> "Response":
        """``POST /v1/completions``."""
        return await self._answer(request, read_completion, Answer)

    async def respond(self, request: "Request") -> "Response":
        """``POST /v1/responses``."""
        return await self._answer(request, read_response, ResponseAnswer)

    async def _answer(
        self,
        request: "Request",
        read: Callable[..., Asked],
        kind: type[Answer] | type[ResponseAnswer],
    ) -> "Response":
        """Start a request, so that mistakes get an HTTP status; then stream or
        collect.
        """
        stop = CancelToken()
        body = await _body(request, self._policy)
        gone = asyncio.create_task(_watch(request, stop))
        self._running += 1
        handed_on = False
        try:
            dialect = self._engine.dialect
            asked = read(read_json(body), self._policy.defaults, dialect)
            stops = [CancelToken(stop) for _ in range(asked.choices)]
            events = await begun(self._streams(asked, stops))
            answer = kind(asked, dialect)
            if not asked.stream:
                return _json(await _collect(answer, events, stops))
            handed_on = True
            return self._event_stream(_chunks(answer, events, stops))
        except Exception as error:
            return _failed(error)
        finally:
            gone.cancel()
            self._running -= not handed_on

    def _streams(self, asked: Asked, stops: list[CancelToken]) -> list[Any]:
        """Ask the engine for every choice; with a seed, each gets its own."""
        options = self._options(asked)
        how = {"chat_template": asked.chat, "calling": asked.calling}
        streams, seed = [], options.get("seed")
        for number, stop in enumerate(stops):
            own = options if seed is None else options | {"seed": seed + number}
            streams.append(self._engine.astream(asked.prompt, stop=stop, **how, **own))
        return streams

    def _event_stream(self, chunks: AsyncIterator[bytes]) -> "Response":
        from starlette.responses import StreamingResponse

        async def counted() -> AsyncIterator[bytes]:
            try:
                async with aclosing(chunks) as inner:  # type: ignore[type-var]
                    async for chunk in inner:
                        yield chunk
            finally:
                self._running -= 1

        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(
            counted(), media_type="text/event-stream", headers=headers
        )

    def _options(self, asked: Asked) -> dict[str, Any]:
        """Return the engine's options: which model, task, mask or instruction."""
        options = dict(asked.options)
        if (task := self._task_of(asked.model)) is not None:
            if options.setdefault("task", task) != task:
                raise FieldError("ifp.task", f"is not the task of {asked.model!r}.")
        if "mask_file" in options:
            options["mask_file"] = self._mask_file(options["mask_file"])
        sources = [n for n in ("task", "mask_file", "instruction") if n in options]
        if len(sources) > 1:
            raise FieldError(f"ifp.{sources[1]}", f"does not go with {sources[0]}.")
        if sources and sources[0] != "instruction":
            for name in ("keep", "selector", "allocation"):
                if name in options:
                    raise FieldError(f"ifp.{name}", f"does not go with {sources[0]}.")
            return options
        return {"keep": self._policy.defaults.keep} | options

    def _task_of(self, model: str) -> str | None:
        name = self._policy.name
        if model == name:
            return None
        if model.startswith(f"{name}@") and len(model) > len(name) + 1:
            return model[len(name) + 1 :]
        raise HTTPError(
            404,
            f"There is no model {model!r}; this server has {name!r}, and {name}@TASK "
            "for each of its tasks.",
            "model_not_found",
        )

    def _mask_file(self, name: str) -> str:
        try:
            return str(find_mask(Path(name).stem, self._policy.libraries))
        except FileNotFoundError as error:
            raise FieldError("ifp.mask_file", f"{name!r} is not in the library.") from (
                error
            )


async def _collect(
    answer: Answer | ResponseAnswer,
    events: AsyncIterator[Numbered],
    stops: list[CancelToken],
) -> dict[str, Any]:
    async for _ in _chunks(answer, events, stops, streamed=False):
        pass
    return answer.whole()


async def _chunks(
    answer: Answer | ResponseAnswer,
    events: AsyncIterator[Numbered],
    stops: list[CancelToken],
    streamed: bool = True,
) -> AsyncIterator[bytes]:
    """Yield server-sent events; prefill shows as comments, which keep it alive."""
    try:
        async with aclosing(events) as inner:  # type: ignore[type-var]
            for chunk in answer.first():
                yield chunk
            async for index, event in inner:
                if isinstance(event, Progress):
                    yield f": {event.stage} {event.done}/{event.total}\n\n".encode()
                    continue
                if isinstance(event, Done):
                    told = answer.finish(index, event)
                else:
                    told = answer.take(index, event)
                for chunk in told:
                    yield chunk
                if answer.over(index):
                    stops[index].cancel()
            for chunk in answer.last():
                yield chunk
    except Exception as error:
        if not streamed:
            raise
        yield answer.error(
            error
        )  # the status has been sent; the client must still hear


async def _watch(request: "Request", stop: CancelToken) -> None:
    """Cancel the work of a client that has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    stop.cancel()


async def _body(request: "Request", policy: Policy) -> bytes:
    """Read a request's body within the limits of bytes and time."""
    from starlette.requests import ClientDisconnect

    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # web pages may send other types without a preflight
        raise HTTPError(415, f"Content-Type is {kind!r}; send application/json.")
    body = bytearray()
    try:
        async with asyncio.timeout(policy.body_seconds):
            async for part in request.stream():
                body += part
                if len(body) > policy.max_body:
                    raise HTTPError(
                        413, f"The body is over {policy.max_body} bytes; send less."
                    )
    except TimeoutError:
        raise HTTPError(408, "The body did not come in time.") from None
    except ClientDisconnect:
        raise HTTPError(400, "The client went away.") from None
    return bytes(body)


def _json(content: dict[str, Any], status: int = 200) -> "Response":
    from starlette.responses import Response

    headers = {"Retry-After": "1"} if status == 429 else None
    return Response(json.dumps(content), status, headers, "application/json")


def _failed(error: Exception) -> "Response":
    if isinstance(error, HTTPError):
        return _error_response(error)
    status, content = error_of(error)
    return _json(content, status)


def _error_response(error: HTTPError) -> "Response":
    return _json(
        error_body(str(error), "invalid_request_error", error.code), error.status
    )


def _refused(request: "Request", error: Any) -> "Response":
    """Answer refusals, Starlette's own too (no such path or method), as OpenAI does."""
    if isinstance(error, HTTPError | IFPError):
        return _failed(error)
    return _error_response(HTTPError(error.status_code, f"{error.detail}."))
