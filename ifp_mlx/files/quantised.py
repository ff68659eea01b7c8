"""How other programs note in config.json that they have quantised a model."""

import re
from contextlib import suppress
from fnmatch import fnmatch
from typing import Any

# Methods whose weights mlx-lm keeps packed, with mlx-lm's settings for each.
KEPT = {
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "mxfp8": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    "modelopt": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
}
LEFT_OUT = ("modules_to_not_convert", "ignore", "exclude_modules")


def noted(config: dict[str, Any]) -> dict[str, Any]:
    """Return what another program noted of how it quantised a model; empty if none did,
    or if MLX has quantised it.
    """
    if config.get("quantization"):
        return {}
    inner = config.get("text_config")
    homes = [home for home in (config, inner) if isinstance(home, dict)]
    found = [home.get("quantization_config") for home in homes]
    return next((f for f in found if isinstance(f, dict) and "quant_method" in f), {})


def quantised_by(config: dict[str, Any]) -> str | None:
    """Return what has quantised a model if it was not MLX, such as ``bitsandbytes``."""
    method = noted(config).get("quant_method")
    return None if method is None else str(method)


def unreadable(config: dict[str, Any]) -> str:
    """Say what to do about a quantised model that mlx-lm does not read."""
    return (
        f"it was quantised by {quantised_by(config)} in a way that mlx-lm does not "
        "read: take the model before that, or one quantised for MLX."
    )


def packing(config: dict[str, Any]) -> dict[str, Any] | None:
    """Return how mlx-lm holds the weights that another program has quantised.

    Args:
        config: the content of a config.json.

    Returns:
        ``group_size``, ``bits`` and ``mode``; ``None`` if it holds them unpacked, or
        nothing is quantised.

    Raises:
        ValueError: if mlx-lm cannot read them.
    """
    about, method = noted(config), quantised_by(config)
    if method == "fp8":  # the classes that read it unpack it, except for one kind
        blocks = list(about.get("weight_block_size") or ())
        kept = about.get("scale_fmt") == "ue8m0" and blocks == [32, 32]
        return KEPT["mxfp8"] if kept else None
    if method in ("awq", "gptq") and about.get("bits", 4) == 4:
        return {"group_size": about.get("group_size", 128), "bits": 4, "mode": "affine"}
    if method == "compressed-tensors":
        from mlx_lm.utils import _compressed_tensors_quantization

        with suppress(ValueError):
            return _compressed_tensors_quantization(about)
    elif method in (None, *KEPT):
        return KEPT.get(method or "")
    raise ValueError(
        f"As quantization_config in config.json says, {unreadable(config)}"
    )


def leaves_out(config: dict[str, Any], path: str) -> bool:
    """Whether another program left a module as it was.

    Args:
        config: the content of a config.json.
        path: of the module in mlx-lm's class.
    """
    about = noted(config)
    names = [str(name) for key in LEFT_OUT for name in about.get(key) or ()]
    if about.get("quant_method") in ("awq", "gptq") and not about.get("lm_head"):
        names.append("lm_head")
    patterns = [name[3:] for name in names if name.startswith("re:")]
    return any(fnmatch(path, f"*{name}*") for name in names) or any(
        re.search(pattern, path) for pattern in patterns
    )
