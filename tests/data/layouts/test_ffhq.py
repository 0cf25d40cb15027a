from __future__ import annotations

import pytest

from factorkit.data import open_dataset
from factorkit.utils.errors import DataError


@pytest.mark.parametrize("size", ["images1024x1024", "thumbnails128x128"])
def test_ffhq_either_resolution_has_official_split(tmp_path, photo, size):
    root = tmp_path / "ffhq"
    for number in (0, 1, 59999, 60000):
        photo(root / f"{size}/{number // 1000 * 1000:05d}/{number:05d}.png", number % 200, (8, 8))
    dataset = open_dataset(root)
    assert dataset.layout == "ffhq" and dataset.train.names == ["00000/00000.png", "00000/00001.png", "59000/59999.png"]
    assert dataset.splits["val"].images.names == ["60000/60000.png"] and dataset.notes == (f"read from {size}",)
    assert len(open_dataset(root, holdout="none").train) == 4 and dataset.test_images is None
    photo(root / f"{size}/readme.png")
    with pytest.raises(DataError, match="expected 00000/00000.png"):
        open_dataset(root)
