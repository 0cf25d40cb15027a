"""Drawn flowers as a data set on disk."""

from pathlib import Path

import numpy as np
from PIL import Image

from factorkit.data.procedural.flowers import draw_flowers


def write_flowers(folder: Path, count: int, size: int, seed: int = 0) -> Path:
    """Write images/ and masks/ (0 or 255) of drawn flowers to a new folder, and return it."""
    for kind, stack, factor in zip(("images", "masks"), draw_flowers(count, size, seed=seed), (1, 255), strict=True):
        (folder / kind).mkdir(parents=True)
        for i, pixels in enumerate(stack):
            Image.fromarray(pixels.astype(np.uint8) * np.uint8(factor)).save(folder / kind / f"{i:02d}.png")
    return folder
