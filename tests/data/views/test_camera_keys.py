"""Keys of transforms.json that change the geometry are honoured or refused by name."""

from __future__ import annotations

import json
import math

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from factorkit.data import open_views
from factorkit.data.views.cameras import Distortion, FisheyeDistortion
from factorkit.rendering import orbit
from factorkit.utils.errors import DataError

SIZE = 40
FOCAL = {"fl_x": 24.0, "fl_y": 24.0, "cx": 20.0, "cy": 20.0, "w": SIZE, "h": SIZE}


@pytest.fixture
def write(tmp_path):
    """write(frame settings, **settings): a folder of four views with the same smooth image."""
    x, y = np.meshgrid(np.arange(SIZE), np.arange(SIZE))
    pixels = np.stack([128 + 90 * np.sin(x / 5), 128 + 90 * np.cos(y / 6), 60 + x + y], axis=2).astype(np.uint8)

    def write(frame=None, **settings):
        (tmp_path / "images").mkdir(exist_ok=True)
        frames = []
        for i, pose in enumerate(orbit(4, 4.0, 30.0).tolist()):
            Image.fromarray(pixels).save(tmp_path / f"images/{i}.png")
            frames.append({"file_path": f"images/{i}.png", "transform_matrix": pose})
        frames[1].update(frame or {})
        content = {"frames": frames, **(settings or FOCAL)}
        (tmp_path / "transforms.json").write_text(json.dumps(content))
        return tmp_path

    write.pixels = pixels
    return write


@pytest.mark.parametrize("settings", [{"is_fisheye": True}, {"camera_model": "OPENCV_FISHEYE"}])
def test_fisheye_images_match_opencv(write, settings):
    terms = {"k1": 0.08, "k2": -0.02, "k3": 0.01, "k4": -0.003}
    views = open_views(write(**FOCAL, **settings, **terms))
    # OpenCV counts from pixel centres.
    k = np.array([[24.0, 0, 19.5], [0, 24.0, 19.5], [0, 0, 1]])
    expected = cv2.fisheye.undistortImage(write.pixels, k, np.array(list(terms.values())), Knew=k)
    expected = torch.from_numpy(expected).permute(2, 0, 1) / 255
    inner = slice(3, -3)
    seen = views.loss_masks[0, 0] if views.loss_masks is not None else torch.ones(SIZE, SIZE)
    assert seen[inner, inner].min() == 1
    torch.testing.assert_close(views.images[0][:, inner, inner], expected[:, inner, inner], atol=0.03, rtol=0)
    plain = open_views(write(**FOCAL))
    assert (plain.images - views.images).abs().max() > 0.1


def test_fisheye_distortion_matches_opencv():
    lens = FisheyeDistortion(0.1, -0.03, 0.02, -0.004)
    points = torch.rand(40, 2, dtype=torch.float64) * 4 - 2
    k = np.array([lens.k1, lens.k2, lens.k3, lens.k4])
    expected = cv2.fisheye.distortPoints(points.numpy()[:, None], np.eye(3), k)
    result = torch.stack(lens(points[:, 0], points[:, 1]), dim=1)
    np.testing.assert_allclose(result, expected[:, 0], atol=1e-9)
    x, y = lens(torch.zeros(1).double(), torch.zeros(1).double())
    assert x.item() == y.item() == 0


def test_full_opencv_distortion_matches_opencv():
    lens = Distortion(k1=-0.2, k2=0.07, k3=-0.02, p1=0.013, p2=-0.008, denominator=(0.05, 0.02, -0.01))
    x, y = torch.rand(2, 30, dtype=torch.float64) - 0.5
    coefficients = np.array([lens.k1, lens.k2, lens.p1, lens.p2, lens.k3, *lens.denominator])
    points = np.stack([x, y, np.ones(30)], axis=1)
    expected, _ = cv2.projectPoints(points, np.zeros(3), np.zeros(3), np.eye(3), coefficients)
    np.testing.assert_allclose(torch.stack(lens(x, y), dim=1), expected[:, 0], atol=1e-12)


def test_nerfstudio_k4_is_term_of_r8(write):
    plain, bent = open_views(write(**FOCAL)), open_views(write(**FOCAL, camera_model="OPENCV", k4=0.5))
    assert (plain.images - bent.images).abs().max() > 0.05
    x, _ = Distortion(k4=0.5)(torch.tensor([0.5]), torch.tensor([0.0]))
    assert x.item() == pytest.approx(0.5 * (1 + 0.5 * 0.5**8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k5": 0.1}, "`k5` = 0.1, which the camera model OPENCV does not have"),
        ({"camera_model": "PINHOLE", "k1": 0.1}, "`k1` = 0.1, which the camera model PINHOLE"),
        ({"camera_model": "OPENCV_FISHEYE", "p1": 0.1}, "`p1` = 0.1"),
        ({"camera_model": "OPENCV", "is_fisheye": True}, "`is_fisheye`, but the camera model OPENCV"),
        ({"camera_model": "EQUIRECTANGULAR"}, "camera model 'EQUIRECTANGULAR'"),
        ({"rolling_shutter": [0, 0, 0.1, 0]}, "`rolling_shutter`.*a rolling shutter is not supported"),
        ({"latlong": True}, "`latlong` = True: a panorama"),
        ({"shift_x": 0.1}, "`shift_x` = 0.1: a shifted lens"),
        ({"distortion_params": [0.1, 0.2]}, "`distortion_params`"),
        ({"ftheta_p1": 0.3}, "an f-theta lens"),
    ],
)
@pytest.mark.parametrize("of_frame", [False, True])
def test_unmodelled_keys_are_refused_by_name(write, settings, message, of_frame):
    folder = write(settings, **FOCAL) if of_frame else write(**FOCAL, **settings)
    name = "images/1.png" if of_frame else "images/0.png"
    with pytest.raises(DataError, match=message) as error:
        open_views(folder)
    assert name in str(error.value) and "transforms.json" in str(error.value)


def test_neutral_and_world_keys_are_read_and_noted(write):
    neutral = {"rolling_shutter": [0, 0, 0, 0], "latlong": False, "shift_x": 0, "k5": 0.0, "is_fisheye": False}
    world = {"applied_transform": [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]], "orientation_override": "up"}
    views = open_views(write(**FOCAL, **neutral, **world, sharpness=3, aabb_scale=16))
    plain = open_views(write(**FOCAL))
    assert torch.equal(views.images, plain.images) and torch.equal(views.poses, plain.poses)
    assert [n for n in views.notes if "applied_transform, orientation_override" in n or "aabb_scale, applied" in n]
    assert [n for n in views.notes if n == "Keys that are ignored: sharpness."]
    assert not plain.notes


@pytest.mark.parametrize(
    ("frame", "settings", "focal"),
    [
        ({"camera_angle_x": math.pi / 2}, FOCAL, 20.0),
        ({"fl_x": 30.0, "fl_y": 30.0}, FOCAL, 30.0),
        ({"fl_x": 30.0}, {"camera_angle_x": 1.0}, 30.0),
        ({"x_fov": 90.0}, {"camera_angle_x": 1.0}, 20.0),
    ],
)
def test_frame_intrinsics_replace_those_of_file(write, frame, settings, focal):
    views = open_views(write(frame, **settings))
    torch.testing.assert_close(views.intrinsics[1, :2, :2], focal * torch.eye(2))
    assert abs(views.intrinsics[0, 0, 0].item() - focal) > 1


def test_focal_length_without_size_is_of_stored_image(write):
    views = open_views(write(fl_x=24.0))
    torch.testing.assert_close(views.intrinsics[0], torch.tensor([[24.0, 0, 20], [0, 24, 20], [0, 0, 1]]))


def names(folder, split):
    return [name.removeprefix("images/").removesuffix(".png") for name in open_views(folder, split).names]


@pytest.mark.parametrize(
    ("lists", "train", "test"),
    [
        ({"train": "01", "test": "3"}, "01", "3"),
        ({"train": "01", "val": "2"}, "01", "2"),
        ({"test": "23"}, "01", "23"),
        ({"val": "0"}, "123", "0"),
        ({"train": "12"}, "12", "03"),
        ({"val": "0", "test": "1"}, "23", "1"),
    ],
)
def test_split_lists_in_part_never_leak(write, lists, train, test):
    lists = {f"{key}_filenames": [f"./images/{i}.png" for i in text] for key, text in lists.items()}
    folder = write(**FOCAL, **lists)
    assert "".join(names(folder, "train")) == train and "".join(names(folder, "test")) == test
    assert len(open_views(folder)) == 4


def test_split_lists_that_overlap_raise(write):
    folder = write(**FOCAL, train_filenames=["images/0.png", "images/1.png"], test_filenames=["images\\1.png"])
    with pytest.raises(DataError, match="1 frame listed for training and for val or test, the first is images/1"):
        open_views(folder, "train")


def test_split_files_that_share_frames_keep_test_views_out(write):
    folder = write(**FOCAL)
    content = json.loads((folder / "transforms.json").read_text())
    (folder / "transforms.json").rename(folder / "transforms_train.json")
    test = {**content, "frames": content["frames"][3:]}
    (folder / "transforms_val.json").write_text(json.dumps(test))
    assert names(folder, "train") == ["0", "1", "2"] and names(folder, "test") == ["3"]
    assert len(open_views(folder)) == 4
    (folder / "transforms_test.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="no view is left for training"):
        open_views(folder, "train")


@pytest.mark.parametrize(
    ("rename", "name"),
    [
        (None, "images\\0.png"),
        ("images/0.JPG", "images/0"),
        ("images/0.JPG", "images/0.jpg"),
        ("images/0.jpeg", "images/0.png"),
        ("Images/0.png", "images/0.png"),
        ("images/Caf\u00e9.png", "images/Cafe\u0301.png"),
    ],
)
def test_files_of_other_suffix_or_case_are_found(write, rename, name):
    folder = write(**FOCAL)
    content = json.loads((folder / "transforms.json").read_text())
    if rename is not None and rename.startswith("Images"):
        (folder / "images").rename(folder / "Images")
    elif rename is not None:
        (folder / "images/0.png").rename(folder / rename)
    content["frames"][0]["file_path"] = name
    (folder / "transforms.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(content).encode())
    assert len(open_views(folder)) == 4


def test_frames_without_files_are_left_out_with_count(write):
    folder = write(**FOCAL)
    (folder / "images/1.png").unlink()
    with pytest.warns(UserWarning, match=r"left out 1 of 4 frames without an image file: images/1.png") as message:
        assert len(open_views(folder)) == 3
    assert len(message) == 1
    (folder / "images/2.png").unlink()
    (folder / "images/3.png").unlink()
    with pytest.raises(DataError, match="3 of 4 images missing"):
        open_views(folder)


def test_frames_in_formats_that_are_not_read_are_named_as_such(write, monkeypatch):
    folder = write()
    for i in range(4):
        (folder / f"images/{i}.png").rename(folder / f"images/{i}.exr")
    file = folder / "transforms.json"
    file.write_text(file.read_text().replace(".png", ".exr"))
    with pytest.raises(DataError, match="formats that are not read: 4 .exr"):
        open_views(folder)


K = [[30.0, 0, 19], [0, 31, 18], [0, 0, 1]]


@pytest.mark.parametrize(
    "settings",
    [
        {"fx": 30.0, "fy": 31.0, "cx": 19.0, "cy": 18.0, "width": SIZE, "height": SIZE},
        {"K": K, "w": SIZE, "h": SIZE},
        {"intrinsics": [30.0, 31.0, 19.0, 18.0], "w": SIZE, "h": SIZE},
        {"camera_intrinsics": [30.0, 0, 19, 0, 31, 18, 0, 0, 1], "w": SIZE, "h": SIZE},
        {"intrinsic_matrix": [30.0, 0, 0, 0, 31, 0, 19, 18, 1], "w": SIZE, "h": SIZE},
    ],
)
@pytest.mark.parametrize("of_frame", [False, True])
def test_intrinsics_under_other_keys_are_read(write, settings, of_frame):
    folder = write(settings, **FOCAL) if of_frame else write(**settings)
    assert open_views(folder).intrinsics[1].tolist() == K


@pytest.mark.parametrize(
    "settings", [{"cameras": [{"fl_x": 20}], "camera_id": 0}, {"intrinsics": {"f": 3}}, {"K": [[1, 2]]}]
)
def test_intrinsics_of_another_form_are_refused_by_name(write, settings):
    with pytest.raises(DataError, match=f"`{next(iter(settings))}` = .* not supported"):
        open_views(write(settings, **FOCAL))


def test_normalised_intrinsics_are_refused(write):
    with pytest.raises(DataError, match=r"focal length of images/0.png .* is 0.6 pixels .* in pixels"):
        open_views(write(fl_x=0.6, fl_y=0.6, cx=0.5, cy=0.5, w=SIZE, h=SIZE))
