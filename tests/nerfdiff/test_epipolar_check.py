"""The epipolar check on rendered views of a textured floor: right and wrong cameras, masks, lenses, no texture."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import roma
import torch

from factorkit.data.views.cameras import Distortion
from factorkit.nerfdiff import epipolar_check
from factorkit.nerfdiff.epipolar_check import check_epipolar
from factorkit.nerfdiff.export.images import ExportView
from factorkit.rendering import look_at
from factorkit.utils.errors import DataError

cv2 = pytest.importorskip("cv2", reason="the extra `baselines`")
K = np.array([[260.0, 0, 128], [0, 260, 96], [0, 0, 1]])
SIZE = (192, 256)
LENS = Distortion(k1=0.2, p1=0.05, p2=0.05)


def make_poses(count=4):
    eye = torch.tensor([[0.6 * i - 1, -2.0 + 0.2 * i, 2.5 + 0.1 * i] for i in range(count)]).double()
    return look_at(eye, torch.zeros(3).double(), torch.tensor([0.0, 0, 1]).double())


def make_views(poses, texture=True, lens=None, **options):
    """Views of the plane z = 0 with a random texture."""
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3)).astype(np.uint8)
    plane = cv2.resize(noise, (768, 768), interpolation=cv2.INTER_CUBIC) if texture else np.full((768, 768, 3), 128)
    to_plane = np.array([[192.0, 0, 384], [0, -192, 384], [0, 0, 1]])  # pixels of the texture of metres on the plane
    views = []
    for i, pose in enumerate(poses.numpy()):
        rotation = (pose[:3, :3] * [1, -1, -1]).T
        homography = K @ np.column_stack([rotation[:, :2], -rotation @ pose[:3, 3]]) @ np.linalg.inv(to_plane)
        image = plane.astype(np.uint8)
        x, y = np.meshgrid(np.arange(SIZE[1]) + 0.5, np.arange(SIZE[0]) + 0.5)
        if lens is not None:  # where the undistorted image has what the distorted one shows: a fixed point
            x0, y0 = ((a - c) / 260 for a, c in ((x, 128), (y, 96)))
            u, v = torch.from_numpy(x0), torch.from_numpy(y0)
            for _ in range(30):
                du, dv = lens(u, v)
                u, v = u + torch.from_numpy(x0) - du, v + torch.from_numpy(y0) - dv
            x, y = u.numpy() * 260 + 128, v.numpy() * 260 + 96
        source = np.stack([x, y, np.ones_like(x)], -1) @ np.linalg.inv(homography).T
        source = (source[..., :2] / source[..., 2:]).astype(np.float32) - 0.5
        pixels = cv2.remap(image, source[..., 0], source[..., 1], cv2.INTER_LINEAR)
        views.append(ExportView(f"{i}.png", SIZE, K, lens, partial(np.asarray, pixels), **options))
    return views


def turn(poses, degrees):
    generator = torch.Generator().manual_seed(0)
    axes = torch.nn.functional.normalize(torch.randn(len(poses), 3, dtype=torch.float64, generator=generator), dim=1)
    turned = poses.clone()
    turned[:, :3, :3] = roma.rotvec_to_rotmat(axes * degrees * torch.pi / 180) @ poses[:, :3, :3]
    return turned


def test_find_features_centre_of_a_blob_is_at_half_pixels():
    down, right = np.mgrid[:96, :128]
    blob = 255 * np.exp(-((right - 40.0) ** 2 + (down - 30.0) ** 2) / 32)  # centred on the pixel (40, 30)
    pixels = np.repeat(blob[..., None], 3, 2).round().astype(np.uint8)
    features = epipolar_check._find_features(ExportView("a.png", (96, 128), K, None, lambda: pixels))
    distance = np.linalg.norm(features.points - [40.5, 30.5], axis=1)
    assert distance.min() < 0.2


def test_check_epipolar_right_cameras_explain_nearly_all_matches():
    check = check_epipolar(make_views(make_poses()), make_poses())
    assert check.share > 0.95 and check.median < 0.5 and len(check.pairs) == 6
    assert "of the points matched in 6 of 6 pairs" in check.message


@pytest.mark.slow
def test_check_epipolar_turned_cameras_are_named():
    poses = make_poses()
    shares = [check_epipolar(make_views(poses), turn(poses, degrees)).share for degrees in (2, 10)]
    assert 0.95 > shares[0] > shares[1] and shares[1] < 0.3


def test_check_epipolar_one_wrong_camera_is_first_in_the_list():
    poses = make_poses()
    poses[2] = turn(poses, 15)[2]
    check = check_epipolar(make_views(make_poses()), poses)
    assert all("2.png" in pair["views"] for pair in check.pairs[:3])
    assert check.pairs[0]["share"] < 0.5 < check.pairs[-1]["share"]


@pytest.mark.slow
def test_check_epipolar_lens_distortion_is_removed_first():
    views = make_views(make_poses(), lens=LENS)
    ignored = check_epipolar([view._replace(distortion=None) for view in views], make_poses())
    assert check_epipolar(views, make_poses()).median < 0.6 * ignored.median


def test_check_epipolar_masked_pixels_are_not_matched():
    def read_loss_mask():
        return np.pad(np.ones((8, 8), np.float32), ((0, SIZE[0] - 8), (0, SIZE[1] - 8)))

    check = check_epipolar(make_views(make_poses(), read_loss_mask=read_loss_mask), make_poses())
    assert check.share is None and not check.pairs


def test_check_epipolar_no_texture_is_not_checked():
    check = check_epipolar(make_views(make_poses(), texture=False), make_poses())
    assert check.share is None and check.message.startswith("epipolar check not possible: only 0 of 6 pairs")


def test_check_epipolar_one_view_is_refused():
    with pytest.raises(DataError, match="1 view: the epipolar check needs two or more"):
        check_epipolar(make_views(make_poses(1)), make_poses(1))
