"""The dialogues that ship with the package, written for it."""

import json
from importlib.resources import files

CHATS = 41  # how many there are
MOST_TOKENS = 400  # of each; only a tokenizer that knows no words makes more

# The version of the dialogues and of how they are condensed (ifp_mlx.slicing.sketch): a
# compensated model can only be made again with the same one.
SKETCH_VERSION = "1"


def calibration_chats() -> list[list[dict[str, str]]]:
    """Return the dialogues that ship with the package, written for it."""
    text = files("ifp_mlx").joinpath("calibration.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["messages"] for line in text.splitlines()]
