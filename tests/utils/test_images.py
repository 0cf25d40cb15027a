from __future__ import annotations

import numpy as np
import torch

from factorkit.utils.images import images_to_pixels, pixels_to_images, uint8_to_unit, unit_to_uint8


def test_unit_to_uint8_rounds_and_clips_arrays_and_tensors_alike():
    values = np.concatenate([np.linspace(-0.1, 1.1, 4001), (np.arange(255) + 0.5) / 255]).astype(np.float32)
    pixels = unit_to_uint8(values)
    assert pixels.dtype == np.uint8 and np.array_equal(pixels, unit_to_uint8(torch.from_numpy(values)))
    assert np.array_equal(pixels, np.clip(np.rint(values * np.float32(255)), 0, 255))
    assert unit_to_uint8(np.array([True, False])).tolist() == [255, 0]


def test_pixels_and_images_round_trip_is_exact():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), np.uint8)
    images = pixels_to_images(pixels)
    assert images.shape == (2, 3, 5, 4) and np.array_equal(images_to_pixels(images), pixels)
    assert torch.equal(images, uint8_to_unit(torch.from_numpy(pixels)).permute(0, 3, 1, 2))
    assert np.array_equal(images_to_pixels(images[0]), pixels[0])
