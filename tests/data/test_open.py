"""Images in every supported form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from factorkit.data.decode import to_rgb
from factorkit.data.open import read_images
from factorkit.utils.errors import DataError

RGBA = np.random.default_rng(0).integers(0, 256, (7, 9, 4), np.uint8)


@pytest.mark.parametrize(
    "form",
    [RGBA, RGBA[None], torch.from_numpy(RGBA).permute(2, 0, 1), torch.from_numpy(RGBA).permute(2, 0, 1)[None], [RGBA]],
    ids=["HWC", "NHWC", "CHW", "NCHW", "list"],
)
def test_read_images_alpha_is_composited_over_white(form):
    images, _ = read_images(form)
    expected = np.asarray(to_rgb(Image.fromarray(RGBA)))
    assert len(images) == 1
    np.testing.assert_array_equal(np.asarray(images[0]), expected)


def test_read_images_channel_counts_are_interpreted_or_refused():
    (image,), _ = read_images(RGBA[..., :1])
    np.testing.assert_array_equal(np.asarray(image)[..., 1], RGBA[..., 0])
    with pytest.raises(DataError, match="one image"):
        read_images(RGBA[..., :2])
