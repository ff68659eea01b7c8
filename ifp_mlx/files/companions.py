"""The files of a model besides its weights and config.json."""

import shutil
from pathlib import Path

from .objects import read_object

TOKENIZER = ["tokenizer*", "special_tokens_map.json", "added_tokens.json"]


TOKENIZER += ["vocab.json", "merges.txt", "chat_template*", "generation_config.json"]


TEMPLATE = "chat_template.jinja"


LICENCES = ["LICENSE*", "NOTICE*", "USE_POLICY*", "*TERMS*"]


def copy_companions(source: Path, target: Path) -> None:
    """Copy a model's tokenizer, chat template, generation settings and licence."""
    for pattern in TOKENIZER + LICENCES:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
    if (
        template := lone_template(source)
    ) is not None:  # for programs that read no other
        (target / TEMPLATE).write_text(template, encoding="utf-8")


def lone_template(folder: Path) -> str | None:
    """Return the chat template of a folder that has it only in ``chat_template.json``,
    which mlx-lm does not read; else ``None``.

    Raises:
        ValueError: if the file holds none.
    """
    file, config = folder / "chat_template.json", folder / "tokenizer_config.json"
    if not file.exists() or (folder / TEMPLATE).exists():
        return None
    if config.exists() and read_object(config).get("chat_template"):
        return None
    template = read_object(file).get("chat_template")
    if not isinstance(template, str):
        raise ValueError(
            f"{file} holds no text as its chat_template ({template!r}); correct it, or "
            "delete it to do without a chat template."
        )
    return template


UNKNOWN_LICENCE = "not named by the card of the source folder; see the base model"


def licence_of(path: Path) -> str | None:
    """Return the licence that the card of a model folder names; ``None`` if there is no
    card, or none that can be read, or it does not name one.
    """
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    try:
        licence = (metadata_load(path / "README.md") or {}).get("license")
    except (OSError, ValueError, YAMLError):
        return None
    return licence if isinstance(licence, str) else None
