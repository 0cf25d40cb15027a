from __future__ import annotations

import warnings
import zipfile

import numpy as np
import pytest
from PIL import Image, ImageFilter

from factorkit.data import load_labelled
from factorkit.data.mask_values import decide_mask_values
from factorkit.data.masks import match_masks
from factorkit.data.open import open_source
from factorkit.utils.errors import DataError


@pytest.fixture
def folders(tmp_path, save):
    """Three images and masks of two of them: `a` all foreground, `c` left half."""
    for name in "abc":
        save(tmp_path / f"images/{name}.jpg", size=(16, 16))
    save(tmp_path / "masks/a.png", 255, (16, 16), "L")
    half = Image.new("L", (16, 16), 0)
    half.paste(255, (0, 0, 8, 16))
    half.save(tmp_path / "masks/c.png")
    return tmp_path / "images", tmp_path / "masks"


def load_one(tmp_path, mask: Image.Image, size=(8, 8), resolution=8, **options):
    """The labels as loaded with one image of that size."""
    (tmp_path / "m").mkdir(parents=True)
    mask.save(tmp_path / "m/x.png")
    image = Image.new("RGB", size, "blue")
    (tmp_path / "i").mkdir()
    image.save(tmp_path / "i/x.png")
    return load_labelled(tmp_path / "i", tmp_path / "m", resolution, **options)


def test_load_labelled_skips_images_without_mask(folders):
    labelled = load_labelled(*folders, 8)
    assert labelled.names == ["a.jpg", "c.jpg"] and len(labelled) == 2
    assert labelled.images.shape == (2, 8, 8, 3) and labelled.images.dtype == np.uint8
    assert labelled.foreground[0].all() and labelled.valid.all()
    expected = np.zeros((8, 8), bool)
    expected[:, :4] = True
    np.testing.assert_array_equal(labelled.foreground[1], expected)


@pytest.mark.parametrize("name", ["x_mask.png", "x_seg.png", "x.gif"])
def test_match_masks_accepts_endings_and_suffixes(tmp_path, save, name):
    save(tmp_path / "i/sub/x.jpg")
    save(tmp_path / "m/sub" / name, 1, mode="L")
    assert len(load_labelled(tmp_path / "i", tmp_path / "m", 4)) == 1


def test_match_masks_prefers_full_name(tmp_path, save):
    for name in ("x", "x_seg"):
        save(tmp_path / f"i/{name}.jpg")
        save(tmp_path / f"m/{name}.png", 1, mode="L")
    assert match_masks(open_source(tmp_path / "i"), open_source(tmp_path / "m")) == [(0, 0), (1, 1)]


def test_match_masks_unmatched_or_duplicate_raise(folders, save):
    images, masks = folders
    save(masks / "d.png", 1, mode="L")
    with pytest.raises(DataError, match=r"1 of 3 masks has no image: d\.png.*a\.jpg"):
        load_labelled(images, masks, 8)
    (masks / "d.png").unlink()
    save(masks / "a_mask.png", 1, mode="L")
    with pytest.raises(DataError, match=r"a\.png and a_mask\.png: two masks of one image"):
        load_labelled(images, masks, 8)
    (masks / "a_mask.png").unlink()
    save(images / "a.png")
    with pytest.raises(DataError, match=r"a\.jpg and a\.png: the mask a\.png fits each"):
        load_labelled(images, masks, 8)


def test_load_labelled_zip_of_masks(folders, tmp_path):
    images, masks = folders
    with zipfile.ZipFile(tmp_path / "masks.zip", "w") as archive:
        for path in masks.iterdir():
            archive.write(path, path.name)
    np.testing.assert_array_equal(
        load_labelled(images, tmp_path / "masks.zip", 8).foreground, load_labelled(images, masks, 8).foreground
    )


def test_match_masks_arrays_match_by_position(tmp_path):
    images = np.zeros((3, 8, 8, 3), np.uint8)
    labels = np.random.default_rng(0).integers(0, 3, (3, 8, 8))
    for masks in (labels, labels > 0):
        labelled = load_labelled(images, masks, 8)
        np.testing.assert_array_equal(labelled.foreground, labels > 0)
    with pytest.raises(DataError, match="3 images but 2 masks"):
        load_labelled(images, labels[:2], 8)
    np.savez(tmp_path / "both.npz", images=images, masks=labels.astype(np.uint8))
    both = load_labelled(tmp_path / "both.npz", tmp_path / "both.npz", 8)
    np.testing.assert_array_equal(both.foreground, labels > 0)


def test_load_labelled_ignored_pixels_are_invalid(tmp_path):
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:4], pixels[4] = 255, 128
    labelled = load_one(tmp_path, Image.fromarray(pixels), ignore_label=128)
    np.testing.assert_array_equal(labelled.foreground[0], pixels == 255)
    np.testing.assert_array_equal(labelled.valid[0], pixels != 128)


def test_load_labelled_labels_are_not_interpolated(tmp_path):
    """Between 0 and 255 lies the ignored 128: any blending at the edges would show up as invalid pixels."""
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, 20:43] = 255
    labelled = load_one(tmp_path, Image.fromarray(stripes), size=(64, 64), resolution=10, ignore_label=128)
    assert labelled.valid.all() and 0.3 < labelled.foreground.mean() < 0.5


def test_load_labelled_mask_is_cropped_like_image(tmp_path):
    wide = np.zeros((8, 24), np.uint8)
    wide[:, 8:12] = 1
    labelled = load_one(tmp_path, Image.fromarray(wide), size=(24, 8))
    assert labelled.foreground[0, :, :4].all() and not labelled.foreground[0, :, 4:].any()


def test_load_labelled_mask_of_other_size_is_resized(tmp_path):
    part = np.zeros((20, 30), np.uint8)
    part[:, 10:] = 1  # from column 20 of 60 in the image, 10 of 40 in its square
    labelled = load_one(tmp_path, Image.fromarray(part), size=(60, 40))
    assert labelled.foreground[0, :, 2:].all() and not labelled.foreground[0, :, :2].any()


def test_load_labelled_mask_of_similar_aspect_is_accepted(tmp_path):
    labelled = load_one(tmp_path, Image.new("L", (199, 100), 1), size=(100, 50))
    assert labelled.foreground.all()


@pytest.mark.parametrize("size", [(30, 20), (51, 50)])
def test_load_labelled_mask_of_other_aspect_raises(tmp_path, size):
    with pytest.raises(DataError, match=rf"x\.png: a mask of {size[0]} x {size[1]} pixels for an image of 40 x 40"):
        load_one(tmp_path, Image.new("L", size, 1), size=(40, 40))


def test_read_labels_palette_uses_index(tmp_path):
    mask = Image.new("P", (8, 8), 0)
    mask.putpalette([255, 255, 255, 0, 0, 0, 9, 9, 9])  # the background is white, label 1 is black
    mask.paste(1, (0, 0, 4, 8))
    mask.paste(2, (7, 0, 8, 8))
    labelled = load_one(tmp_path, mask, ignore_label=2)
    assert labelled.foreground[0].sum() == 32 and labelled.foreground[0, :, :4].all()
    assert labelled.valid[0].sum() == 56


@pytest.mark.parametrize(
    ("palette", "values"),
    [
        ([255, 255, 255, 0, 0, 0], (255, 0)),
        ([9, 9, 9, 255, 255, 255, 0, 0, 0], (255, 0)),
        ([0, 0, 0, 255, 255, 255], (0, 1)),
        ([255, 0, 0, 0, 0, 0], (0, 1)),
        ([255, 255, 255, 1, 1, 1], (0, 1)),
    ],
    ids=["white first", "neither first", "black first", "red", "nearly black"],
)
def test_read_labels_black_and_white_palette_uses_white(tmp_path, palette, values):
    """`values` of the left half, which has the palette's last colour but one, and of the rest."""
    first = len(palette) // 3 - 2
    mask = Image.new("P", (8, 8), first + 1)
    mask.putpalette(palette)
    mask.paste(first, (0, 0, 4, 8))
    labelled = load_one(tmp_path, mask)
    assert (labelled.labels[0, :, :4] == values[0]).all() and (labelled.labels[0, :, 4:] == values[1]).all()


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "LA", "RGBA", "I;16"])
def test_read_labels_other_modes(tmp_path, mode):
    grey = Image.new("L", (8, 8), 0)
    grey.paste(255, (0, 0, 8, 2))
    mask = Image.fromarray(np.asarray(grey).astype(np.uint16) * 100) if mode == "I;16" else grey.convert(mode)
    labelled = load_one(tmp_path, mask)
    assert labelled.foreground[0, :2].all() and not labelled.foreground[0, 2:].any()


def test_read_labels_colour_raises_and_compressed_mask_is_thresholded(tmp_path, save):
    save(tmp_path / "i/x.png", size=(16, 16))
    save(tmp_path / "m/x.png", (255, 0, 0), size=(16, 16))
    with pytest.raises(DataError, match=r"x\.png: a mask in colour \(mode RGB\)"):
        load_labelled(tmp_path / "i", tmp_path / "m", 8)
    (tmp_path / "m/x.png").unlink()
    disc = Image.new("L", (16, 16), 0)
    disc.paste(255, (3, 3, 11, 12))
    disc.save(tmp_path / "m/x.jpg", quality=50)
    with pytest.warns(UserWarning, match="soft or compressed; foreground = 128 and above"):
        labelled = load_labelled(tmp_path / "i", tmp_path / "m", 16)
    assert labelled.foreground.sum() == 8 * 9


def test_load_labelled_broken_image_raises(folders, break_jpeg):
    break_jpeg(folders[0] / "a.jpg")
    with pytest.raises(DataError, match=r"^a\.jpg: cannot be decoded"):
        load_labelled(*folders, 8)


def test_load_labelled_real_masks(real_data):
    root = real_data("flowers17_128")
    images = sorted((root / "images").glob("image_000*.jpg"))
    labelled = load_labelled(images, sorted((root / "masks").glob("image_000*.png")), 32, ignore_label=128)
    assert len(labelled) >= 5 and 0.1 < labelled.foreground.mean() < 0.6 and 0.7 < labelled.valid.mean() < 1
    inside, outside = labelled.foreground, ~labelled.foreground & labelled.valid
    yellow = labelled.images.astype(float) @ (0.5, 0.5, -1)  # daffodils: misaligned masks would level this out
    assert yellow[inside].mean() > yellow[outside].mean() + 40


def grid(*values):
    return np.array(values, np.uint8).repeat(8).reshape(-1, 8)


MEANINGS = {
    "two values": ((0, 255), {}, {255}, None),
    "two labels": ((0, 7), {}, {7}, None),
    "labels": ((0, 1, 2, 3), {}, {1, 2, 3}, None),
    "pet trimap": ((1, 2, 3), {}, {1}, 3),
    "matting trimap": ((0, 128, 255), {}, {255}, 128),
    "border of VOC": ((0, 15, 255), {}, {15}, 255),
    "foreground given": ((1, 2), {"foreground": (2,)}, {2}, None),
    "threshold given": ((0, 100, 200), {"mask_threshold": 150}, {200}, None),
    "ignore given": ((0, 128, 255), {"ignore_label": 255}, {128}, 255),
}


@pytest.mark.parametrize(("values", "options", "foreground", "ignored"), MEANINGS.values(), ids=MEANINGS)
def test_load_labelled_meaning_of_values_is_decided(tmp_path, values, options, foreground, ignored):
    pixels = grid(*values)
    Image.new("RGB", pixels.shape[::-1]).save(tmp_path / "x.png")
    mask = tmp_path / "x_mask.png"
    Image.fromarray(pixels).save(mask)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        labelled = load_labelled([tmp_path / "x.png"], [mask], min(pixels.shape), **options)
    np.testing.assert_array_equal(labelled.foreground, np.isin(labelled.labels, sorted(foreground)))
    np.testing.assert_array_equal(labelled.valid, labelled.labels != (-1 if ignored is None else ignored))


def test_load_labelled_soft_mask_is_cut_in_the_middle(tmp_path):
    disc = Image.new("L", (64, 64), 0)
    disc.paste(255, (16, 16, 48, 48))
    Image.new("RGB", (64, 64)).save(tmp_path / "x.png")
    disc.filter(ImageFilter.GaussianBlur(3)).save(tmp_path / "x_mask.png")
    with pytest.warns(UserWarning, match="soft or compressed; foreground = 128 and above"):
        labelled = load_labelled([tmp_path / "x.png"], [tmp_path / "x_mask.png"], 64)
    assert abs(int(labelled.foreground.sum()) - 32 * 32) < 64


@pytest.mark.parametrize("counts", [{1: 5, 2: 5}, {3: 5, 9: 4, 200: 1}, dict.fromkeys(range(256), 9)])
def test_decide_mask_values_ambiguous_raises(counts):
    with pytest.raises(DataError, match="--foreground.*--mask-threshold.*--ignore"):
        decide_mask_values(counts)


def test_decide_mask_values_many_labels_are_labels():
    meaning = decide_mask_values(dict.fromkeys(range(151), 9))  # ADE20K's
    assert (
        meaning.threshold is None
        and meaning.ignore is None
        and "151 values {0, 1, 2, 3, 4, 5, ...}, labels" in str(meaning)
    )
    assert decide_mask_values(dict.fromkeys([*range(151), 255], 9)).ignore == 255


def test_decide_mask_values_antialiased_white_is_foreground():
    meaning = decide_mask_values({0: 900, 16: 5, 64: 9, 143: 9, 191: 5, 255: 300})
    assert meaning.threshold == 128 and meaning.ignore is None and "antialiased" in str(meaning)
    assert decide_mask_values({0: 900, 50: 300, 100: 300, 150: 300, 255: 20}).ignore == 255  # labels with a border


@pytest.mark.parametrize("counts", [{0: 50, 1: 20, 255: 90}, {1: 20, 2: 30, 255: 90}, {0: 9, 1: 5, 2: 5, 65535: 90}])
def test_decide_mask_values_large_255_is_ambiguous(counts):
    with pytest.raises(DataError, match="--foreground.*--mask-threshold.*--ignore"):
        decide_mask_values(counts)


def test_load_labelled_masks_of_two_conventions_are_refused(folders, tmp_path):
    for name in "ab":
        Image.new("L", (16, 16), 1).save(tmp_path / f"masks/{name}.png")
    with pytest.raises(DataError, match=r"c.png: no value but 0 and 255, which may be foreground"):
        load_labelled(*folders, 8)
    assert load_labelled(*folders, 8, mask_threshold=1).foreground.mean() == 5 / 6


def test_load_labelled_borders_of_foreground_and_no_foreground_warn(tmp_path):
    inverted = Image.new("L", (8, 8), 255)
    inverted.paste(0, (2, 2, 6, 6))
    with pytest.warns(UserWarning, match="100% of the pixels along the borders .*--foreground 0"):
        load_one(tmp_path / "a", inverted)
    with pytest.warns(UserWarning, match="no pixel is foreground"):
        load_one(tmp_path / "b", Image.new("L", (8, 8), 0))
    with pytest.warns(UserWarning, match="no pixel is foreground"):
        load_one(tmp_path / "c", inverted, foreground=[3])


def test_load_labelled_small_labels_in_jpeg_are_refused(tmp_path, save):
    save(tmp_path / "i/x.png", size=(16, 16))
    mask = Image.new("L", (16, 16), 0)
    mask.paste(1, (3, 3, 9, 9))
    (tmp_path / "m").mkdir()
    mask.save(tmp_path / "m/x.jpg", quality=100)
    with pytest.raises(DataError, match="x.jpg: JPEG compression has altered the labels"):
        load_labelled(tmp_path / "i", tmp_path / "m", 8)


@pytest.mark.parametrize(("size", "turn"), [((8, 8), 6), ((12, 8), 3)])
def test_load_labelled_image_turned_by_exif_alone_warns(tmp_path, size, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    for folder, mode in (("i", "RGB"), ("m", "L")):
        (tmp_path / folder).mkdir()
        image = Image.new(mode, size)
        image.paste("white", (2, 2, 6, 4))
        image.save(tmp_path / folder / "x.png", exif=exif if folder == "i" else None)
    with pytest.warns(UserWarning, match=r"those of 1 image \(x.png\) have no EXIF orientation"):
        load_labelled(tmp_path / "i", tmp_path / "m", 8)
