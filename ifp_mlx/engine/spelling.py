"""The bytes of one token; a character may need several tokens."""

from functools import cache
from typing import Any

SPACE = "\u2581".encode()  # how SentencePiece writes one


def bytes_of(tokenizer: Any, token: int) -> bytes:
    """Return what a token adds to the text, in UTF-8, whole characters or not.

    Args:
        tokenizer: mlx-lm's; its streaming detokenizer knows how the vocabulary is written.
        token: an id.
    """
    pieces = getattr(tokenizer.detokenizer, "tokenmap", ())
    piece = pieces[token] if token < len(pieces) else None
    if isinstance(piece, bytes):  # SentencePiece
        return piece.replace(SPACE, b" ")
    if isinstance(piece, str):  # byte-level: a letter for each byte
        letters = _bytes_of_letters()
        return b"".join(letters.get(letter, letter.encode()) for letter in piece)
    return str(tokenizer.decode([token])).encode()


def spelled(content: bytes) -> str:
    """Return a token's bytes as text; a part of a character as OpenAI writes it."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


@cache
def _bytes_of_letters() -> dict[str, bytes]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: bytes([byte]) for byte, letter in bytes_to_unicode().items()}
