"""COLMAP models of every form, with pycolmap as the reference; and scenes of NeuS, NSVF, Polycam and Record3D."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from factorkit.data import make_procedural_views, open_views
from factorkit.utils.errors import DataError

FLIP = np.diag([1.0, -1.0, -1.0, 1.0])
SIZE, COUNT = 16, 9


@pytest.fixture(scope="module")
def scene():
    return make_procedural_views(COUNT, SIZE, seed=3)


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.mul(255).round().byte().permute(1, 2, 0).numpy()).save(path)


def write_model(folder, scene, cameras, text):
    """A model written by pycolmap; view i has the camera i modulo their number."""
    pycolmap = pytest.importorskip("pycolmap")
    model = pycolmap.Reconstruction()
    for i, (kind, parameters) in enumerate(cameras, 1):
        camera = pycolmap.Camera(model=kind, width=SIZE, height=SIZE, params=parameters, camera_id=i)
        model.add_camera_with_trivial_rig(camera)
    for i in range(COUNT):
        image = pycolmap.Image(name=f"a {i}.png", camera_id=i % len(cameras) + 1, image_id=i + 1)
        matrix = np.linalg.inv(scene.poses[i].double().numpy() @ FLIP)[:3]
        model.add_image_with_trivial_frame(image, pycolmap.Rigid3d(matrix))
    for point in ([0.0, 0, 0], [0.5, 0.2, -0.3]):
        model.add_point3D(np.array(point), pycolmap.Track(), np.array([200, 10, 10], np.uint8))
    folder.mkdir(parents=True, exist_ok=True)
    (model.write_text if text else model.write_binary)(str(folder))


@pytest.mark.parametrize(
    ("place", "text"),
    [(".", False), (".", True), ("sparse", True), ("sparse/0", False), ("sparse/0", True), ("colmap/sparse/0", False)],
)
def test_colmap_model_matches_original(tmp_path, scene, place, text):
    focal = scene.intrinsics[0, 0, 0].item()
    cameras = [("SIMPLE_PINHOLE", [focal, 8.0, 8.0]), ("PINHOLE", [20.0, 22.0, 7.0, 9.0])]
    write_model(tmp_path / place, scene, cameras, text)
    for i in range(COUNT):
        save(tmp_path / f"images/a {i}.png", scene.images[i])
    views = open_views(tmp_path)
    torch.testing.assert_close(views.poses, scene.poses, atol=1e-5, rtol=0)
    torch.testing.assert_close(views.images, scene.images, atol=0.003, rtol=0)
    torch.testing.assert_close(views.intrinsics[::2], scene.intrinsics[::2], atol=1e-3, rtol=0)
    assert views.intrinsics[1].tolist() == [[20, 0, 7], [0, 22, 9], [0, 0, 1]]
    assert views.layout == "object" and views.near < 4 < views.far
    assert open_views(tmp_path, "test").names == ["images/a 0.png", "images/a 8.png"]
    torch.testing.assert_close(open_views(tmp_path / place).poses, views.poses)
    (tmp_path / "images/a 3.png").unlink()
    with pytest.warns(UserWarning, match=r"left out 1 of 9 frames without an image file: a 3.png"):
        assert len(open_views(tmp_path)) == 8


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        ("SIMPLE_RADIAL", [20, 8, 8, -0.1]),
        ("RADIAL", [20, 8, 8, -0.1, 0.05]),
        ("OPENCV", [20, 21, 8, 8, -0.1, 0.05, 0.01, -0.02]),
        ("FULL_OPENCV", [20, 21, 8, 8, -0.1, 0.05, 0.01, -0.02, 0.02, 0.1, -0.05, 0.02]),
        ("OPENCV_FISHEYE", [20, 21, 8, 8, 0.1, 0.05, 0.01, -0.02]),
        ("SIMPLE_RADIAL_FISHEYE", [20, 8, 8, 0.1]),
        ("RADIAL_FISHEYE", [20, 8, 8, 0.1, 0.02]),
    ],
)
def test_colmap_lenses_match_pycolmap(kind, parameters):
    pycolmap = pytest.importorskip("pycolmap")
    from pathlib import Path

    from factorkit.data.views.colmap import _Camera, _parse_camera

    k, lens = _parse_camera(_Camera(kind, SIZE, SIZE, tuple(map(float, parameters))), "x", Path())
    camera = pycolmap.Camera(model=kind, width=SIZE, height=SIZE, params=parameters)
    points = np.random.default_rng(0).uniform(-0.5, 0.5, (20, 2))
    expected = camera.img_from_cam(np.concatenate([points, np.ones((20, 1))], axis=1))
    x, y = (values.numpy() for values in lens(*torch.from_numpy(points).T))
    np.testing.assert_allclose(np.stack([x * k[0, 0] + k[0, 2], y * k[1, 1] + k[1, 2]], 1), expected, atol=1e-9)


def test_colmap_invalid_models_raise(tmp_path, scene):
    for i in range(COUNT):
        save(tmp_path / f"images/a {i}.png", scene.images[i])
    model = tmp_path / "sparse/0"
    write_model(model, scene, [("FOV", [20, 20, 8, 8, 0.1])], True)
    with pytest.raises(DataError, match="images/a 0.png has the camera model FOV"):
        open_views(tmp_path)
    (model / "cameras.txt").write_text("1 PINHOLE 16 16 20\n")
    with pytest.raises(DataError, match="camera 1: 1 parameters, but PINHOLE has 4"):
        open_views(tmp_path)
    write_model(model, scene, [("PINHOLE", [20, 20, 8, 8])], False)
    content = (model / "images.bin").read_bytes()
    (model / "images.bin").write_bytes(content[:200])
    with pytest.raises(DataError, match="not a readable COLMAP model"):
        open_views(tmp_path)
    (model / "images.bin").write_bytes(content)
    for file in (tmp_path / "images").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="the images of this COLMAP model are missing, the first is a 0.png"):
        open_views(tmp_path)


def test_colmap_forward_scene_uses_points(tmp_path):
    views = make_procedural_views(COUNT, SIZE, seed=3)
    poses = np.tile(np.eye(4), (COUNT, 1, 1))
    poses[:, 0, 3] = np.linspace(-0.2, 0.2, COUNT)
    poses[:, 2, 3] = 2.0
    from dataclasses import replace

    write_model(
        tmp_path / "sparse/0",
        replace(views, poses=torch.from_numpy(poses).float()),
        [("SIMPLE_PINHOLE", [20, 8, 8])],
        True,
    )
    for i in range(COUNT):
        save(tmp_path / f"images/a {i}.png", views.images[i])
    opened = open_views(tmp_path)
    assert opened.layout == "forward" and opened.near == pytest.approx(0.9 / 0.75)
    assert opened.far == pytest.approx(2.3 / 2.0 / 0.75, rel=1e-3)


def test_dtu_scene_matches_original(tmp_path, scene):
    arrays = {}
    k = np.eye(4)
    k[:3, :3] = scene.intrinsics[0].double().numpy()
    scale = np.diag([300.0, 300, 300, 1])
    scale[:3, 3] = [10, -20, 600]
    for i in range(COUNT):
        save(tmp_path / f"image/{i:03d}.png", scene.images[i])
        Image.fromarray(scene.masks[i, 0].mul(255).round().byte().numpy()).save(_make(tmp_path / f"mask/{i:03d}.png"))
        arrays[f"world_mat_{i}"] = (
            -2.5 * k @ np.linalg.inv(scene.poses[i].double().numpy() @ FLIP) @ np.linalg.inv(scale)
        )
        arrays[f"scale_mat_{i}"] = scale
    np.savez(tmp_path / "cameras_sphere.npz", **arrays)
    views = open_views(tmp_path)
    torch.testing.assert_close(views.poses, scene.poses, atol=1e-4, rtol=0)
    torch.testing.assert_close(views.intrinsics, scene.intrinsics, atol=1e-3, rtol=0)
    torch.testing.assert_close(views.masks, scene.masks, atol=0.003, rtol=0)
    (tmp_path / "image/008.png").unlink()
    with pytest.raises(DataError, match="9 matrices world_mat_N, but .*image has 8 images"):
        open_views(tmp_path)


def _make(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def test_nsvf_scene_matches_original(tmp_path, scene):
    k = np.eye(4)
    k[:3, :3] = scene.intrinsics[0].double().numpy()
    np.savetxt(_make(tmp_path / "intrinsics.txt"), k)
    for i in range(COUNT):
        name = f"{(0, 0, 0, 0, 0, 1, 2, 2, 2)[i]}_{i:04d}"
        save(tmp_path / f"rgb/{name}.png", scene.images[i])
        np.savetxt(_make(tmp_path / f"pose/{name}.txt"), scene.poses[i].double().numpy() @ FLIP)
    views = open_views(tmp_path)
    torch.testing.assert_close(views.poses, scene.poses, atol=1e-5, rtol=0)
    torch.testing.assert_close(views.intrinsics, scene.intrinsics, atol=1e-3, rtol=0)
    assert len(open_views(tmp_path, "train")) == 5
    assert open_views(tmp_path, "test").names == [f"rgb/2_{i:04d}.png" for i in (6, 7, 8)]


def test_polycam_scene_matches_original(tmp_path, scene):
    y_up = np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]])  # from z up: x, y, z of the file are y, z, x
    for i in range(COUNT):
        save(tmp_path / f"keyframes/images/{100 + i}.jpg", scene.images[i])
        pose = y_up @ scene.poses[i, :3].double().numpy()
        camera = {f"t_{row}{column}": pose[row, column] for row in range(3) for column in range(4)}
        k = scene.intrinsics[i]
        camera |= {"fx": k[0, 0].item(), "fy": k[1, 1].item(), "cx": 8, "cy": 8, "width": SIZE, "height": SIZE}
        _make(tmp_path / f"keyframes/cameras/{100 + i}.json").write_text(json.dumps(camera))
    views = open_views(tmp_path)
    torch.testing.assert_close(views.poses, scene.poses, atol=1e-5, rtol=0)
    torch.testing.assert_close(views.intrinsics, scene.intrinsics, atol=1e-3, rtol=0)
    (tmp_path / "keyframes/cameras/100.json").write_text('{"fx": 38, "t_00": 1}')
    with pytest.raises(DataError, match=r"100.json: not a camera of Polycam \(KeyError: 't_20'"):
        open_views(tmp_path)


def test_record3d_scene_matches_original(tmp_path, scene):
    roma = pytest.importorskip("roma")
    poses = scene.poses.double()
    quaternions = roma.rotmat_to_unitquat(poses[:, :3, :3])
    k = scene.intrinsics[0]
    content = {
        "poses": torch.cat([quaternions, poses[:, :3, 3]], dim=1).tolist(),
        "K": (k.T.reshape(-1) * torch.tensor([2.0, 2, 1, 2, 2, 1, 2, 2, 1])).tolist(),
        "w": 2 * SIZE,
        "h": 2 * SIZE,
        "fps": 30,
    }
    for i in range(COUNT):
        save(tmp_path / f"rgb/{i}.jpg", scene.images[i])
    (tmp_path / "metadata.json").write_text(json.dumps(content))
    views = open_views(tmp_path)
    torch.testing.assert_close(views.poses, scene.poses, atol=1e-5, rtol=0)
    torch.testing.assert_close(views.intrinsics, scene.intrinsics, atol=1e-3, rtol=0)
    lenses = [[40.0 + i, 41.0, 15.0, 17.0] for i in range(COUNT)]
    (tmp_path / "metadata.json").write_text(json.dumps({**content, "perFrameIntrinsicCoeffs": lenses}))
    own = open_views(tmp_path).intrinsics
    torch.testing.assert_close(own[3], torch.tensor([[21.5, 0, 7.5], [0, 20.5, 8.5], [0, 0, 1]]))


def test_loss_masks_are_selected_resized_and_checked(tmp_path, scene):
    for i in range(COUNT):
        save(tmp_path / f"images/{i}.png", scene.images[i])
        loss = np.full((SIZE, SIZE), 255, np.uint8)
        loss[:4, : 2 * i] = 0
        Image.fromarray(loss).save(_make(tmp_path / f"ignore/{i}.png"))
    frames = [{"file_path": f"images/{i}.png", "transform_matrix": scene.poses[i].tolist()} for i in range(COUNT)]
    (tmp_path / "transforms.json").write_text(json.dumps({"camera_angle_x": 0.7, "frames": frames}))
    views = open_views(tmp_path, loss_masks=tmp_path / "ignore")
    assert views.masks is None and views.loss_masks[4, 0, :4, :8].max() == 0 and views.loss_masks[4].sum() == 224
    assert views.select([2, 4]).loss_masks.shape == (2, 1, SIZE, SIZE)
    small = views.resize(8).loss_masks[3, 0]  # 6 pixels wide become 3
    assert small[:2, :3].max() == 0 and small.sum() == 64 - 6
    assert open_views(tmp_path, resolution=5, loss_masks=tmp_path / "ignore").loss_masks.unique().tolist() == [0, 1]
    for file in (tmp_path / "ignore").iterdir():
        Image.fromarray(np.zeros((SIZE, SIZE), np.uint8)).save(file)
    with pytest.raises(DataError, match="no pixel is scored"):
        open_views(tmp_path, loss_masks=tmp_path / "ignore")


@pytest.mark.parametrize("layout", ["dtu", "nsvf", "transforms"])
def test_intrinsics_of_another_image_size_are_refused(tmp_path, scene, layout):
    """A matrix for images of twice the size, where no file says the size."""
    k = (scene.intrinsics[0] * torch.tensor([2.0, 2, 1])[:, None]).double().numpy()
    poses = scene.poses.double().numpy()
    folder = {"dtu": "image", "nsvf": "rgb", "transforms": "images"}[layout]
    for i in range(COUNT):
        save(tmp_path / folder / f"{i}.png", scene.images[i])
    if layout == "dtu":
        matrices = np.tile(np.eye(4), (COUNT, 1, 1))
        matrices[:, :3] = k @ np.linalg.inv(poses @ FLIP)[:, :3]
        np.savez(tmp_path / "cameras_sphere.npz", **{f"world_mat_{i}": m for i, m in enumerate(matrices)})
    elif layout == "nsvf":
        np.savetxt(tmp_path / "intrinsics.txt", np.pad(k, (0, 1)))
        for i in range(COUNT):
            np.savetxt(_make(tmp_path / f"pose/{i}.txt"), poses[i] @ FLIP)
    else:
        frames = [{"file_path": f"images/{i}.png", "transform_matrix": poses[i].tolist()} for i in range(COUNT)]
        lens = {"fl_x": k[0, 0], "cx": k[0, 2], "cy": k[1, 2]}
        (tmp_path / "transforms.json").write_text(json.dumps({**lens, "frames": frames}))
    with pytest.raises(DataError, match="intrinsics seem to be for images of 32 x 32 pixels"):
        open_views(tmp_path)


def test_dtu_masks_of_other_digits_are_matched_by_number(tmp_path, scene):
    """As NeuS's data: image/000003.png has mask/003.png."""
    k = scene.intrinsics[0].double().numpy()
    matrices = np.tile(np.eye(4), (COUNT, 1, 1))
    matrices[:, :3] = k @ np.linalg.inv(scene.poses.double().numpy() @ FLIP)[:, :3]
    np.savez(tmp_path / "cameras_sphere.npz", **{f"world_mat_{i}": m for i, m in enumerate(matrices)})
    for i in range(COUNT):
        save(tmp_path / f"image/{i:06d}.png", scene.images[i])
        save(tmp_path / f"mask/{i:03d}.png", scene.masks[i].round().expand(3, -1, -1))
    torch.testing.assert_close(open_views(tmp_path).masks, scene.masks.round(), atol=0.003, rtol=0)


def test_colmap_images_in_a_folder_of_smaller_ones_are_found(tmp_path, scene):
    focal = 4 * scene.intrinsics[0, 0, 0].item()
    (tmp_path / "sparse/0").mkdir(parents=True)
    (tmp_path / "sparse/0/cameras.txt").write_text(f"1 SIMPLE_PINHOLE 64 64 {focal} 32 32\n")
    (tmp_path / "sparse/0/images.txt").write_text("1 1 0 0 0 0 0 4 1 0.png\n\n2 1 0 0 0 1 0 4 1 1.png\n\n")
    for i in range(2):
        save(tmp_path / f"images_4/{i}.png", scene.images[i])
    torch.testing.assert_close(open_views(tmp_path).intrinsics, scene.intrinsics[:2], atol=1e-3, rtol=0)
