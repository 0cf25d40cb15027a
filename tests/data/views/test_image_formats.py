"""Image files with an EXIF orientation, more than 8 bits, and cameras given by angles."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from factorkit.data import open_views
from factorkit.rendering import orbit
from factorkit.utils.errors import DataError

HEIGHT, WIDTH = 8, 12


def posed_folder(folder, count=3, **settings):
    """A transforms.json beside images images/0.png ... that are yet to be written."""
    poses = orbit(count, 4.0, 30.0).tolist()
    frames = [{"file_path": f"images/{i}.png", "transform_matrix": poses[i]} for i in range(count)]
    content = {"frames": frames, **(settings or {"fl_x": 9.0, "w": WIDTH, "h": HEIGHT})}
    (folder / "transforms.json").write_text(json.dumps(content))
    return content


def save(path, pixels, orientation=None):
    path.parent.mkdir(exist_ok=True)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif)


def image(seed=0, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, channels), np.uint8)


@pytest.mark.parametrize("channels", [3, 4])
def test_exif_orientation_is_applied_only_without_cameras(tmp_path, channels):
    turned = 6  # shown turned by 90 degrees clockwise
    mask = (image(7)[..., 0] > 100).astype(np.uint8) * 255
    content = posed_folder(tmp_path)
    for i in range(3):
        save(tmp_path / f"images/{i}.png", image(i, channels), turned)
        if channels == 3:
            save(tmp_path / f"masks/{i}.png", mask, turned)
    (tmp_path / "transforms.json").write_text(json.dumps(content))
    posed = open_views(tmp_path, background="black")
    assert posed.size == (HEIGHT, WIDTH)
    opacity = mask[..., None] if channels == 3 else image(1, 4)[..., 3:]
    expected = image(1, channels)[..., :3] * (opacity / 255) / 255
    np.testing.assert_allclose(posed.images[1].permute(1, 2, 0), expected, atol=1e-5)
    np.testing.assert_allclose(posed.masks[1, 0], opacity[..., 0] / 255, atol=1e-6)
    (tmp_path / "transforms.json").unlink()
    alone = open_views(tmp_path if channels == 3 else tmp_path / "images", background="black")
    assert alone.poses is None and alone.size == (WIDTH, HEIGHT)
    torch.testing.assert_close(alone.images, posed.images.rot90(-1, (2, 3)))
    torch.testing.assert_close(alone.masks, posed.masks.rot90(-1, (2, 3)))


LEVELS = np.linspace(0, 1, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("bits.png", np.rint(LEVELS * 65535).astype(np.uint16), LEVELS),
        ("labels.png", (LEVELS > 0.5).astype(np.uint16), LEVELS > 0.5),
        ("bytes.png", np.rint(LEVELS * 255).astype(np.uint16), LEVELS),
        ("ints.tif", np.rint(LEVELS * 65535).astype(np.int32), LEVELS),
        ("floats.tif", LEVELS.astype(np.float32), LEVELS),
        ("upto255.tif", (255 * LEVELS).astype(np.float32), LEVELS),
    ],
)
def test_masks_of_more_than_8_bits_keep_levels(tmp_path, name, values, expected):
    posed_folder(tmp_path, 1)
    save(tmp_path / "images/0.png", image())
    (tmp_path / "masks").mkdir()
    name = f"masks/0{(tmp_path / name).suffix}"
    Image.fromarray(values).save(tmp_path / name)
    np.testing.assert_allclose(open_views(tmp_path).masks[0, 0], expected, atol=0.5 / 255)
    alone = open_views([Image.fromarray(image())], masks=[Image.open(tmp_path / name)])
    np.testing.assert_allclose(alone.masks[0, 0], expected, atol=0.5 / 255)


@pytest.mark.parametrize("wrong", [-1.0, 70000.0, np.nan])
def test_masks_outside_range_raise(wrong):
    values = LEVELS.astype(np.float32)
    values[0, 0] = wrong
    with pytest.raises(DataError, match="mask values from"):
        open_views([Image.fromarray(image())], masks=[Image.fromarray(values)])


@pytest.mark.parametrize(
    ("settings", "expected"),  # fx, fy, cx, cy in pixels of the file, 12 x 8
    [
        ({}, (6, 6, 6, 4)),
        ({"camera_angle_y": 2 * math.atan(0.5)}, (6, 8, 6, 4)),
        ({"cx": 5.0, "cy": 4.5}, (6, 6, 5, 4.5)),
        ({"cx": 10.0, "cy": 9.0, "w": 24, "h": 16}, (6, 6, 5, 4.5)),
        ({"camera_angle_y": 2 * math.atan(0.5), "w": 24, "h": 16}, (6, 8, 6, 4)),
    ],
)
def test_camera_angle_combines_with_other_intrinsics(tmp_path, settings, expected):
    posed_folder(tmp_path, 1, camera_angle_x=math.pi / 2, **settings)
    save(tmp_path / "images/0.png", image())
    k = open_views(tmp_path).intrinsics[0]
    torch.testing.assert_close(torch.stack([k[0, 0], k[1, 1], k[0, 2], k[1, 2]]), torch.tensor(expected).float())
    assert k[0, 1] == k[1, 0] == 0 and k[2].tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"w": 12, "h": 12}, "is for 12 x 12"),
        ({"w": 12}, "no focal length .* 'h'"),
        ({"camera_angle_y": 40.0}, "between 0 and pi"),
        ({"camera_angle_y": math.nan}, "between 0 and pi"),
        ({"cx": math.inf}, "intrinsics: values that are not finite"),
    ],
)
def test_camera_angle_inconsistent_with_image_raises(tmp_path, settings, message):
    posed_folder(tmp_path, 1, camera_angle_x=1.0, **settings)
    save(tmp_path / "images/0.png", image())
    with pytest.raises(DataError, match=message):
        open_views(tmp_path)


def test_split_filenames_are_normalized(tmp_path):
    content = posed_folder(tmp_path)
    for i in range(3):
        save(tmp_path / f"images/{i}.png", image(i))
        content["frames"][i]["file_path"] = ("./images/0.png", "images//1.png", "images/2.png")[i]
    content |= {"train_filenames": ["images/0.png", "images/1.png"], "test_filenames": ["./images/2.png"]}
    (tmp_path / "transforms.json").write_text(json.dumps(content))
    assert open_views(tmp_path, "train").names == ["images/0.png", "images/1.png"]
    assert open_views(tmp_path, "test").names == ["images/2.png"]
