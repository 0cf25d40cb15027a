from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from factorkit.data import ImageDecodeError, crop_square, to_rgb
from factorkit.utils.errors import ConfigError


def pixel(image: Image.Image) -> tuple[int, ...]:
    converted = to_rgb(image)
    assert converted.mode == "RGB"
    return converted.getpixel((0, 0))


def through_file(image: Image.Image, suffix: str, **options) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, suffix, **options)
    buffer.seek(0)
    return Image.open(buffer)


@pytest.mark.parametrize("suffix", ["PNG", "TIFF"])
def test_to_rgb_16_bit_is_scaled(suffix):
    deep = Image.fromarray(np.full((4, 4), 0x8040, np.uint16))
    assert pixel(through_file(deep, suffix)) == (128, 128, 128)


def test_to_rgb_other_integer_modes():
    assert pixel(Image.fromarray(np.full((4, 4), 40000, np.int32))) == (156, 156, 156)
    assert pixel(Image.frombytes("I;16B", (1, 1), b"\x80\x40")) == (128, 128, 128)


@pytest.mark.parametrize("suffix", ["PNG", "TIFF"])
@pytest.mark.parametrize("depth", [8, 10, 12, 14, 16])
def test_to_rgb_depth_is_that_of_the_values_not_of_the_container(suffix, depth):
    ramp = np.linspace(0, 255, 64).round().astype(np.uint16).reshape(8, 8)
    stored = (ramp.astype(np.float64) * (2**depth - 1) / 255).round().astype(np.uint16)
    converted = np.asarray(to_rgb(through_file(Image.fromarray(stored), suffix)))[..., 0]
    assert np.abs(converted.astype(int) - ramp).max() <= 1


def test_to_rgb_8_bit_values_in_int32_are_kept():
    ramp = np.arange(256, dtype=np.int32).reshape(16, 16)
    np.testing.assert_array_equal(np.asarray(to_rgb(Image.fromarray(ramp)))[..., 0], ramp)


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_to_rgb_float_full_scale_is_white(white):
    ramp = np.linspace(0, white, 16, dtype=np.float32).reshape(4, 4)
    converted = np.asarray(to_rgb(through_file(Image.fromarray(ramp), "TIFF")))[..., 0]
    np.testing.assert_array_equal(converted, np.rint(np.linspace(0, 255, 16)).reshape(4, 4))


def test_to_rgb_8_bit_modes():
    assert pixel(Image.new("L", (2, 2), 77)) == (77, 77, 77)
    assert pixel(Image.new("1", (2, 2), 1)) == (255, 255, 255)
    assert pixel(Image.new("CMYK", (2, 2), (0, 255, 255, 0))) == (255, 0, 0)


def test_to_rgb_float_range_is_detected():
    assert pixel(Image.fromarray(np.full((2, 2), 0.2, np.float32))) == (51, 51, 51)
    assert pixel(Image.fromarray(np.full((2, 2), 51, np.float32))) == (51, 51, 51)
    for wrong in (-0.5, 70000, np.nan):
        with pytest.raises(ImageDecodeError, match="float values"):
            to_rgb(Image.fromarray(np.full((2, 2), wrong, np.float32)))


def test_to_rgb_transparency_is_composited_over_white():
    assert pixel(Image.new("RGBA", (2, 2), (0, 0, 255, 0))) == (255, 255, 255)
    assert pixel(Image.new("LA", (2, 2), (0, 128))) == (127, 127, 127)


def test_to_rgb_palette_with_and_without_transparency():
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    assert pixel(through_file(palette, "PNG")) == (10, 200, 30)
    assert pixel(through_file(palette, "PNG", transparency=1)) == (255, 255, 255)


@pytest.mark.parametrize("suffix", ["JPEG", "PNG", "TIFF"])
def test_to_rgb_applies_exif_orientation(suffix):
    image = Image.new("RGB", (16, 8), "black")
    image.paste("white", (0, 0, 8, 8))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    upright = to_rgb(through_file(image, suffix, exif=exif))
    assert upright.size == (8, 16)
    assert upright.getpixel((4, 2))[0] > 200 and upright.getpixel((4, 13))[0] < 50


def test_crop_square_takes_the_centre():
    image = Image.new("RGB", (30, 10), "black")
    image.paste("red", (10, 0, 20, 10))
    np.testing.assert_array_equal(crop_square(image, 10), np.full((10, 10, 3), (255, 0, 0)))
    np.testing.assert_array_equal(crop_square(image.rotate(90, expand=True), 5), np.full((5, 5, 3), (255, 0, 0)))


def test_crop_square_antialiases():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    small = crop_square(Image.fromarray(stripes), 8)
    assert small.dtype == np.uint8 and np.abs(small.astype(int) - 127).max() < 12


def test_crop_square_same_size_is_identity():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    np.testing.assert_array_equal(crop_square(Image.fromarray(pixels), 9), pixels)


def test_crop_square_resolution_zero_raises():
    with pytest.raises(ConfigError, match="resolution=0"):
        crop_square(Image.new("RGB", (4, 4)), 0)


def test_to_rgb_truncated_file_raises(tmp_path, break_jpeg):
    with pytest.raises(OSError, match="truncated"):
        to_rgb(Image.open(break_jpeg(tmp_path / "cut.jpg")))
