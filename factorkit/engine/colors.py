"""The colours of regions, the same in every sheet and every curve."""

from __future__ import annotations

import colorsys

import numpy as np

# Okabe and Ito, "Color Universal Design" (2008), their order changed so that the first few differ most in lightness
# too. Their black is left out: it cannot be told from a dark photograph or from the ink of a plot.
_OKABE_ITO = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")


def palette(k: int) -> np.ndarray:
    """Colours of regions 0..k-1, uint8 [k, 3]: distinct, and told apart with the common colour-blindnesses up to k = 7.

    A region keeps its colour whatever k is: `palette(3)` is the beginning of `palette(9)`.
    """
    colors = [tuple(bytes.fromhex(code[1:])) for code in _OKABE_ITO[:k]]
    for i in range(len(colors), k):
        # Turning the hue by the golden ratio never returns to a hue; three lightnesses keep close hues apart.
        r, g, b = colorsys.hls_to_rgb(i * 0.618034 % 1.0, (0.35, 0.55, 0.75)[i % 3], 0.6)
        colors.append((round(255 * r), round(255 * g), round(255 * b)))
    return np.array(colors, dtype=np.uint8).reshape(k, 3)
