"""The order of channels on disk: channels picked together lie together."""

import numpy as np


def order_units(uses: np.ndarray, unit: int = 1) -> np.ndarray:
    """Return an order in which each task's units lie in a few ranges.

    Units that every task uses come first, then those that most use, and so on: every
    task finds most of its channels in one range at the front. Among units that are used
    equally often, those used by the same tasks lie side by side. On SmolLM2 the first
    rule brings nearly all of the gain; a spectral order of co-selection was measured to
    be worse.

    Args:
        uses: ``[n, L, F]``, for each of ``n`` tasks which channels it uses: masks, or
            importance, the larger the more often used.
        unit: channels that lie together.

    Returns:
        int64 ``[L, F / unit]``, the units of each layer from first to last.
    """
    n, L, F = uses.shape
    blocks = uses.reshape(n, L, F // unit, unit).mean(axis=-1)
    return np.stack([_order_layer(blocks[:, layer]) for layer in range(L)])


def _order_layer(uses: np.ndarray) -> np.ndarray:
    # lexsort's last key counts first; where all are equal, the order stays.
    return np.lexsort([*-uses[::-1], -uses.mean(axis=0)])
