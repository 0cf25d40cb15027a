from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from factorkit.data import load_labelled, open_dataset
from factorkit.utils.errors import DataError


def test_ecssd_masks_are_binary(tmp_path, draw, photo):
    root = tmp_path / "ECSSD"
    for i in range(1, 11):
        photo(root / f"images/{i:04d}.jpg", 20 * i)
        values = np.zeros((12, 16))
        values[:6] = 255
        draw(root / f"ground_truth_mask/{i:04d}.png", values)
    dataset = open_dataset(root)
    assert dataset.layout == "ecssd" and len(dataset.test_images) == 2 and len(dataset.train) == 8
    assert not dataset.splits
    foreground = load_labelled(dataset.test_images, dataset.test_masks, 12).foreground
    assert foreground[:, :6].all() and not foreground[:, 6:].any()
    for path in (root / "ground_truth_mask").iterdir():
        Image.open(path).convert("1").save(path)
    assert (load_labelled(dataset.test_images, dataset.test_masks, 12).foreground == foreground).all()
    for path in (root / "ground_truth_mask").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="no image has a mask of its name"):
        open_dataset(root)
