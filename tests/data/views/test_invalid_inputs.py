"""Inconsistent files are refused with a message that names the file and the problem."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from factorkit.data import make_procedural_views, open_views
from factorkit.rendering import orbit
from factorkit.utils.errors import ConfigError, DataError


def image(path, size=(10, 8), colour=(200, 30, 60)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.fixture
def transforms(tmp_path):
    """write(change): a folder of three good views, its content changed by a function before it is written."""

    def write(change=lambda content: None):
        poses = orbit(3, 4.0, 30.0).tolist()
        frames = [{"file_path": f"images/{i}.png", "transform_matrix": poses[i]} for i in range(3)]
        for i in range(3):
            image(tmp_path / "images" / f"{i}.png")
        content = {"camera_angle_x": 0.7, "frames": frames}
        change(content)
        (tmp_path / "transforms.json").write_text(json.dumps(content))
        return tmp_path

    return write


def frame(index, **values):
    return lambda content: content["frames"][index].update(values)


def pose(change):
    """A function that changes the second frame's matrix."""

    def apply(content):
        matrix = np.array(content["frames"][1]["transform_matrix"])
        change(matrix)
        content["frames"][1]["transform_matrix"] = matrix.tolist()

    return apply


def lose_two(suffix):
    def change(content):
        for i in (1, 2):
            content["frames"][i]["file_path"] = f"lost/{i}{suffix}"

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose_two(".png"), r"2 of 3 images missing, the first is lost/1.png"),
        (lose_two(""), r"the first is lost/1 \(looked in"),
        (pose(lambda m: m.__setitem__((0, 0), np.nan)), "images/1.png has values that are not finite"),
        (pose(lambda m: m.__imul__(1.3)), "images/1.png is not rigid: it stretches"),
        (pose(lambda m: m[:3, 0].__imul__(-1)), "images/1.png is not rigid: it mirrors"),
        (frame(2, transform_matrix=[[1.0, 2.0], [3.0, 4.0]]), r"images/2.png has shape \[2, 2\]"),
        (frame(2, transform_matrix=[["a"]]), "not a matrix of numbers"),
        (frame(1, mask_path="masks/1.png"), "the mask masks/1.png of images/1.png is missing"),
        (lambda c: c.pop("camera_angle_x"), "no focal length for images/0.png"),
        (lambda c: c.update(fl_x=30.0, h=8), "KeyError: 'w'"),
        (lambda c: c.update(fl_x=30.0, w=10, h=10), "10 x 8 pixels, but its camera is for 10 x 10"),
        (lambda c: c.update(camera_model="FISHEYE624"), "the camera model 'FISHEYE624'"),
        (lambda c: c.update(frames=[]), "no frames in it"),
        (lambda c: c.pop("frames"), "not a transforms file"),
        (lambda c: c["frames"][0].pop("file_path"), "file_path"),
        (lambda c: c["frames"].append(c["frames"][0]), "two views are named images/0.png"),
    ],
)
def test_transforms_invalid_content_raises(transforms, change, message):
    with pytest.raises(DataError, match=message):
        open_views(transforms(change))


def test_transforms_missing_image_of_other_split_is_ignored(transforms):
    assert len(open_views(transforms())) == 3
    with pytest.raises(DataError, match="none of the 1 name listed for test is a view, such as images/9.png"):
        open_views(transforms(lambda c: c.update(test_filenames=["images/9.png"])), "test")


def test_transforms_invalid_json_raises(tmp_path):
    (tmp_path / "transforms.json").write_text("{frames: ")
    with pytest.raises(DataError, match="not a transforms file"):
        open_views(tmp_path)


def test_transforms_missing_split_file_raises(tmp_path, transforms):
    folder = transforms()
    (folder / "transforms.json").rename(folder / "transforms_train.json")
    with pytest.raises(DataError, match="transforms_test.json: no such file"):
        open_views(folder, "test")


def test_open_views_broken_image_raises(transforms):
    folder = transforms()
    (folder / "images" / "2.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="2.png: not an image"):
        open_views(folder)


def test_open_views_invalid_masks_raise(tmp_path):
    for i in range(2):
        image(tmp_path / "images" / f"{i}.png")
        image(tmp_path / "masks" / f"{i}.png", colour=(0, 0, 0))
    with pytest.raises(DataError, match="no foreground: all masks"):
        open_views(tmp_path)
    image(tmp_path / "masks" / "1.png", (4, 4))
    with pytest.raises(DataError, match=r"mask of 1.png is 4 x 4 pixels, the image 10 x 8"):
        open_views(tmp_path)


def test_open_views_empty_split_raises(tmp_path):
    image(tmp_path / "a.png")
    assert len(open_views(tmp_path)) == 1
    with pytest.raises(DataError, match=r"1 view, 0 of them for training; a.png is held out .* At least 1 is"):
        open_views(tmp_path, "train")


@pytest.fixture
def llff(tmp_path):
    """write(change): five good forward-facing views, their array changed by a function before it is written."""

    def write(change=lambda values: values):
        for i in range(5):
            image(tmp_path / "images_4" / f"{i}.png")
        one = np.concatenate([[[0.0, 1, 0, 0, 32], [-1, 0, 0, 0, 40], [0, 0, 1, 0, 36]]]).ravel()
        values = np.tile(np.concatenate([one, [1.0, 9.0]]), (5, 1))
        values[:, 3] = np.arange(5) * 0.1
        np.save(tmp_path / "poses_bounds.npy", change(values))
        return tmp_path

    return write


def at(index, value):
    def change(values):
        values[index] = value
        return values

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v[:4], "4 poses, but .*images_4 has 5 images"),
        (lambda v: v[:, :15], r"shape \[5, 15\], expected 17"),
        (at((3, 16), 0.5), "near 1 and far 0.5 of images_4/3.png"),
        (at((2, 15), -1.0), "near -1 and far 9 of images_4/2.png"),
        (at((1, 2), np.nan), "not finite for images_4/1.png"),
        (at((1, 0), 3.0), "images_4/1.png is not rigid"),
    ],
)
def test_llff_invalid_content_raises(llff, change, message):
    assert len(open_views(llff())) == 5
    with pytest.raises(DataError, match=message):
        open_views(llff(change))


def test_llff_without_images_raises(llff):
    folder = llff()
    (folder / "images_4").rename(folder / "frames")
    with pytest.raises(DataError, match="none of the folders images_8"):
        open_views(folder)


@pytest.fixture
def srn(tmp_path):
    (tmp_path / "pose").mkdir()
    (tmp_path / "intrinsics.txt").write_text("9. 5. 4. 0.\n0. 0. 0.\n1.\n8 10\n")
    for i in range(2):
        image(tmp_path / "rgb" / f"{i}.png")
        (tmp_path / "pose" / f"{i}.txt").write_text(" ".join(str(x) for x in np.eye(4).ravel()))
    return tmp_path


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("pose/1.txt", "1 2 3", "3 numbers, but a pose has 16"),
        ("pose/1.txt", " ".join(["nan"] * 16), "pose/1.txt has values that are not finite"),
        ("pose/1.txt", " ".join(["1"] * 16), "pose/1.txt is not rigid"),
        ("pose/1.txt", "one two", "expected only numbers"),
        ("intrinsics.txt", "1 2", "expected `focal cx cy`"),
    ],
)
def test_srn_invalid_content_raises(srn, file, content, message):
    assert len(open_views(srn)) == 2
    (srn / file).write_text(content)
    with pytest.raises(DataError, match=message):
        open_views(srn)


def test_srn_pose_without_image_warns(srn):
    (srn / "pose/7.txt").write_text("1")
    with pytest.warns(UserWarning, match="2 images in rgb/ and 3 poses in pose/.*; 7 is only in one of them"):
        assert open_views(srn).names == ["rgb/0.png", "rgb/1.png"]
    (srn / "rgb/0.png").rename(srn / "rgb/5.png")
    with pytest.raises(DataError, match="2 images in rgb/ and 3 poses in pose/.*; 0 is only in one"):
        open_views(srn)


def test_open_views_folder_of_scenes_raises(srn):
    parent = srn.parent / f"{srn.name}_cars"
    parent.mkdir()
    srn.rename(parent / "1a0b")
    with pytest.raises(DataError, match=r"_cars: contains 1 scene \(1a0b\)"):
        open_views(parent)
    assert len(open_views(parent / "1a0b")) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"poses": np.zeros((2, 4, 4))}, r"3 images, but poses of shape \[2, 4, 4\]"),
        ({"poses": np.zeros((3, 4, 4))}, "not rigid"),
        ({"focal": np.ones(3)}, r"focal of shape \[3\]"),
        ({"focal": None}, "no array named focal"),
        ({"images": np.full((3, 8, 8, 3), np.nan)}, "images must be uint8"),
        ({"images": np.full((3, 8, 8, 3), 2.0)}, "from 2.0 to 2.0"),
        ({"images": np.zeros((3, 8, 8))}, r"images of shape \[3, 8, 8\]"),
    ],
)
def test_posed_array_invalid_content_raises(tmp_path, changes, message):
    views = make_procedural_views(3, 8)
    arrays = {"images": views.images.permute(0, 2, 3, 1).numpy(), "poses": views.poses.numpy(), "focal": 9.0, **changes}
    np.savez(tmp_path / "a.npz", **{name: value for name, value in arrays.items() if value is not None})
    with pytest.raises(DataError, match=message):
        open_views(tmp_path / "a.npz")


def test_open_views_invalid_arguments_raise(tmp_path):
    views = make_procedural_views(2, 8)
    with pytest.raises(ConfigError, match="split=\"val\"|split='val'"):
        open_views(views, "val")
    with pytest.raises(ConfigError, match="fov=180"):
        open_views(views, fov=180)
    with pytest.raises(DataError, match="no such file or folder"):
        open_views(tmp_path / "nothing")
    with pytest.raises(DataError, match="no images in this folder"):
        open_views(tmp_path)
