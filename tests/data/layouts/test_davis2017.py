from __future__ import annotations

import numpy as np
import pytest

from factorkit.data import load_labelled, open_dataset
from factorkit.utils.errors import DataError


@pytest.fixture
def davis(tmp_path, draw, photo, text):
    """Videos bear (2 frames, two objects) and judo (3) to train, camel (2) to score; eel is in no list."""
    root = tmp_path / "DAVIS"
    for video, frames in {"bear": 2, "judo": 3, "camel": 2, "eel": 1}.items():
        for i in range(frames):
            photo(root / f"JPEGImages/480p/{video}/{i:05d}.jpg", 10 * frames + i)
            values = np.zeros((12, 16))
            values[:, :4], values[:, 4:8] = 1, 2
            draw(root / f"Annotations/480p/{video}/{i:05d}.png", values, palette=True)
    text(root / "ImageSets/2017/train.txt", "judo", "bear")
    text(root / "ImageSets/2017/val.txt", "camel")
    return root


def test_davis_splits_keep_videos(davis, grey):
    dataset = open_dataset(davis)
    assert dataset.layout == "davis-2017" and dataset.test_images.names == ["camel/00000.jpg", "camel/00001.jpg"]
    train = dataset.splits["train"]
    assert {clip: rows.tolist() for clip, rows in train.videos.items()} == {"judo": [0, 1, 2], "bear": [3, 4]}
    assert set(dataset.splits["val"].videos) == {"camel"}
    assert grey(train.images.subset(train.videos["bear"])) == [20, 21], "a video's frames, in order"
    labels = load_labelled(train.images, train.masks, 12).labels
    assert labels.shape == (5, 12, 12) and set(np.unique(labels)) == {0, 1, 2}


def test_davis_missing_video_raises(davis, text):
    text(davis / "ImageSets/2017/val.txt", "camel", "zebra")
    with pytest.raises(DataError, match="val.txt lists zebra"):
        open_dataset(davis)
