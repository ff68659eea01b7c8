"""Named devices: how fast their memory, their storage and their arithmetic are.

The figures, and where each one comes from, are in ``devices.toml``. How much of the
peaks a program reaches depends on the program, so that is a separate :class:`Runtime`,
with one constant for each phase.
"""

import difflib
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

Kind = Literal["vendor", "third-party", "derived", "assumed", "measured"]


@dataclass(frozen=True)
class Figure:
    """A number and where it comes from."""

    value: float
    kind: Kind
    source: str


@dataclass(frozen=True)
class Runtime:
    """The shares of a device's peaks that a program reaches; see ``devices.toml``."""

    prefill: float
    decode: float
    load: float
    layer_seconds: float
    source: str


@dataclass(frozen=True)
class Device:
    """A device's profile; ``devices.toml`` explains the fields."""

    name: str
    about: str
    memory: Figure
    storage: Figure | None
    compute: Figure
    runtime: Runtime


def profile(content: dict[str, Any]) -> Device:
    """Return the profile whose ``asdict`` is ``content``.

    Raises:
        KeyError, TypeError: if a field is missing or unknown.
    """
    figures = {
        name: content[name] and Figure(**content[name])
        for name in ("memory", "storage", "compute")
    }
    return Device(**content | figures | {"runtime": Runtime(**content["runtime"])})


def read_table(text: str) -> dict[str, Device]:
    """Return the profiles of a table such as ``devices.toml``, by their names.

    Raises:
        ValueError: with the device's name, if a field is missing or unknown.
    """
    table, found = tomllib.loads(text), {}
    for name, fields in table["devices"].items():
        try:
            runtime = table["runtimes"][fields.get("runtime", "mlx")]
            content = {"storage": None} | fields | {"runtime": runtime}
            found[name] = profile(dict(name=name, **content))
        except (KeyError, TypeError) as error:
            raise ValueError(f"Device {name!r} of the table: {error}") from error
    return found


@cache
def _devices() -> dict[str, Device]:
    return read_table((files(__package__) / "devices.toml").read_text("utf-8"))


def __getattr__(name: str) -> dict[str, Device]:
    if name == "DEVICES":  # read when first used
        return _devices()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def find(name: str) -> Device:
    """Return a profile by its name.

    Raises:
        ValueError: if there is none, with the names that are near or all of them.
    """
    key, known = name.lower().replace(" ", "-").replace("_", "-"), _devices()
    if key in known:
        return known[key]
    near = difflib.get_close_matches(key, known, 3)
    raise ValueError(
        f"There is no device profile {name!r}; use {', '.join(near or known)}, or "
        "here, which measures this machine."
    )
