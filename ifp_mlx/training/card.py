"""The card of a trained model: what it is, how it was made, and how good it is."""

from pathlib import Path
from typing import Any

from ..files.companions import UNKNOWN_LICENCE, licence_of
from ..slicing.shapes import Plan
from .recipe import TrainConfig

USES = {
    "predictor": "A predictor in `predictor/` reads the instruction and chooses the "
    "{unit}s: {kept} of {units} in each of {layers} layers.",
    "static": "One mask for everything was learned with it: `mask.safetensors` beside "
    "this folder keeps {kept} of {units} {unit}s in each of {layers} layers.",
    "dense": "No mask was learned with it: it is a dense model.",
}
COMMANDS = {
    "predictor": """    python -m ifp_mlx.generate --model FOLDER --prompt "…"
    python -m ifp_mlx.tasks make --model FOLDER --name mine --instruction "…"
    python -m ifp_mlx.compact --model FOLDER --task mine --mlx-path OUT""",
    "static": """    python -m ifp_mlx.generate --model FOLDER --mask-file mask.safetensors --prompt "…"
    python -m ifp_mlx.compact --model FOLDER --mask-file mask.safetensors --mlx-path OUT""",
    "dense": """    mlx_lm.generate --model FOLDER --prompt "…\"""",
}
LOSSES = {
    "valid_loss": "loss, as it answers",
    "overlap_within": "masks of two instructions of one task share",
    "overlap_between": "masks of two tasks, or of any two instructions, share",
    "overlap_chance": "two random masks share",
}


def trained_card(
    config: TrainConfig, plan: Plan, source: Path, found: dict[str, Any]
) -> str:
    """Return the README of a trained model.

    Args:
        config: the run's settings, none left open (see ``TrainConfig.of``).
        plan: of the model.
        source: folder of the model it was trained from.
        found: the latest measurements; the card shows those named in :data:`LOSSES`.
    """
    licence = licence_of(source)
    front = f"license: {licence}\n" if licence else ""
    kept = 0 if config.masker == "dense" else config.budget(plan.units).k
    numbers = {"unit": plan.unit, "kept": kept, "layers": plan.shape[0]}
    about = USES[config.masker].format(**numbers, units=plan.units)
    begun = "random weights of the shape of " if config.from_scratch else ""
    rows = [f"| {LOSSES[n]} | {found[n]:.3f} |" for n in LOSSES if n in found]
    measured = "\n".join(["| on the validation examples | |", "|---|---|", *rows])
    return f"""---
{front}library_name: ifp-mlx
---

# {Path(config.output).name}

Trained with ifp_mlx from {begun}{source.name}. {about}

{COMMANDS[config.masker]}

## How it was made

Stage {config.stage}, {config.steps} steps of {config.batch_size * config.accumulate} \
examples of {Path(config.data).name}; trained: {config.train}, learning rate {config.lr:g}, \
{config.dtype}, seed {config.seed}. All settings are in the run's `settings.json`, and what
the command reported in its `report.json`.

## How good it is

{measured if rows else "Nothing was measured."}

Losses are in nats a token. They say nothing about tasks that are not in the data.

Licence of the model it was trained from: {licence or UNKNOWN_LICENCE}.
"""
