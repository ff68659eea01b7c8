"""A user's text in a file, or a sentence that says what is wrong with it."""

from io import StringIO
from pathlib import Path


def read_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not UTF-8.
    """
    return decoded(path.read_bytes(), str(path))


def decoded(content: bytes, name: str) -> str:
    """Return bytes as text, its lines ended by ``\\n``; see :func:`read_text`.

    Args:
        content: UTF-8.
        name: where they are from.
    """
    try:
        return StringIO(content.decode("utf-8-sig"), newline=None).read()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8 at byte {error.start + 1} "
            f"(0x{content[error.start]:02x}); give it as UTF-8."
        ) from None
