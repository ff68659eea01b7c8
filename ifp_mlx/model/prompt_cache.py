"""A text that was read once, kept in a file for answers to go on from.

The file is mlx-lm's prompt cache (``save_prompt_cache``). Its metadata also say which
tokens were read, and by which compact model: keys and values of one are nonsense to
another, so a file of another mask, adapter or model is refused.
"""

import copy
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..decoding.kv import KVOptions
from ..files.atomic import new_file
from ..selection.prompts import Prompt, as_messages, encode, ids_of, render, tokenize
from ..slicing.stock import PREFILL_STEP
from .card import fingerprint_of
from .checkpoint import Compact, IFPModel
from .dense_prefill import Reading

# What mlx-lm's own command takes for the model's path; no folder has this name.
FOR_MLX_LM = "a compact model of {name}, made by ifp_mlx"
MADE_BY = "ifp_identity", "ifp_weights"  # no dots: mlx-lm would nest the keys
TOKENS = "ifp_tokens"


@dataclass
class PromptFile:
    """An existing prompt cache file.

    Attributes:
        path: of it.
        tokens: ids of what was read.
        kv: mlx-lm's KV cache.
        identity: of the selection that it was read with.
    """

    path: Path
    tokens: list[int]
    kv: list[Any]
    identity: str

    @staticmethod
    def open(path: Path, model: IFPModel) -> "PromptFile | None":
        """Return what is in a file, ``None`` if it is not there yet.

        Raises:
            ValueError: if it is no prompt cache of a compact model, or was read by
                another large model.
        """
        from mlx_lm.models.cache import load_prompt_cache

        if path.suffix != ".safetensors":
            raise ValueError(
                f"The prompt cache file {path} must have a name that ends in "
                ".safetensors; choose another name."
            )
        if not path.exists():
            return None
        try:
            kv, about = load_prompt_cache(str(path), return_metadata=True)
            tokens = json.loads(about[TOKENS])
            identity, weights = about[MADE_BY[0]], about[MADE_BY[1]]
            if not (isinstance(tokens, list) and {*map(type, tokens)} == {int}):
                raise TypeError("its tokens are none")
        except Exception as error:  # whatever a file of another kind causes
            raise ValueError(
                f"{path} is no prompt cache that ifp_mlx wrote ({type(error).__name__}); "
                "give a new name, and it is written after the prompt was read."
            ) from error
        if weights != fingerprint_of(model):
            raise ValueError(
                f"{path} was read by another model, or with another adapter; use the one "
                "it was made with, or a new file."
            )
        return PromptFile(path, tokens, kv, identity)

    def reading(self, compact: Compact, kv: KVOptions) -> Reading:
        """Return what the file has read, for a compact model to go on from.

        Raises:
            ValueError: if another compact model read it, or its KV cache is kept in
                another way.
        """
        if self.identity != compact.selection.identity:
            raise ValueError(
                f"{self.path} was read by the compact model {self.identity}, and this is "
                f"{compact.selection.identity}; select as when it was made (by the same "
                "--instruction, --mask-file or --task), or use a new file."
            )
        _check_kept(self.path, self.kv, kv)
        return Reading(self.kv, len(self.tokens), cached=len(self.tokens))


def write_prompt_cache(
    path: Path,
    model: IFPModel,
    compact: Compact,
    tokens: Sequence[int],
    count: int,
    kv: KVOptions,
    options: Mapping[str, Any],
) -> Reading:
    """Read the beginning of a prompt with a compact model, and keep that in a file.

    Args:
        path: the file; its folder must be there.
        model: the large model.
        compact: the compact model that reads.
        tokens: of the prompt.
        count: how many of them go into the file.
        kv: how the cache is kept.
        options: of ``mlx_lm.stream_generate``; ``prefill_step_size`` holds here too.

    Returns:
        What has been read for the answer, which needs at least one token more.
    """
    from mlx_lm.models.cache import save_prompt_cache

    start = time.perf_counter()
    step = options.get("prefill_step_size", PREFILL_STEP)
    cache = kv.cache_of(compact.model)
    known = min(count, len(tokens) - 1)
    _read(compact.model, tokens[:known], cache, kv, step)
    whole = cache
    if known < count:
        whole = copy.deepcopy(cache)
        _read(compact.model, tokens[known:count], whole, kv, step)
    about = {
        "model": FOR_MLX_LM.format(name=model.name),
        "tokenizer_config": "{}",
        MADE_BY[0]: compact.selection.identity,
        MADE_BY[1]: fingerprint_of(model),
        TOKENS: json.dumps(list(tokens[:count])),
    }
    with new_file(path) as scratch:
        save_prompt_cache(str(scratch), whole, about)
    return Reading(cache, known, time.perf_counter() - start)


def _read(
    model: nn.Module, tokens: Sequence[int], cache: list[Any], kv: KVOptions, step: int
) -> None:
    """Let a model read some tokens, as mlx_lm.cache_prompt does."""
    from mlx_lm.generate import generate_step

    if not tokens:
        return
    how = kv.for_mlx_lm() | {"prompt_cache": cache, "prefill_step_size": step}
    for _ in generate_step(mx.array(list(tokens)), model, max_tokens=0, **how):
        pass
    mx.eval([layer.state for layer in cache])


def open_length(
    tokenizer: Any,
    prompt: Prompt,
    tokens: Sequence[int],
    chat_template: bool,
    **how: Any,
) -> int:
    """Return after how many of its tokens a prompt can be continued: all except those
    that end the user's message and begin the answer.

    Args:
        tokenizer: mlx-lm's.
        prompt: as the caller gave it.
        tokens: of it.
        chat_template: whether it went through the template.
        how: the ``system`` prompt and the template's ``config``.
    """
    if ids_of(prompt) is not None or not (
        chat_template and tokenizer.has_chat_template
    ):
        return len(tokens)
    messages = as_messages(prompt, how["system"])
    text = render(tokenizer, messages, continued=True, config=how["config"])
    begun = encode(tokenizer, text, special=False)
    pairs = enumerate(zip(begun, tokens, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(begun), len(tokens)))


def continuation(
    tokenizer: Any, file: PromptFile, prompt: Prompt, chat_template: bool, **how: Any
) -> list[int]:
    """Return the tokens of a prompt that goes on where a file ends, inside the user's
    message, as with mlx_lm.generate.

    Args:
        tokenizer, prompt, chat_template, how: see :func:`open_length`.
        file: has read what comes before.

    Raises:
        ValueError: if more is given than a text.
    """
    if (ids := ids_of(prompt)) is not None:
        return ids
    messages = as_messages(prompt)
    if how["system"] is not None or len(messages) > 1:
        raise ValueError(
            f"The prompt goes on where {file.path} ends, so no system prompt and no "
            "other message can come before it; leave them out."
        )
    if not (chat_template and tokenizer.has_chat_template):
        return encode(tokenizer, messages[0]["content"], special=False)
    mark = "<query>"
    texts = [
        render(tokenizer, [{"role": "user", "content": said}], config=how["config"])
        for said in (messages[0]["content"], mark)
    ]
    start = texts[1].find(mark)
    if start < 0:
        return tokenize(tokenizer, messages, config=how["config"])
    return encode(tokenizer, texts[0][start:], special=False)


def _check_kept(path: Path, cache: Sequence[Any], kv: KVOptions) -> None:
    """Raise ``ValueError`` if a cache is not kept as the options say."""
    from mlx_lm.models.cache import QuantizedKVCache, RotatingKVCache

    first = cache[0]
    bits = first.bits if isinstance(first, QuantizedKVCache) else None
    size = first.max_size if isinstance(first, RotatingKVCache) else None
    asked = {"kv_bits": kv.kv_bits if bits else None, "max_kv_size": kv.max_kv_size}
    if bits:
        asked["kv_group_size"] = kv.kv_group_size
    has = {"kv_bits": bits, "max_kv_size": size}
    has["kv_group_size"] = first.group_size if bits else None
    for name, value in asked.items():
        if value is not None and value != has[name]:
            raise ValueError(
                f"{name}={value} is not how {path} is kept ({has[name] or 'without'}); "
                "leave it as when the file was made."
            )
