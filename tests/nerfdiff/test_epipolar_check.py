"""The epipolar check on rendered views of a textured floor: right and wrong cameras, masks, lenses, no texture."""

from __future__ import annotations

import sys
from functools import partial

import numpy as np
import pytest
import roma
import torch

from factorkit.data.views.cameras import Distortion
from factorkit.data.views.views import Views
from factorkit.nerfdiff import epipolar_check
from factorkit.nerfdiff.epipolar_check import (
    EPIPOLAR_CHECK,
    MIN_EPIPOLAR_SHARE,
    add_epipolar_check,
    check_epipolar,
    judge_matches,
    match_views,
    record_check,
)
from factorkit.nerfdiff.export.images import ExportView
from factorkit.nerfdiff.scene import shared_camera
from factorkit.nerfdiff.search import judge_run
from factorkit.nerfdiff.verdict import judge_cameras, log_alarms
from factorkit.rendering import look_at
from factorkit.report.content import Check, summarise_checks
from factorkit.utils.files import read_log
from tests.nerfdiff.textured import make_intrinsics_of, orbit, render_photo

cv2 = pytest.importorskip("cv2", reason="the extra `baselines`")
K = np.array([[260.0, 0, 128], [0, 260, 96], [0, 0, 1]])
SIZE = (192, 256)
LENS = Distortion(k1=0.2, p1=0.05, p2=0.05)


def make_poses(count=4, step=1.0):
    eye = torch.tensor([[0.6 * i - 1, -2.0 + 0.2 * i, 2.5 + 0.1 * i] for i in step * np.arange(count)]).double()
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


def test_check_epipolar_right_cameras_pass():
    result = check_epipolar(make_views(make_poses()), make_poses())
    assert result.check.status == "passed" and result.check.value > 0.98 and result.median < 0.5 and result.near > 0.95
    assert len(result.pairs) == 5 and not result.check.decisive


@pytest.mark.slow
def test_check_epipolar_turned_cameras_are_named_from_two_degrees_on():
    poses = make_poses()
    matches = match_views(make_views(poses))
    checks = [judge_matches(matches, turn(poses, degrees), list("abcd")).check for degrees in (1, 4, 13)]
    assert [check.status for check in checks] == ["passed", "failed", "failed"]
    assert MIN_EPIPOLAR_SHARE > checks[1].value > checks[2].value and checks[2].value < 0.3


def test_check_epipolar_one_wrong_camera_is_first_in_the_list_and_in_the_failure():
    poses = make_poses()
    poses[2] = turn(poses, 15)[2]
    result = check_epipolar(make_views(make_poses()), poses)
    assert all("2.png" in pair["views"] for pair in result.pairs[:2])
    assert result.pairs[0]["share"] < 0.5 < result.pairs[-1]["share"]
    (failure,) = result.check.failures
    assert failure.startswith(f"cameras do not fit matched points: only {result.check.value:.2f} < 0.85 of the points")
    assert f"(worst: {' and '.join(result.pairs[0]['views'])}, " in failure and "Train with another seed=" in failure


@pytest.mark.slow
def test_check_epipolar_lens_distortion_is_removed_first():
    views = make_views(make_poses(), lens=LENS)
    ignored = check_epipolar([view._replace(distortion=None) for view in views], make_poses())
    assert check_epipolar(views, make_poses()).median < 0.6 * ignored.median


def test_check_epipolar_masked_pixels_are_not_matched():
    def read_loss_mask():
        return np.pad(np.ones((8, 8), np.float32), ((0, SIZE[0] - 8), (0, SIZE[1] - 8)))

    result = check_epipolar(make_views(make_poses(), read_loss_mask=read_loss_mask), make_poses())
    assert result.check.status == "not run" and not result.pairs and result.median is None


@pytest.mark.parametrize(
    ("count", "reason"), [(4, "0 pairs of views, with 0 of 4"), (1, "0 pairs of views, with 0 of 1")]
)
def test_check_epipolar_no_texture_or_one_view_is_not_run(count, reason):
    check = check_epipolar(make_views(make_poses(count), texture=False), make_poses(count)).check
    assert check.status == "not run" and check.not_run.startswith(f"since only {reason}") and not check.failures


def test_check_epipolar_most_views_without_matches_is_not_run():
    views = [*make_views(make_poses()), *make_views(make_poses(5), texture=False)]
    check = check_epipolar(views, torch.cat([make_poses(), make_poses(5)])).check
    assert check.status == "not run" and "5 pairs of views, with 4 of 9 views, have 16 matches" in check.not_run


def test_check_epipolar_two_views_are_not_run_and_say_how_many_pairs_are_needed():
    check = check_epipolar(make_views(make_poses(2)), make_poses(2)).check
    assert (
        "1 pair of views, with 2 of 2 views" in check.not_run and "3 pairs with 50% of the views are" in check.not_run
    )


@pytest.mark.parametrize(("step", "is_run"), [(0.05, False), (0.5, True)])
def test_check_epipolar_matches_that_hardly_move_are_not_run_as_wrong_cameras_would_pass(step, is_run):
    matches = match_views(make_views(make_poses(5, step)))
    in_one_place = make_poses(1).repeat(5, 1, 1)
    in_one_place[:, :3, 3] += torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 100
    names = list("abcde")
    share = judge_matches(matches._replace(not_run=""), in_one_place, names).check.value
    assert (share >= MIN_EPIPOLAR_SHARE) != is_run
    check = judge_matches(matches, in_one_place, names).check
    assert check.status == ("failed" if is_run else "not run")
    assert is_run or (check.not_run.startswith("since matched points move by 0.") and "less than 1:" in check.not_run)


def test_check_epipolar_without_opencv_is_not_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    check = check_epipolar([], make_poses()).check
    assert check.status == "not run" and "pip install 'factorkit[baselines]'" in check.not_run


def test_check_epipolar_small_images_are_not_run():
    views = [view._replace(size=(96, 127)) for view in make_views(make_poses())]
    assert "127 pixels, fewer than 128" in check_epipolar(views, make_poses()).check.not_run


@pytest.mark.slow
@pytest.mark.parametrize("still", [False, True])
def test_check_epipolar_repeated_or_still_background_right_cameras_pass(still):
    """The texture of the floor repeats, so that views from opposite sides match wrongly."""
    size, poses = (192, 256), orbit(np.arange(0, 360, 15.0))
    intrinsics = make_intrinsics_of(size)
    pixels = [render_photo(pose, intrinsics, size, still=still)[0] for pose in poses]
    views = [ExportView(str(i), size, intrinsics, None, partial(np.asarray, p)) for i, p in enumerate(pixels)]
    matches, poses = match_views(views), torch.from_numpy(poses)
    names = [view.name for view in views]
    assert judge_matches(matches, poses, names).check.value > 0.95
    assert (
        judge_matches(
            matches, poses[torch.randperm(24, generator=torch.Generator().manual_seed(0))], names
        ).check.status
        == "failed"
    )


@pytest.mark.slow
def test_check_epipolar_equal_views_are_not_compared_with_each_other():
    poses = make_poses().repeat_interleave(2, 0)
    result = check_epipolar(make_views(poses), poses)
    assert result.check.value > 0.95 and all(pair["share"] > 0.9 for pair in result.pairs)


def make_stored_views(poses):
    pixels = torch.stack([torch.from_numpy(view.read_pixels()).permute(2, 0, 1) for view in make_views(poses)])
    intrinsics = torch.from_numpy(K).float().repeat(len(poses), 1, 1)
    return Views(pixels / 255.0, [f"{i}.png" for i in range(len(poses))], intrinsics, poses=poses.float())


@pytest.fixture
def logged(tmp_path):
    """A run folder with alarms."""
    failures = ["collapse: all on one side"]
    log_alarms(tmp_path, {"step": 5, "checks": [{"name": "azimuth spread", "status": "failed"}], "failures": failures})
    return tmp_path


@pytest.mark.parametrize("fitted_focal", [1.0, 0.3])
def test_add_epipolar_check_after_a_training_is_added_once_with_the_fitted_focal_length(logged, capsys, fitted_focal):
    views, poses = make_stored_views(make_poses()), make_poses()
    intrinsics = shared_camera(views).intrinsics * torch.tensor([[fitted_focal], [fitted_focal], [1.0]])
    for _ in range(2):
        add_epipolar_check(logged, 7, views, intrinsics, poses)
    alarms = read_log(logged)
    assert len(alarms) == 2 and alarms[-1]["step"] == 5
    assert [check["name"] for check in alarms[-1]["checks"]] == ["azimuth spread", EPIPOLAR_CHECK]
    failed = alarms[-1]["failures"][1:]
    assert len(failed) == (fitted_focal < 1) and failed == capsys.readouterr().err.splitlines()
    assert len(summarise_checks(alarms)) == 3


def test_add_epipolar_check_of_small_views_is_not_run_and_says_where_to_look(logged):
    add_epipolar_check(logged, 7, make_stored_views(make_poses()).resize(64), torch.eye(3), make_poses())
    check = read_log(logged)[-1]["checks"][-1]
    assert check["status"] == "not run" and "evaluate --epipolar" in check["reason"]


def test_record_check_replaces_an_earlier_result_in_alarms_and_verdict(logged):
    wrong = check_epipolar(make_views(make_poses()), turn(make_poses(), 20)).check
    for check in (wrong, Check(EPIPOLAR_CHECK, 0.99, low=MIN_EPIPOLAR_SHARE), wrong):
        record_check(logged, 7, check)
        alarms = read_log(logged)[-1]
        assert [other["status"] for other in alarms["checks"]] == ["failed", check.status]
        assert alarms["failures"] == ["collapse: all on one side", *check.failures]
    assert judge_run(logged, "dictionary").problem.count(EPIPOLAR_CHECK) == 1


def test_record_check_of_a_run_without_alarms_makes_its_verdict(tmp_path):
    record_check(tmp_path, 7, check_epipolar(make_views(make_poses()), turn(make_poses(), 20)).check)
    assert judge_cameras(read_log(tmp_path), {}).headline == "Failed: cameras do not fit matched points"
