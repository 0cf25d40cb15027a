from __future__ import annotations

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from factorkit.data import ImageDecodeError, load_labelled, open_dataset, prepare, to_rgb
from factorkit.data.depth import read_deep
from factorkit.data.open import open_source

RAMP = np.linspace(0, 255, 48).round().astype(np.uint16).reshape(6, 8)
COLOUR = np.stack([RAMP, RAMP[::-1], RAMP // 2], 2)  # uint16 [6, 8, 3], values of 8 bits


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png16(values: np.ndarray, significant_bits: int | None = None) -> bytes:
    """A PNG of 16 bits a sample: grey [H, W], grey and alpha, RGB or RGBA [H, W, C]."""
    height, width = values.shape[:2]
    channels = 1 if values.ndim == 2 else values.shape[2]
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    bits = b"" if significant_bits is None else chunk(b"sBIT", bytes([significant_bits]) * channels)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + bits + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def tiff16(values: np.ndarray, order: str, tags: dict[int, tuple[int, int]] | None = None) -> bytes:
    """An uncompressed TIFF of 16 bits a sample, grey [H, W] or RGB [H, W, 3]; ``tags`` are (type, value)."""
    height, width = values.shape[:2]
    data = values.astype(f"{order}u2").tobytes()
    channels = 1 if values.ndim == 2 else 3
    entries = {256: (3, width), 257: (3, height), 259: (3, 1), 262: (3, 2 if channels == 3 else 1), 273: (4, 8)}
    entries |= {277: (3, channels), 278: (3, height), 279: (4, len(data)), 258: (3, 16), **(tags or {})}
    bits_at = 8 + len(data)
    ifd = bits_at + 6
    table = struct.pack(f"{order}H", len(entries))
    for tag, (kind, value) in sorted(entries.items()):
        if tag == 258 and channels == 3:
            table += struct.pack(f"{order}HHII", tag, 3, 3, bits_at)
        else:
            number = struct.pack(f"{order}H", value) + b"\0\0" if kind == 3 else struct.pack(f"{order}I", value)
            table += struct.pack(f"{order}HHI", tag, kind, 1) + number
    magic = b"II" if order == "<" else b"MM"
    start = magic + struct.pack(f"{order}HI", 42, ifd)
    return start + data + struct.pack(f"{order}3H", 16, 16, 16) + table + struct.pack(f"{order}I", 0)


def read(data: bytes, **options) -> np.ndarray:
    return np.asarray(to_rgb(Image.open(io.BytesIO(data)), **options))


def write_set(folder, files: dict[str, bytes]):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return open_source(folder)


def read_set(source) -> tuple[dict[str, np.ndarray], list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        images = {name: np.asarray(source.read(i)) for i, name in enumerate(source.names)}
    return images, [str(w.message) for w in caught]


@pytest.mark.parametrize("depth", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("container", ["png", "tiff <", "tiff >"])
def test_to_rgb_colour_of_16_bits_depth_is_that_of_the_values(container, depth):
    values = (COLOUR.astype(float) * (2**depth - 1) / 255).round().astype(np.uint16)
    data = png16(values) if container == "png" else tiff16(values, container[-1])
    assert np.abs(read(data).astype(int) - COLOUR).max() <= 1


def test_read_deep_colour_of_12_bits_has_true_values_upright():
    values = (COLOUR * 16 + 5).astype(np.uint16)
    np.testing.assert_array_equal(read_deep(Image.open(io.BytesIO(png16(values)))).values, values)
    turned = Image.open(io.BytesIO(tiff16(values, "<", {274: (3, 6)})))
    np.testing.assert_array_equal(read_deep(turned).values, np.rot90(values, -1))


@pytest.mark.parametrize("opaque", [4095, 65535])
def test_to_rgb_alpha_of_16_bits_has_its_own_scale(opaque):
    alpha = np.full(RAMP.shape, opaque)
    alpha[:3] = 0
    for values in (np.stack([RAMP * 16, alpha], 2), np.concatenate([COLOUR * 16, alpha[..., None]], 2)):
        pixels = read(png16(values))
        assert (pixels[:3] == 255).all()  # transparent, over white
        np.testing.assert_array_equal(pixels[3:, :, 0], (RAMP if values.shape[2] == 2 else COLOUR[..., 0])[3:])


def test_to_rgb_16_bit_white_is_zero_is_inverted():
    pixels = read(tiff16(RAMP * 257, "<", {262: (3, 0)}))
    np.testing.assert_array_equal(pixels[..., 0], 255 - RAMP)


def test_to_rgb_negative_values_raise():
    data = tiff16((RAMP.astype(np.int16) - 100).view(np.uint16), "<", {339: (3, 2)})
    with pytest.raises(ImageDecodeError, match="values from -100 to 155"):
        read(data)


def test_to_rgb_16_bit_separate_planes_raises():
    with pytest.raises(ImageDecodeError, match="separate planes"):
        read(tiff16(COLOUR * 257, "<", {284: (3, 2)}))


def test_source_dark_image_of_bright_set_stays_dark(tmp_path):
    files = {"bright.png": png16(COLOUR * 16), "dark.png": png16(COLOUR), "grey.png": png16(RAMP // 3)}
    images, notes = read_set(write_set(tmp_path / "d", files))
    np.testing.assert_array_equal(images["bright.png"], COLOUR)
    np.testing.assert_array_equal(images["dark.png"], COLOUR // 16)
    np.testing.assert_array_equal(images["grey.png"][..., 0], RAMP // 3 // 16)
    assert notes == [
        "images of more than 8 bits: 3 PNG of 16 bits (bright.png, dark.png, grey.png) read as 12 bits by their "
        "largest value, 4080 in bright.png"
    ]


def test_source_single_image_depth_is_that_of_its_values(tmp_path):
    images, notes = read_set(write_set(tmp_path / "d", {"dark.png": png16(COLOUR * 2)}))
    np.testing.assert_array_equal(images["dark.png"], COLOUR // 2)
    assert "1 PNG of 16 bits (dark.png) read as 10 bits" in notes[0]


def test_source_image_that_the_depth_of_the_set_would_blacken_has_its_own(tmp_path):
    images, notes = read_set(write_set(tmp_path / "d", {"a.png": png16(COLOUR * 257), "b.png": png16(COLOUR)}))
    np.testing.assert_array_equal(images["b.png"], COLOUR)
    assert "(b.png) read as 8 bits by their own values, since they would be black" in notes[0]


def test_source_kinds_of_files_have_their_own_depths(tmp_path):
    files = {"a.png": png16(RAMP * 257), "b.tif": tiff16(RAMP * 16, ">"), "c.tif": tiff16(RAMP, "<")}
    images, _ = read_set(write_set(tmp_path / "d", files))
    np.testing.assert_array_equal(images["b.tif"][..., 0], RAMP)
    np.testing.assert_array_equal(images["c.tif"][..., 0], RAMP // 16)


def test_source_16_bits_and_8_bits_say_nothing(tmp_path):
    source = write_set(tmp_path / "d", {"a.png": png16(COLOUR * 257), "b.png": png16(COLOUR * 40)})
    Image.fromarray(COLOUR.astype(np.uint8)).save(tmp_path / "d" / "c.png")
    images, notes = read_set(open_source(tmp_path / "d"))
    np.testing.assert_array_equal(images["a.png"], COLOUR)
    np.testing.assert_array_equal(images["c.png"], COLOUR)
    assert notes == [] and len(source) == 2


@pytest.mark.parametrize(
    ("values", "bits", "depth"),
    [(RAMP, 12, 12), (RAMP * 16, 12, 16), (RAMP * 257, 12, 16), (RAMP, 16, 16), (RAMP * 3, 10, 10), (RAMP * 5, 10, 16)],
)
def test_to_rgb_png_significant_bits_are_honoured(values, bits, depth):
    deep = read_deep(Image.open(io.BytesIO(png16(values, bits))))
    assert deep.choose_depth() == depth and deep.declared == (depth, "sBIT")


@pytest.mark.parametrize("tag", [281, 341])
@pytest.mark.parametrize(
    ("most", "factor", "depth"), [(4095, 1, 12), (65535, 3, 16), (800, 3, 10), (255, 16, 12), (4095, 16, 12)]
)
def test_to_rgb_tiff_sample_range_is_honoured_unless_it_is_the_largest_value(tag, most, factor, depth):
    data = tiff16(RAMP * factor, "<", {tag: (3, most)})
    assert read_deep(Image.open(io.BytesIO(data))).choose_depth() == depth


def test_source_declared_depth_is_kept_in_a_set(tmp_path):
    files = {"a.png": png16(RAMP, 12), "b.png": png16(RAMP * 257)}
    images, notes = read_set(write_set(tmp_path / "d", files))
    np.testing.assert_array_equal(images["a.png"][..., 0], RAMP // 16)
    assert "1 PNG of 16 bits (a.png) read as 12 bits by their sBIT" in notes[0]


def test_to_rgb_pnm_is_scaled_by_its_header():
    dark = b"P5 2 1 4095\n" + np.array([100, 200], ">u2").tobytes()
    assert np.abs(read(dark)[0, :, 0].astype(int) - [6, 12]).max() <= 1
    of_16_bits = b"P5\n# 12 bits\n2 1\n65535\n" + np.array([100, 4000], ">u2").tobytes()
    assert np.abs(read(of_16_bits)[0, :, 0].astype(int) - [6, 250]).max() <= 1


def test_to_rgb_jpeg2000_of_16_bits_depth_is_that_of_the_values():
    buffer = io.BytesIO()
    Image.fromarray(np.repeat(np.repeat(RAMP * 16, 8, 0), 8, 1)).save(buffer, "JPEG2000")
    assert np.abs(read(buffer.getvalue())[::8, ::8, 0].astype(int) - RAMP).max() <= 1


def test_prepare_dark_held_out_images_have_the_depth_of_the_whole_set(tmp_path):
    write_set(tmp_path / "d" / "images", {f"{i}.png": png16(COLOUR * (16 if i == 0 else 1)) for i in range(6)})
    (tmp_path / "d" / "masks").mkdir()
    for i in range(6):
        Image.fromarray((RAMP > 99).astype(np.uint8) * 255).save(tmp_path / "d" / "masks" / f"{i}.png")
    dataset = open_dataset(tmp_path / "d", holdout=3)
    with pytest.warns(UserWarning, match="read as 12 bits"):
        prepared = [
            prepare(part, 6, cache=tmp_path / "c", progress=False) for part in (dataset.train, dataset.test_images)
        ]
    means = {name: image.mean() for part in prepared for name, image in zip(part.names, part.images, strict=True)}
    assert means["0.png"] > 10 * max(means[f"{i}.png"] for i in range(1, 6))
    with pytest.warns(UserWarning, match="read as 12 bits"):  # also where nothing is decoded
        prepare(open_dataset(tmp_path / "d", holdout=3).train, 6, cache=tmp_path / "c", progress=False)


def test_prepare_brighter_image_outside_the_subset_prepares_again(tmp_path):
    source = write_set(tmp_path / "d", {"a.png": png16(COLOUR), "b.png": png16(COLOUR)})
    with pytest.warns(UserWarning, match="8 bits"):
        before = prepare(source.subset([0]), 6, cache=tmp_path / "c", progress=False).images.mean()
    (tmp_path / "d" / "b.png").write_bytes(png16(COLOUR * 16))
    os.utime(tmp_path / "d" / "b.png", ns=(1, 1))
    with pytest.warns(UserWarning, match="12 bits"):
        after = prepare(open_source(tmp_path / "d").subset([0]), 6, cache=tmp_path / "c", progress=False).images.mean()
    assert after < before / 10


def test_load_labelled_colour_mask_of_16_bits_keeps_small_labels(tmp_path):
    write_set(tmp_path / "i", {"a.png": png16(COLOUR * 257)})
    write_set(tmp_path / "m", {"a.png": png16(np.stack([(RAMP > 99).astype(np.uint16)] * 3, 2))})
    labelled = load_labelled(tmp_path / "i", tmp_path / "m", 6)
    np.testing.assert_array_equal(labelled.foreground[0], (RAMP > 99)[:, 1:7])


def test_load_labelled_soft_mask_of_16_bits_foreground_is_from_the_middle(tmp_path):
    ramp = np.clip(np.linspace(-1.5, 2.5, 48), 0, 1).reshape(6, 8)
    write_set(tmp_path / "i", {"a.png": png16(COLOUR * 257)})
    write_set(tmp_path / "m", {"a.png": png16((ramp * 65535).astype(np.uint16))})
    with pytest.warns(UserWarning, match="soft or compressed; foreground = 32768 and above"):
        labelled = load_labelled(tmp_path / "i", tmp_path / "m", 6)
    np.testing.assert_array_equal(labelled.foreground[0], (ramp >= 0.5)[:, 1:7])


def test_load_labelled_numbers_of_many_things_are_labels(tmp_path):
    numbers = np.where(RAMP > 99, RAMP * 4, 0).astype(np.uint16)  # up to 1020
    write_set(tmp_path / "i", {"a.png": png16(COLOUR * 257)})
    write_set(tmp_path / "m", {"a.png": png16(numbers)})
    np.testing.assert_array_equal(load_labelled(tmp_path / "i", tmp_path / "m", 6).foreground[0], (RAMP > 99)[:, 1:7])
