"""The tokenizer of a model folder: data alone, no code of the folder ever runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files.companions import lone_template
from ..files.objects import read_object

PROBE = "Hello, naïve 🎉🥑 café:\nyes"  # with characters of many tokens
CONFIG = "tokenizer_config.json"
FILES = ("tokenizer.json", CONFIG, "special_tokens_map.json", "added_tokens.json")


def open_tokenizer(folder: Path, config: dict[str, Any]) -> Any:
    """Return mlx-lm's ``TokenizerWrapper`` of a model folder.

    Args:
        folder: the model's, or a predictor's.
        config: its config.json, which names the tokens that end an answer.

    Raises:
        ValueError: if the tokenizer is missing, damaged, or code of the folder's own.
    """
    from mlx_lm.utils import load_tokenizer

    # Without this, transformers would ask on stdin whether to run the folder's code.
    options: dict[str, Any] = {"trust_remote_code": False}
    if (template := lone_template(folder)) is not None:
        options["chat_template"] = template
    ends = config.get("eos_token_id")
    try:
        tokenizer = load_tokenizer(folder, options, eos_token_ids=ends)
    except Exception as error:  # whatever the libraries below raise
        raise ValueError(_reason(folder, config, error)) from error
    _fit_detokenizer(tokenizer)
    return tokenizer


def _fit_detokenizer(tokenizer: Any) -> None:
    """See that streamed text is the text that was encoded.

    mlx-lm knows a few forms of tokenizer.json, and chooses its streaming detokenizer by
    them. If there is no such file, or its decoder does not belong to the vocabulary,
    text comes twice or without spaces. Then the first of mlx-lm's detokenizers that
    returns the text is used.
    """
    from mlx_lm import tokenizer_utils as utils

    tokens = list(tokenizer.encode(PROBE, add_special_tokens=False))
    if _streamed(tokenizer.detokenizer, tokens) == PROBE:
        return
    for kind in (utils.BPEStreamingDetokenizer, utils.SPMStreamingDetokenizer):
        try:
            made = kind(tokenizer._tokenizer)
            if _streamed(made, tokens) == PROBE:
                tokenizer._detokenizer = made
                return
        except (AttributeError, LookupError, TypeError, ValueError):
            continue  # a vocabulary of another kind


def _streamed(detokenizer: Any, tokens: Sequence[int]) -> str:
    pieces = []
    for token in tokens:
        detokenizer.add_token(token)
        pieces.append(detokenizer.last_segment)
    detokenizer.finalize()
    return "".join([*pieces, detokenizer.last_segment])


def _reason(folder: Path, config: dict[str, Any], error: Exception) -> str:
    """Return why a tokenizer cannot be opened, naming the file if one is at fault."""
    found = {file: folder / file for file in FILES if (folder / file).exists()}
    try:
        read = {file: read_object(path) for file, path in found.items()}
    except ValueError as damaged:
        return str(damaged)
    homes = {CONFIG: read.get(CONFIG, {}), "config.json": config}
    for file, content in homes.items():
        if code := content.get("auto_map"):
            return (
                f"auto_map={code} in {folder / file} asks to run code from the model "
                "folder, which is never done; use a model whose tokenizer the "
                "transformers library has built in."
            )
    if not found and not (folder / "tokenizer.model").exists():
        return f"{folder} has no tokenizer; put its tokenizer.json there."
    why = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return (
        f"The tokenizer in {folder} cannot be opened ({why}); correct what is named, or "
        "fetch or convert the model again."
    )
