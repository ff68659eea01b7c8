"""Bytes in words, and how many this machine has."""

import os


def physical_memory() -> int:
    """Return the bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def in_words(count: int) -> str:
    """Return bytes as people write them; what is needed is never rounded down."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            digits = max(0, 3 - len(str(count // unit)))
            scale = 10**digits
            return f"{-(-count * scale // unit) / scale:.{digits}f} {name}"
    return f"{count} bytes"
