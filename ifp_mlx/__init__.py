"""Big model on disk, small model in memory, chosen by the instruction.

Instruction-Following Pruning (Hou et al., ICML 2025, arXiv 2501.02086) on MLX.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .model.checkpoint import IFPModel, load
    from .model.generation import generate, stream_generate
    from .model.responses import GenerationResponse
    from .selection.masks import Selection

__version__ = "0.1.0"
__all__ = [
    "GenerationResponse",
    "IFPModel",
    "Selection",
    "generate",
    "load",
    "stream_generate",
]

_HOME = {
    "GenerationResponse": "model.responses",
    "IFPModel": "model.checkpoint",
    "Selection": "selection.masks",
    "generate": "model.generation",
    "load": "model.checkpoint",
    "stream_generate": "model.generation",
}


def __getattr__(name: str) -> object:
    # Imported when first used, so that `import ifp_mlx` stays quick and silent.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        # Importing the module `generate` must not hide the function of that name.
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
