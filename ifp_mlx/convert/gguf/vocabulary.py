"""tokenizer.json from a plain vocabulary: SentencePiece pieces or byte-level BPE."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# The kinds of token, with the numbers of both SentencePiece and GGUF.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

SPACE = "\u2581"  # how SentencePiece spells a space

# How byte-level vocabularies cut text before merging, by GGUF's names.
CONTRACTIONS = r"'s|'t|'re|'ve|'m|'ll|'d"
GPT2 = rf"{CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
WORDS = rf"(?i:{CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = [rf"{WORDS}|\p{{N}}{{1,3}}|{MARKS}"]
QWEN2 = [rf"{WORDS}|\p{{N}}|{MARKS}"]
CUTS = {
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
    "deepseek-r1-qwen": QWEN2,
    "gpt-2": [GPT2],
    "llama-bpe": LLAMA3,
    "llama-v3": LLAMA3,
    "llama3": LLAMA3,
    "qwen2": QWEN2,
    "smollm": [r"\p{N}", GPT2],
}

# Hard cases, on which a rebuilt tokenizer must agree with SentencePiece.
PROBES = [
    "The capital of France is Paris.",
    " leading, trailing ",
    "two  spaces   and    more",
    "def f(x):\n    return x**2  # 3.14\n\n\n\tend",
    "naïve façade Ελληνικά Русский 中文字符 日本語 한국어 العربية हिन्दी",
    "👩🏽‍🚀🎉 ½ ﬁ … “quotes” e\u0301 \u00a0 \u3000 ⅷ",
    "1234567890 1,000,000.00",
]


def sentencepiece_bpe(
    pieces: Sequence[str],
    scores: Sequence[float],
    kinds: Sequence[int],
    *,
    unknown: int,
    prefix_space: bool,
) -> "Tokenizer":
    """Rebuild a SentencePiece BPE model as a fast tokenizer.

    Args:
        pieces: the text of each token id.
        scores: the merge priority of each token id; higher merges first.
        kinds: ``NORMAL`` ... ``BYTE`` of each token id.
        unknown: id of the token for text outside the vocabulary.
        prefix_space: whether text is read as if it began with a space.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers.tokenization_utils_base import generate_merges

    # In GGUF files user-defined pieces contain plain spaces and have low scores.
    spelled = [
        piece.replace(" ", SPACE) if kind == USER_DEFINED else piece
        for piece, kind in zip(pieces, kinds, strict=True)
    ]
    merged = {
        piece: 0.0 if kind == USER_DEFINED else score
        for piece, score, kind in zip(spelled, scores, kinds, strict=True)
    }
    skipped = (UNKNOWN, CONTROL, UNUSED, BYTE)
    merges = generate_merges(
        _vocab(spelled),
        merged,
        [piece for piece, kind in zip(spelled, kinds, strict=True) if kind in skipped],
    )
    tokenizer = Tokenizer(
        models.BPE(
            vocab=_vocab(spelled),
            merges=merges,
            unk_token=spelled[unknown],
            fuse_unk=True,
            byte_fallback=BYTE in kinds,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix_space:
        steps.append(decoders.Strip(" ", 1, 0))
        # Also after a special token, as in Llama 2's own tokenizer.json.
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend(SPACE), tokenizer.normalizer]
        )
    tokenizer.decoder = decoders.Sequence(steps)
    _add_special(tokenizer, spelled, kinds)
    return tokenizer


def byte_level_bpe(
    tokens: Sequence[str], merges: Sequence[str], kinds: Sequence[int], *, cut: str
) -> "Tokenizer":
    """Rebuild a byte-level BPE tokenizer.

    Args:
        tokens: the text of each token id, in the byte-level alphabet.
        merges: pairs separated by a space, first merged first.
        kinds: ``NORMAL`` ... ``BYTE`` of each token id.
        cut: how text is cut before merging, one of ``CUTS``.

    Raises:
        ValueError: if ``cut`` is unknown or the merges don't fit the tokens.
    """
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
    )

    if cut not in CUTS:
        raise ValueError(
            f"tokenizer.ggml.pre={cut!r} is an unknown way to cut text; "
            f"known are {', '.join(CUTS)}."
        )
    split = (merge.partition(" ") for merge in merges)
    try:
        model = models.BPE(
            vocab=_vocab(tokens),
            merges=[(left, right) for left, _, right in split],
            # Llama 3 looks a whole word up before it merges.
            ignore_merges=CUTS[cut] is LLAMA3,
        )
    except Exception as error:  # tokenizers raises bare exceptions
        raise ValueError(
            f"tokenizer.ggml.merges do not fit the tokens ({error}); "
            "fetch the file again."
        ) from error
    tokenizer = Tokenizer(model)
    if CUTS[cut] is QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(regex), "isolated") for regex in CUTS[cut]]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _add_special(tokenizer, tokens, kinds)
    return tokenizer


def _vocab(tokens: Sequence[str]) -> dict[str, int]:
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(t for i, t in enumerate(tokens) if vocab[t] != i)
        raise ValueError(
            f"The vocabulary holds the token {twice!r} twice; fetch the file again."
        )
    return vocab


def _add_special(
    tokenizer: "Tokenizer", tokens: Sequence[str], kinds: Sequence[int]
) -> None:
    from tokenizers import AddedToken

    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind == CONTROL)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )


def unpack_sentencepiece(source: Path, folder: Path) -> None:
    """Write tokenizer.json to ``folder`` from the tokenizer.model in ``source``.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not a SentencePiece BPE model, or tokenizer.json cannot
            express it.
    """
    from sentencepiece import SentencePieceProcessor
    from sentencepiece.sentencepiece_model_pb2 import ModelProto
    from tokenizers import AddedToken

    file = source / "tokenizer.model"
    if not file.exists():
        raise FileNotFoundError(
            f"{source} has neither tokenizer.json nor tokenizer.model; "
            "put the model's tokenizer there."
        )
    try:
        processor = SentencePieceProcessor(model_file=str(file))
        model = ModelProto.FromString(processor.serialized_model_proto())
    except Exception as error:  # of the library's own kinds
        raise ValueError(
            f"{file} is not a SentencePiece model ({error}); "
            "put the model's tokenizer.json beside it."
        ) from error
    tokenizer = sentencepiece_bpe(
        [piece.piece for piece in model.pieces],
        [piece.score for piece in model.pieces],
        [piece.type for piece in model.pieces],
        unknown=processor.unk_id(),
        prefix_space=model.normalizer_spec.add_dummy_prefix,
    )
    own = [p.piece.replace(SPACE, " ") for p in model.pieces if p.type == USER_DEFINED]
    for text in [*PROBES, *(f"a{piece}b {piece}c" for piece in own)]:
        if tokenizer.encode(text).ids != processor.encode(text):
            raise ValueError(
                f"{file} reads {text!r} in a way that tokenizer.json cannot say "
                "(supported is BPE without text normalisation; user-defined symbols "
                "only if no space is put before the text); "
                "put the model's tokenizer.json beside it."
            )
    config = _read(folder / "tokenizer_config.json")
    added = _read(folder / "added_tokens.json")
    names = sorted(added, key=added.__getitem__)
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in names])
    if any(tokenizer.token_to_id(name) != i for name, i in added.items()):
        raise ValueError(
            f"{folder / 'added_tokens.json'} leaves ids out, or gives some twice; "
            "put the model's tokenizer.json beside it."
        )
    ids = {role: getattr(processor, f"{role}_id")() for role in ("bos", "eos", "unk")}
    write_tokenizer(
        folder,
        tokenizer,
        {role: i for role, i in ids.items() if i >= 0},
        add_bos=config.get("add_bos_token", True) and ids["bos"] >= 0,
        config=config,
    )


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_tokenizer(
    folder: Path,
    tokenizer: "Tokenizer",
    ids: dict[str, int],
    *,
    add_bos: bool,
    config: dict[str, Any] | None = None,
) -> None:
    """Write tokenizer.json and tokenizer_config.json.

    Args:
        folder: where to.
        tokenizer: what to write.
        ids: token ids by role: any of ``bos``, ``eos``, ``unk`` and ``pad``.
        add_bos: whether text begins with the ``bos`` token.
        config: more content of tokenizer_config.json; it overrides ``ids``.
    """
    from tokenizers import processors

    roles = {f"{role}_token": tokenizer.id_to_token(i) for role, i in ids.items()}
    if add_bos:
        bos = roles["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, ids["bos"])],
        )
    config = {
        "clean_up_tokenization_spaces": False,
        **roles,
        **(config or {}),
        "add_bos_token": add_bos,
        # The class that takes tokenizer.json as it is.
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
