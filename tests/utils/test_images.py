from __future__ import annotations

import numpy as np
import pytest
import torch

from factorkit.utils.images import (
    images_to_pixels,
    pixels_to_images,
    pixels_to_signed,
    signed_to_pixels,
    uint8_to_unit,
    unit_to_uint8,
)


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


def test_signed_to_pixels_inverts_and_clips():
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    np.testing.assert_array_equal(signed_to_pixels(pixels_to_signed(torch.from_numpy(images))), images)
    pixel = torch.tensor([[[[0, 255, 51]]]], dtype=torch.uint8)
    assert pixels_to_signed(pixel).flatten().tolist() == pytest.approx([-1, 1, -0.6])
    values = torch.tensor([10.0, 20.0, 30.0]).reshape(1, 1, 1, 3)
    assert pixels_to_signed(values).shape == (1, 3, 1, 1) and values.flatten().tolist() == [10, 20, 30], "a copy"
    assert signed_to_pixels(torch.tensor([-3.0, 3.0]).reshape(1, 1, 1, 2)).ravel().tolist() == [0, 255]
