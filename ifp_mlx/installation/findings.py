"""The findings of an examination of the installation, a line each."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "fix", "off"]
WIDTH = 5  # of a state and a space


@dataclass(frozen=True)
class Finding:
    """One thing that was examined.

    Attributes:
        name: of the thing.
        state: ``ok``; ``note``: it works, and could do better; ``fix``: without it
            commands fail; ``off``: an extra that is not installed.
        said: what was found.
        remedy: the command that helps, or empties a cache.
    """

    name: str
    state: State
    said: str
    remedy: str | None = None


def lines_of(findings: list[Finding]) -> list[str]:
    """Return the findings as lines, remedies below."""
    width = max(len(found.name) for found in findings) + 2
    lines = []
    for found in findings:
        lines.append(f"{found.state:<{WIDTH}}{found.name:<{width}}{found.said}")
        if found.remedy is not None:
            lines.append(f"{'':<{WIDTH + width}}> {found.remedy}")
    return lines
