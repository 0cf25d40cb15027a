"""Images in every supported form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from factorkit.data.decode import to_rgb
from factorkit.data.open import open_source, read_images
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


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("walk.mp4", "extract the frames of videos"),
        ("walk.MTS", "extract the frames of videos"),
        ("x.CR2", "convert them to PNG or JPEG"),
        ("x.exr", "convert them to PNG or JPEG"),
        ("x.psd", "convert them to PNG or JPEG"),
    ],
)
def test_open_source_file_that_is_not_read_says_what_to_do(tmp_path, name, advice):
    (tmp_path / name).write_bytes(b"x")
    Image.fromarray(RGBA).save(tmp_path / "good.png")
    for data in (tmp_path / name, [tmp_path / name, tmp_path / "good.png"]):
        with pytest.raises(DataError, match=rf"{name}: left out 1 file of formats that are not read: .*{advice}"):
            open_source(data)
    with pytest.warns(UserWarning, match=rf"left out 1 file of formats that are not read: .*{name}"):
        assert open_source(tmp_path).names == ["good.png"]


def test_open_source_further_suffixes_are_read(tmp_path):
    image = Image.fromarray(RGBA[..., :3])
    for name, form in (("a.mpo", "MPO"), ("b.apng", "PNG"), ("c.dib", "DIB"), ("d.j2k", "JPEG2000")):
        image.save(tmp_path / name, form)
    source = open_source(tmp_path)
    assert len(source) == 4 and all(source.read(i).size == image.size for i in range(4))
