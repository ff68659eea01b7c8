"""The chat page in the browser: its files, and what it asks beside the OpenAI API."""

import asyncio
import base64
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine import Engine, Task
from ..selection.request import Keep

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

# These files contain nothing of the model, so they need no key; their requests do.
FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src data:",  # the icon
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def routes(
    engine: Engine, *, name: str, keep: Keep | None, temp: float
) -> list["Route"]:
    """Return the routes of the page.

    Args:
        engine: what answers.
        name: what requests call the model.
        keep: default of requests; ``None`` leaves it to the checkpoint.
        temp: default temperature of requests.
    """
    from starlette.routing import Route

    about = {"model": name, "keep": keep or engine.keep, "temperature": temp}
    about |= {"layers": engine.layers, "units": engine.channels, "unit": engine.unit}
    page = Page(engine, about)
    found = [Route(path, _file(*file)) for path, file in FILES.items()]
    return [
        *found,
        Route("/ifp/state", page.state),
        Route("/ifp/masks/{mask_id}", page.mask),
    ]


class Page:
    """What the page asks of the engine.

    Args:
        engine: what answers.
        about: what does not change while the server runs.
    """

    def __init__(self, engine: Engine, about: dict[str, Any]) -> None:
        self._engine, self._about = engine, about

    async def state(self, request: "Request") -> "Response":
        """``GET /ifp/state``: the model, its tasks, and its memory in bytes."""
        from starlette.responses import JSONResponse

        tasks = await asyncio.to_thread(self._engine.tasks)
        memory = await asyncio.to_thread(self._engine.memory)
        told = {"tasks": [task_of(task) for task in tasks], "memory": memory}
        return JSONResponse(self._about | told)

    async def mask(self, request: "Request") -> "Response":
        """``GET /ifp/masks/MASK_ID``: which units each layer keeps, of a task or of a
        selection that the engine still knows.
        """
        from starlette.responses import JSONResponse

        mask_id = request.path_params["mask_id"]
        mask = await asyncio.to_thread(self._engine.mask, mask_id=mask_id)
        return JSONResponse(
            {
                "mask_id": mask_id,
                "unit": self._engine.unit,
                "layers": mask.shape[0],
                "units": mask.shape[1],
                "bits": bits_of(mask),
            }
        )


def task_of(task: Task) -> dict[str, Any]:
    """Return what the page shows of a task."""
    return {
        "name": task.name,
        "instruction": task.info.get("instruction"),
        "mask_id": task.mask_id,
        "kept": task.kept_channels,
        "total": task.total_channels,
        "agreement": task.agreement,
        "promise": task.promise,
        "bytes": task.bytes,
        "resident": task.resident,
    }


def bits_of(mask: np.ndarray) -> str:
    """Return a mask ``[L, F]`` as base64: one bit per unit, layer after layer, the
    lowest bit of a byte first.
    """
    packed = np.packbits(mask.reshape(-1) > 0, bitorder="little")
    return base64.b64encode(packed.tobytes()).decode()


def _file(name: str, media_type: str) -> Any:
    from starlette.responses import Response

    content = (files(__package__) / name).read_bytes()

    async def send(request: "Request") -> Response:
        return Response(content, headers=HEADERS, media_type=media_type)

    return send
