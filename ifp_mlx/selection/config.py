"""What a trained checkpoint says about its selections: ``ifp_config.json``."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ..files.atomic import new_file

CONFIG_FILE = "ifp_config.json"


@dataclass(frozen=True)
class IFPConfig:
    """What a trained checkpoint says about its selections; a stock folder has none.

    Attributes:
        version: of this file's format.
        target_size: ``k`` the checkpoint was trained for, or ``None``.
        gates: whether kept channels are weighted by λ, in training and inference.
        temperature: ε of the soft top-k, in units of the scores.
        granularity: channels per selectable block; 1 is the paper.
        shared: channels per layer that every selection of the predictor keeps.
    """

    version: int = 1
    target_size: int | None = None
    gates: Literal["binary", "soft"] = "binary"
    temperature: float = 1.0
    granularity: int = 1
    shared: int = 0

    @staticmethod
    def load(folder: Path) -> "IFPConfig":
        """Read ``ifp_config.json``, or the defaults where there is none.

        Raises:
            ValueError: if the file is not what this version writes.
        """
        path = folder / CONFIG_FILE
        if not path.exists():
            return IFPConfig()
        try:
            config = IFPConfig(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} is not a valid ifp_mlx config: {error}."
            ) from error
        if config.version != 1 or config.gates not in ("binary", "soft"):
            raise ValueError(
                f"{path} has version {config.version} and gates {config.gates!r}; this "
                "ifp_mlx reads version 1 with gates binary or soft: update ifp_mlx."
            )
        return config

    def save(self, folder: Path) -> None:
        """Write ``ifp_config.json`` into ``folder``."""
        with new_file(folder / CONFIG_FILE) as scratch:
            scratch.write_text(json.dumps(asdict(self), indent=2) + "\n")
