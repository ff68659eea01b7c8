"""What belongs to a model besides its weights and config.json."""

import shutil
from pathlib import Path

TOKENIZER = ["tokenizer*", "special_tokens_map.json", "added_tokens.json"]


TOKENIZER += ["vocab.json", "merges.txt", "chat_template*", "generation_config.json"]


LICENCES = ["LICENSE*", "NOTICE*", "USE_POLICY*", "*TERMS*"]


def copy_companions(source: Path, target: Path) -> None:
    """Copy a model's tokenizer, chat template, generation settings and licence."""
    for pattern in TOKENIZER + LICENCES:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)


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
