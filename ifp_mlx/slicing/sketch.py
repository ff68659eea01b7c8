"""A sketch: what a long text shows of a layer's channels, in a few rows.

Which channels can stand in for which others follows from their second moment over many
tokens, ``[F, F]``, which is too large to keep for every layer. A sketch is a few rows
with nearly the same second moment, which can be used wherever tokens' channels are
used: the strongest directions among the tokens, found by a randomised singular value
decomposition (Halko et al. 2011, arXiv:0909.4061).
"""

from collections.abc import Sequence

import mlx.core as mx

RANK = 256  # rows; 128 are worth much less and 512 no more, on SmolLM2-135M
SPARE = 64  # more random vectors, so that the last rows are good too
ROUNDS = 3  # multiplications by the second moment
SEED = 0


def unit_rows(channels: mx.array) -> mx.array:
    """Return tokens' channels, each token scaled to length 1: float32 ``[T, F]``."""
    rows = channels.astype(mx.float32)
    return rows / mx.maximum(mx.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


def condensed(parts: Sequence[mx.array], rank: int = RANK) -> mx.array:
    """Return rows that have about the second moment of one token, on average.

    Args:
        parts: what comes into the inlet of the dense layer for a text, one part of its
            tokens after the other, ``[t, F]``, each token of length 1.
        rank: at most this many rows.

    Returns:
        ``[r, F]`` float32, the strongest direction first.
    """
    tokens, channels = sum(map(len, parts)), parts[0].shape[1]
    wanted = min(rank + SPARE, tokens, channels)
    found = mx.random.normal((channels, wanted), key=mx.random.key(SEED))
    for _ in range(ROUNDS):
        with mx.stream(mx.cpu):  # MLX solves such problems on the CPU only
            found = mx.linalg.qr(_moment_times(parts, found))[0]
        mx.eval(found)
    with mx.stream(mx.cpu):
        strengths, sides = mx.linalg.eigh(found.T @ _moment_times(parts, found))
    strengths = mx.sqrt(mx.maximum(strengths / tokens, 0))
    rows: mx.array = ((found @ sides) * strengths).T[::-1][:rank]
    return rows


def _moment_times(parts: Sequence[mx.array], columns: mx.array) -> mx.array:
    """Return the product of the parts' second moment, ``[F, F]``, with some columns."""
    total = mx.zeros(columns.shape)
    for part in parts:
        rows = part.astype(mx.float32)
        total = total + rows.T @ (rows @ columns)
        mx.eval(total)
    return total
