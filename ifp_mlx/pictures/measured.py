"""Quality and speed by keep, read back from what evaluate and benchmark wrote."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Point:
    """What was measured at one keep.

    Attributes:
        line: the setting it belongs to: selector, allocation, who reads the prompt.
        keep: kept share of the units.
        kl: to the dense model in nats per token, or ``None``.
        agreement: share of tokens that both would choose, or ``None``.
        speed: tokens/s of decoding, or ``None``.
        dense_speed: of the dense model in the same run, or ``None``.
    """

    line: str
    keep: float
    kl: float | None = None
    agreement: float | None = None
    speed: float | None = None
    dense_speed: float | None = None


def read_evaluation(path: Path) -> list[Point]:
    """Return the settings of a sweep.

    Args:
        path: ``results.json`` of ``evaluate --output``, or what its ``--json`` printed.

    Raises:
        ValueError, OSError: if it is not that, naming the file.
    """
    found = _read(path, "results", "python -m ifp_mlx.evaluate --output")["results"]
    dense = next((r for r in found if r["setting"] is None), None)
    dense_speed = dense and dense.get("tokens_per_second")
    points = []
    for result in found:
        if (setting := result["setting"]) is None:
            continue
        how = ", compensated" if setting.get("compensate") else ""
        line = (
            f"{setting['selector']}, {setting['allocation']}{how}, "
            f"{setting['prefill']} prompt"
        )
        points.append(
            Point(
                line,
                setting["keep"],
                result["kl"],
                result["agreement"],
                result.get("tokens_per_second"),
                dense_speed,
            )
        )
    return points


def read_benchmarks(paths: Sequence[Path]) -> list[Point]:
    """Return the speeds of benchmarks, a point for each case in them.

    Args:
        paths: what ``benchmark --json`` printed.

    Raises:
        ValueError, OSError: if one is not that, naming the file.
    """
    return [
        _speed(case)
        for path in paths
        for case in _read(path, "cases", "python -m ifp_mlx.benchmark --json")["cases"]
    ]


def _speed(case: dict[str, Any]) -> Point:
    tokens = case["max_tokens"] - 1
    speed, dense = (
        tokens / statistics.median(case["seconds"][name]["decode"])
        for name in ("compact", "dense")
    )
    line = f"benchmark, {case['prompt_tokens']} prompt tokens"
    return Point(line, case["keep"], speed=speed, dense_speed=dense)


def _read(path: Path, key: str, command: str) -> dict[str, Any]:
    """Return a JSON document: the whole file, or the last line of a saved output."""
    text = path.read_text(encoding="utf-8").strip()
    for part in (text, text.rpartition("\n")[2]):
        try:
            found = json.loads(part)
        except json.JSONDecodeError:
            continue
        if isinstance(found, dict) and key in found:
            return found
    raise ValueError(f"{path} holds no result of {command}; give a file that does.")
