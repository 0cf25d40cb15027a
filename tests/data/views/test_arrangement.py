"""The layout comes from the cameras; other conventions are named in a refusal; distant origins keep their digits."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from factorkit.data import make_procedural_views, open_views
from factorkit.data.views.arrangement import arrange, find_convention_problem
from factorkit.metrics.pose import pose_errors
from factorkit.rendering import look_at, orbit
from factorkit.utils.errors import DataError

FLIP = np.diag([1.0, -1.0, -1.0, 1.0])
COUNT = 12


@pytest.fixture(scope="module")
def scene():
    return make_procedural_views(COUNT, 12, seed=2)


def write(folder, poses, scene):
    (folder / "images").mkdir(exist_ok=True)
    frames = []
    for i, pose in enumerate(poses):
        name = f"images/{i:02d}.png"
        Image.fromarray(scene.images[i % COUNT].mul(255).round().byte().permute(1, 2, 0).numpy()).save(folder / name)
        frames.append({"file_path": name, "transform_matrix": np.asarray(pose).tolist()})
    (folder / "transforms.json").write_text(json.dumps({"camera_angle_x": 0.7, "frames": frames}))
    return folder


def look_at_orbit(radius=4.0, centre=(0, 0, 0)):
    poses = orbit(COUNT, radius, 35.0).double().numpy()
    poses[:, :3, 3] += np.array(centre, dtype=float)
    return poses


def pan(position=(0.3, 0.2, 0.1), degrees=120.0):
    """Cameras in one place that look around."""
    poses = np.tile(np.eye(4), (COUNT, 1, 1))
    for i, angle in enumerate(np.radians(np.linspace(0, degrees, COUNT))):
        c, s = np.cos(angle), np.sin(angle)
        poses[i, :3, :3] = [[c, 0, s], [0, 1, 0], [-s, 0, c]]
        poses[i, :3, 3] = position
    return poses


@pytest.mark.parametrize(
    ("poses", "message"),
    [
        (np.linalg.inv(look_at_orbit()), "look like world-to-camera matrices: invert each.*all in one place"),
        (np.linalg.inv(look_at_orbit(centre=(3, 1, 0.5))), "look like world-to-camera matrices: invert"),
        (np.linalg.inv(look_at_orbit(centre=(5.4e6, 6e5, 120))), "look like world-to-camera matrices: invert"),
        (FLIP @ np.linalg.inv(look_at_orbit()), "world-to-camera matrices with OpenCV axes"),
        (look_at_orbit() @ FLIP, "look like camera axes of OpenCV"),
        (look_at_orbit(centre=(5.4e6, 6e5, 120)) @ FLIP, "look like camera axes of OpenCV"),
        (pan(), "12 cameras are in one place"),
        (np.tile(np.eye(4), (COUNT, 1, 1)), "12 cameras are in one place"),
    ],
)
def test_open_views_other_conventions_are_named(tmp_path, scene, poses, message):
    folder = write(tmp_path, poses, scene)
    with pytest.raises(DataError, match=message) as error:
        open_views(folder)
    assert str(folder) in str(error.value) and "--layout" in str(error.value)
    with pytest.warns(UserWarning, match=message):
        assert open_views(folder, layout="object").layout == "object"


def handheld(spread, degrees, seed=0):
    """Forward-facing cameras with small random turns."""
    rng = np.random.default_rng(seed)
    poses = np.tile(np.eye(4), (COUNT, 1, 1))
    for pose in poses:
        axis = rng.normal(size=3) * np.radians(degrees)
        x, y, z = axis
        q, _ = np.linalg.qr(np.eye(3) + np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]))
        pose[:3, :3] = q * np.sign(np.diag(q))
        pose[:3, 3] = rng.normal(size=3) * spread
    return poses


@pytest.mark.parametrize(
    ("poses", "layout"),
    [
        (look_at_orbit(), "object"),
        (look_at_orbit(centre=(3, 1, 0.5)), "object"),
        (look_at_orbit(radius=0.01), "object"),
        (look_at_orbit(radius=600.0, centre=(10, 20, 30)), "object"),
        (handheld(0.3, 4.0), "forward"),
        (handheld(0.3, 0.0), "forward"),
        (handheld(30.0, 8.0), "forward"),
    ],
)
def test_open_views_layout_is_that_of_cameras(tmp_path, scene, poses, layout, recwarn):
    views = open_views(write(tmp_path, poses, scene))
    assert views.layout == layout and not recwarn.list
    torch.testing.assert_close(views.poses, torch.from_numpy(poses).float())
    assert views.origin == (0, 0, 0)


def test_find_convention_problem_of_few_cameras_is_none():
    assert find_convention_problem(np.linalg.inv(look_at_orbit())[:2]) is None


@pytest.mark.parametrize("centre", [(5.4e6, 6.1e5, 250.0), (-4.0e6, 0.0, 0.0)])
def test_open_views_distant_coordinates_are_centred(tmp_path, scene, centre):
    poses = look_at_orbit(centre=centre)
    with pytest.warns(UserWarning, match="away from the origin"):
        views = open_views(write(tmp_path, poses, scene))
    assert views.layout == "object" and views.near == pytest.approx(2, rel=1e-4)
    moved = torch.from_numpy(poses)
    moved[:, :3, 3] -= torch.tensor(views.origin, dtype=torch.float64)
    torch.testing.assert_close(views.poses.double(), moved, atol=1e-6, rtol=0)
    assert pose_errors(views.poses, moved).translation.max() < 1e-5


def llff(folder, scene, poses, bounds=(2.5, 5.5)):
    (folder / "images").mkdir()
    rows = []
    for i, pose in enumerate(poses):
        Image.fromarray(scene.images[i].mul(255).round().byte().permute(1, 2, 0).numpy()).save(
            folder / f"images/{i:02d}.png"
        )
        lens = [[12.0], [12.0], [15.0]]
        rows.append([*np.concatenate([-pose[:3, 1:2], pose[:3, :1], pose[:3, 2:], lens], 1).ravel(), *bounds])
    np.save(folder / "poses_bounds.npy", np.array(rows))
    return folder


def test_llff_turntable_is_object_with_masks(tmp_path, scene):
    folder = llff(tmp_path, scene, scene.poses.double().numpy())
    (folder / "masks").mkdir()
    for i in range(COUNT):
        Image.fromarray(scene.masks[i, 0].mul(255).round().byte().numpy()).save(folder / f"masks/{i:02d}.png")
    views = open_views(folder)
    assert views.layout == "object" and views.near == pytest.approx(0.9 * 2.5) and views.far == pytest.approx(5.5)
    torch.testing.assert_close(views.poses, scene.poses, atol=1e-5, rtol=0)
    torch.testing.assert_close(views.masks, scene.masks, atol=0.003, rtol=0)
    assert any("12 foreground masks" in note for note in views.notes)
    assert len(open_views(folder, "test").masks) == 2
    assert open_views(folder, masks="none").masks is None
    assert open_views(folder, layout="forward").near == pytest.approx(0.9 / 0.75)
    (folder / "masks/03.png").unlink()
    with pytest.raises(DataError, match=r"no mask for 1 of 12 views, the first is images/03.png"):
        open_views(folder)


@pytest.mark.parametrize(("direction", "warned"), [((1.0, 0.2, 0.0), True), ((0.2, 1.0, 0.0), False)])
def test_forward_cameras_that_advance_are_named(scene, recwarn, direction, warned):
    """Cameras on a line that look along x."""
    eye = torch.linspace(0, 5, 9)[:, None] * torch.tensor(direction)
    poses = look_at(eye, eye + torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 0, 1])).double().numpy()
    assert arrange(poses, None, None, "here").layout == "forward"
    assert any("advance along their viewing direction" in str(w.message) for w in recwarn) == warned
