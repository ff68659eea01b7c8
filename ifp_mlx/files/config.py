"""config.json: read, checked, and given the keys that mlx-lm's classes read."""

import re
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from .objects import read_object

# transformers 5 keeps the position encoding in rope_parameters. These are mlx-lm's
# names for two of its numbers; the others go into rope_scaling.
NAMES = {
    "rope_theta": ("rope_theta", "rotary_emb_base"),
    "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct"),
}
# By model type, mlx-lm's key for the RoPE base of sliding-window layers, which are
# never scaled.
SLIDING_BASE = {
    "gemma3_text": "rope_local_base_freq",
    "gemma3n_text": "rope_local_base_freq",
    "mimo_v2_flash": "swa_rope_theta",
    "olmo3": "rope_theta",
}


def read_config(path: Path) -> dict[str, Any]:
    """Return the content of a config.json, with its :func:`older_keys`.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is not a model's, asks to run code, or has a setting that
            mlx-lm cannot take.
    """
    from mlx_lm.utils import _decode_tagged_floats

    config: dict[str, Any] = _decode_tagged_floats(read_object(path))
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not re.fullmatch(r"[\w-]+", model_type):
        raise ValueError(
            f"model_type={model_type!r} in {path} names no model; "
            "it should be a name such as 'llama'."
        )
    for key in ("model_file", "trust_remote_code"):
        if config.get(key):
            raise ValueError(
                f"{key}={config[key]!r} in {path} asks to run code from the model "
                "folder, which is never done; use a model that mlx-lm has built in."
            )
    check_numbers(config, path)
    return config | older_keys(config, path)


def check_numbers(config: dict[str, Any], path: Path) -> None:
    """Refuse a text where mlx-lm's class for a model reads a number: some would go
    unnoticed until the model runs.

    Args:
        config: the content of a config.json.
        path: of that file, to be named.

    Raises:
        ValueError: naming the key.
    """
    numbers = _numbers(config)
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, dict) else {}):
        for key, value in part.items():
            if isinstance(value, str) and key in numbers:
                raise ValueError(
                    f"{key}={value!r} in {path} is a text, and mlx-lm's class for "
                    f"{config['model_type']} reads a number there; write it without "
                    "quotes."
                )


def older_keys(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the content of ``rope_parameters`` by the keys of transformers 4, which
    mlx-lm's classes read.

    Args:
        config: the content of a config.json, with or without these keys.
        path: of that file, to be named.

    Returns:
        Keys to override in ``config``.

    Raises:
        ValueError: if the class has no such key, and would encode positions
            differently.
    """
    inner = config.get("text_config") or {}
    keys: dict[str, Any] = {}
    if "text_config" in config and not inner:  # mlx-lm would fail on a null
        keys["text_config"] = {}
    parts = [part for part in (config, inner) if isinstance(part, dict)]
    if any(isinstance(part.get("rope_parameters"), dict) for part in parts):
        known = _fields(config)
        keys |= _rope_keys(config, known, path)
        if below := _rope_keys(inner, known, path):
            keys["text_config"] = inner | below
    return keys


def _rope_keys(config: dict[str, Any], known: set[str], path: Path) -> dict[str, Any]:
    noted = config.get("rope_parameters")
    if not isinstance(noted, dict) or not known:
        return {}
    found = _of_layers(noted, config.get("model_type"))
    if "rope_parameters" in known:  # the class itself can read them
        known, found = known | {"rope_scaling"}, found or {}
    if found is None or ("rope_scaling" in found and "rope_scaling" not in known):
        raise ValueError(
            f"rope_parameters={noted} in {path} cannot be passed to mlx-lm's class for "
            f"{config.get('model_type')}, so its answers would be wrong; use a model "
            "whose layers have one rope_theta and no scaling, or a newer mlx-lm."
        )
    if scaling := config.get("rope_scaling"):  # it wins in transformers, too
        found["rope_scaling"] = scaling
    for name, names in NAMES.items():
        if name in found:
            value = found.pop(name)
            found[next((n for n in names if n in known), name)] = value
    return found


def _of_layers(noted: dict[str, Any], model_type: str | None) -> dict[str, Any] | None:
    """Return older keys for all layers at once; ``None`` if there are none for them."""
    kinds = {name: kind for name, kind in noted.items() if isinstance(kind, dict)}
    first = next(iter(kinds.values()), noted)
    if all(kind == first for kind in kinds.values()):
        return _flat(first)
    base = SLIDING_BASE.get(model_type or "")
    if base is None or {*kinds} != {"full_attention", "sliding_attention"}:
        return None
    full, sliding = _flat(kinds["full_attention"]), _flat(kinds["sliding_attention"])
    theta, share = sliding.pop("rope_theta", None), "partial_rotary_factor"
    if theta is None or sliding != {n: full[n] for n in full if n == share}:
        return None
    own = base not in full or full[base] == theta
    return full | {base: theta} if own else None


def _flat(rope: dict[str, Any]) -> dict[str, Any]:
    keys = {name: rope[name] for name in NAMES if name in rope}
    scaling = {name: value for name, value in rope.items() if name not in NAMES}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    return keys if kind == "default" else keys | {"rope_scaling": scaling}


def _numbers(config: dict[str, Any]) -> set[str]:
    """Return the keys that hold a number, never a text, in every class that
    :func:`_classes` finds.
    """
    numbers: set[str] = set()
    others: set[str] = set()
    for kind in _classes(config):
        for key, hint in get_type_hints(kind).items():
            either = get_origin(hint) in (Union, UnionType)
            allowed = {*get_args(hint)} if either else {hint}
            numeric = bool(allowed & {int, float}) and str not in allowed
            (numbers if numeric else others).add(key)
    return numbers - others


def _fields(config: dict[str, Any]) -> set[str]:
    """Return the keys that the classes of a model read."""
    return {field.name for kind in _classes(config) for field in fields(kind)}


def _classes(config: dict[str, Any]) -> list[type]:
    """Return the dataclasses of mlx-lm that read a model's config, or parts of it; none
    if it does not know the model.
    """
    from mlx_lm.utils import _get_classes

    try:
        module = sys.modules[_get_classes(config)[0].__module__]
    except (ValueError, AttributeError):
        return []
    parts = [part for part in vars(module).values() if isinstance(part, ModuleType)]
    kinds = [kind for part in (module, *parts) for kind in vars(part).values()]
    return [kind for kind in kinds if isinstance(kind, type) and is_dataclass(kind)]
