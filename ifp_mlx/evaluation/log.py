"""What has been measured already, so that a killed run goes on where it stopped."""

import json
from pathlib import Path
from typing import Any

from ..files.atomic import new_file, writing

Line = dict[str, Any]
SETTINGS, ROWS = "settings.json", "rows.jsonl"


class Log:
    """Lines of results, each known by its key, in a folder if there is one.

    Args:
        folder: where ``settings.json`` and ``rows.jsonl`` are; with ``None`` the lines
            are in memory only.
        settings: what decides the results of a key. A folder made with others is
            refused.
        key: the names of the fields that identify a line.

    Raises:
        ValueError: if the folder was made with other settings.
    """

    def __init__(
        self, folder: Path | None, settings: Line, key: tuple[str, ...]
    ) -> None:
        self.lines: dict[tuple, Line] = {}
        self._key, self._file = key, None if folder is None else folder / ROWS
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        _check_settings(folder / SETTINGS, settings)
        for line in _whole_lines(folder / ROWS):
            self.lines[self.key_of(line)] = line

    def key_of(self, line: Line) -> tuple:
        """Return the values that identify a line."""
        return tuple(line[name] for name in self._key)

    def __contains__(self, key: tuple) -> bool:
        return key in self.lines

    def add(self, *lines: Line) -> None:
        """Keep lines, in memory and in the file."""
        self.lines.update({self.key_of(line): line for line in lines})
        if self._file is not None:
            with writing(self._file), self._file.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))


def _check_settings(path: Path, settings: Line) -> None:
    settings = json.loads(json.dumps(settings))  # as it comes back from the file
    if not path.exists():
        with new_file(path) as scratch:
            scratch.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    for name in settings | before:
        if settings.get(name) != before.get(name):
            raise ValueError(
                f"{path.parent} was begun with {name} {before.get(name)!r}, not "
                f"{settings.get(name)!r}; give another --output, or delete it."
            )


def _whole_lines(path: Path) -> list[Line]:
    """Return the whole lines of a file, and remove a last one that a kill cut short."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        with new_file(path) as scratch:
            scratch.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]
