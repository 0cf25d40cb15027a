from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> Path:
    """No test reads or writes the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("FACTORKIT_CACHE", str(folder))
    return folder


@pytest.fixture
def save():
    """save(path, colour, size=(w, h), mode="RGB", **options): a plain image, creating its folders."""

    def write(path: Path, colour=(200, 30, 60), size=(12, 10), mode="RGB", **options) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size, colour).save(path, **options)
        return path

    return write


@pytest.fixture
def break_jpeg():
    """A JPEG cut off in the middle of its data."""

    def write(path: Path) -> Path:
        noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:900])
        return path

    return write
