"""The dialogues that ship with the package, written for it."""

import json
from importlib.resources import files


def calibration_chats() -> list[list[dict[str, str]]]:
    """Return the dialogues that ship with the package, written for it."""
    text = files("ifp_mlx").joinpath("calibration.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["messages"] for line in text.splitlines()]
