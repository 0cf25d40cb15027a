from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def draw():
    """draw(path, pixels, palette=False, **options): an image of these pixels, creating its folders."""

    def write(path: Path, pixels, palette: bool = False, **options) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(np.asarray(pixels, np.uint8))
        if palette:
            image.putpalette([c for i in range(256) for c in (i, 255 - i, 7 * i % 256)])
        image.save(path, **options)
        return path

    return write


@pytest.fixture
def photo(draw):
    """photo(path, value, size=(16, 12)): an image whose grey value identifies it."""

    def write(path: Path, value: int = 0, size=(16, 12)) -> Path:
        return draw(path, np.full((size[1], size[0], 3), value))

    return write


@pytest.fixture
def text():
    """text(path, *lines): a text file, creating its folders."""

    def write(path: Path, *lines: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def grey():
    """grey(source): the value of each image's first pixel, in order."""

    def read(source) -> list[int]:
        return [int(np.asarray(source.read(i))[0, 0, 0]) for i in range(len(source))]

    return read
