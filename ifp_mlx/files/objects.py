"""A JSON object in a file, or a sentence that says what the file is instead."""

import json
from pathlib import Path
from typing import Any


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a model folder.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds anything else.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; give a complete model folder.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
        error = ValueError(f"a JSON {type(content).__name__}")
    except (
        ValueError,
        RecursionError,
    ) as syntax:  # RecursionError: brackets without an end
        error = ValueError(syntax)
    raise ValueError(
        f"{path} is not a JSON object ({error}); fetch or convert the model again."
    ) from error
