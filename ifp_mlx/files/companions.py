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


def licence_of(path: Path) -> str | None:
    """Return the licence that the card of a model folder states, or ``None``."""
    from huggingface_hub import ModelCard

    readme = path / "README.md"
    return ModelCard.load(readme).data.license if readme.is_file() else None
