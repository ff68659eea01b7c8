"""A picture of a sweep: quality against keep, size and speed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files.atomic import new_file
from .measurement import Arm
from .plotting import pyplot
from .report import MEGA
from .statistics import macro_mean

INK = "#3d4852"
WHOLE = "#8795a1"


def draw(arms: Sequence[Arm], path: Path) -> Path:
    """Draw the KL to the dense model against keep, size and speed; return ``path``.

    Args:
        arms: measured; those without a KL are left out.
        path: a ``.png`` or ``.svg`` file.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    plt = pyplot()

    shown = [arm for arm in arms if arm.values("kl") is not None]
    figure, panels = plt.subplots(1, 3, figsize=(12, 4), sharey=True)
    axes = {
        "kept share": _keep,
        "weights, MB": lambda arm: arm.bytes / MEGA,
        "decoding, tokens/s": lambda arm: arm.tokens_per_second,
    }
    for panel, (title, place) in zip(panels, axes.items(), strict=True):
        _panel(panel, shown, place)
        panel.set_xlabel(title, color=INK)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("KL to the dense model, nats per token", color=INK)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=2, frameon=False)
    lines = -(-len(labels) // 2)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.055 * lines))
    with new_file(path) as scratch:
        figure.savefig(scratch, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return path


def _keep(arm: Arm) -> float | None:
    return None if arm.setting is None else arm.setting.keep


def _panel(panel: Any, arms: Sequence[Arm], place: Any) -> None:
    lines: dict[str, list[tuple[float, float]]] = {}
    for arm in arms:
        kl, at = macro_mean(arm.values("kl") or {}), place(arm)
        if arm.setting is None:
            _whole(panel, arm.name, at, kl)
        elif at is not None:
            s = arm.setting
            bits = "" if s.bits is None else f", {s.bits} bits"
            how = ", compensated" if s.compensate else ""
            label = f"{s.selector}, {s.allocation}{how}{bits}, {s.prefill} prompt"
            lines.setdefault(label, []).append((at, kl))
    for label, points in lines.items():
        dashed = "--" if label.endswith("dense prompt") else "-"
        panel.plot(*zip(*sorted(points), strict=True), dashed, marker="o", label=label)


def _whole(panel: Any, name: str, at: float | None, kl: float) -> None:
    if at is None:  # a level, where a whole model has no place on the axis
        panel.axhline(kl, color=WHOLE, linewidth=0.8, linestyle=":")
        return
    panel.plot(at, kl, marker="s", color=WHOLE, linestyle="")
    panel.annotate(
        name, (at, kl), xytext=(4, 5), textcoords="offset points", color=INK, fontsize=8
    )
