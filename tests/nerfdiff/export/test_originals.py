"""Exports have the files' own images and cameras, in the coordinates that were asked for, and are read back as such."""

from __future__ import annotations

import json
import shutil
import struct
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from factorkit.data import make_procedural_views, open_views
from factorkit.data.procedural.scene import make_scene_field
from factorkit.data.views.cameras import Distortion, FisheyeDistortion
from factorkit.data.views.open import list_views
from factorkit.data.views.views import Views
from factorkit.metrics.pose import align_poses
from factorkit.nerfdiff.epipolar_check import EPIPOLAR_CHECK, EpipolarCheck
from factorkit.nerfdiff.export import export
from factorkit.nerfdiff.export.cameras import COLMAP_FILES, make_colmap, make_transforms
from factorkit.nerfdiff.export.images import list_stored
from factorkit.nerfdiff.export.originals import find_originals
from factorkit.nerfdiff.export.shapes import Shape
from factorkit.nerfdiff.run import NerfdiffRun
from factorkit.nerfdiff.scene import shared_camera
from factorkit.nerfdiff.train import train_nerfdiff
from factorkit.nerfdiff.training_views import describe_data, store_views
from factorkit.report.content import Check
from factorkit.utils.errors import ConfigError, DataError

pycolmap = pytest.importorskip("pycolmap")

SIZE = 20  # pixels of the files; the run is trained at 8
OFFSET = np.array([500.0, -300.0, 40.0])
LENSES = {
    "none": ({}, None),
    "OPENCV": ({"k1": 0.05, "k2": -0.01, "p1": 1e-3, "p2": -2e-3}, Distortion(0.05, -0.01, 0, 1e-3, -2e-3)),
    "FULL_OPENCV": ({"k1": 0.05, "k3": 0.01, "k4": 0.02}, Distortion(0.05, 0, 0.01, denominator=(0.02, 0, 0))),
    "OPENCV_FISHEYE": ({"k1": 0.02, "k2": 0.01}, FisheyeDistortion(0.02, 0.01)),
}


def write_scene(folder: Path, lens: str = "none", focal_step: float = 0.0) -> Path:
    """Write ten transparent images in nerfstudio's format: twice as large a scene, far from the origin, y up."""
    views = make_procedural_views(10, SIZE, seed=1)
    turn = np.diag([1.0, 1, 1, 1])[[0, 2, 1, 3]] * np.array([[1], [1], [-1], [1]])  # z becomes y
    frames = []
    (folder / "images").mkdir(parents=True)
    for i, name in enumerate(views.names):
        straight = (views.images[i] - (1 - views.masks[i]) * views.background[:, None, None]) / views.masks[i].clamp(
            min=1e-6
        )
        rgba = torch.cat([straight.clamp(0, 1) * (views.masks[i] > 0), views.masks[i]]).movedim(0, -1)
        Image.fromarray((rgba * 255).round().byte().numpy()).save(folder / "images" / f"{name}.png")
        pose = turn @ views.poses[i].double().numpy()
        pose[:3, 3] = 2 * pose[:3, 3] + OFFSET
        frames.append(
            {
                "file_path": f"images/{name}.png",
                "transform_matrix": pose.tolist(),
                "fl_x": 27.5 + focal_step * (i % 2),
                "fl_y": 27.25,
                "cx": 10.25,
                "cy": 9.75,
                "w": SIZE,
                "h": SIZE,
            }
        )
    head = {} if lens == "none" else {"camera_model": lens, **LENSES[lens][0]}
    (folder / "transforms.json").write_text(json.dumps({**head, "frames": frames}))
    return folder


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return write_scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, scene, tiny):
    quick = {**tiny, "field_steps": 2, "steps": 2, "num_rendered_views": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train_nerfdiff(scene, out=tmp_path_factory.mktemp("runs") / "run", poses="known", **quick)


@pytest.fixture
def run_of(tmp_path, trained):
    """run_of(data): the trained run as if it had been trained on other data."""

    def make(data):
        folder = Path(shutil.copytree(trained.folder, tmp_path / "run"))
        views = data.resize(8) if isinstance(data, Views) else open_views(data, "train", 8)
        store_views(folder, views, describe_data(data, {}))
        run = NerfdiffRun.load(folder, device="cpu")
        run.model.intrinsics.copy_(shared_camera(views).intrinsics)
        return run

    return make


def solid(positions, directions):
    return 50.0 * (positions.norm(dim=1) < 0.6), torch.full_like(positions, 0.5)


@pytest.fixture
def with_solid_field(trained, monkeypatch):
    """A run of a few steps has no surface: a ball replaces its field."""
    monkeypatch.setattr(type(trained.model.field), "forward", lambda self, p, d: solid(p, d))
    return trained


def list_cameras(folder):
    """Each file's size, intrinsics, lens and pose as the readers see them."""
    listed = list_views(folder).views
    return [(view.read_image().shape, view.intrinsics(SIZE, SIZE), view.distortion, view.pose) for view in listed]


@pytest.mark.parametrize("name", ["out/transforms.json", "colmap"])
def test_export_given_coordinates_are_read_back_as_the_training_data(tmp_path, scene, with_solid_field, name):
    written = with_solid_field.export(tmp_path / name, coordinates="given", points=300)
    folder = written if written.is_dir() else written.parent
    training = [camera for i, camera in enumerate(list_cameras(scene)) if i % 8]
    for (shape, k, lens, pose), (shape2, k2, lens2, pose2) in zip(list_cameras(folder), training, strict=True):
        assert shape == shape2 == (SIZE, SIZE, 4) and lens is lens2 is None
        np.testing.assert_allclose(k, k2, rtol=0, atol=1e-12)
        np.testing.assert_allclose(pose, pose2, rtol=0, atol=2e-3)
    images = "images_factorkit" if name.endswith("json") else "images"
    for view in list_views(scene, "train").views:
        stem = Path(view.name).relative_to("images") if (folder / images / Path(view.name).name).exists() else view.name
        assert np.array_equal(np.asarray(Image.open(folder / images / stem)), np.asarray(Image.open(scene / view.name)))


def test_export_run_coordinates_name_the_transform_from_the_data(tmp_path, scene, with_solid_field):
    content = json.loads(with_solid_field.export(tmp_path / "transforms.json").read_text())
    assert content["w"] == SIZE and content["fl_x"] == 27.5
    transform, scale = np.array(content["applied_transform"]), content["applied_scale"]
    assert transform.shape == (3, 4) and scale == pytest.approx(0.5, rel=0.3)
    np.testing.assert_allclose(transform[:, :3] @ transform[:, :3].T, np.eye(3), atol=1e-9)
    given = [view.pose for view in list_views(scene, "train").views]
    for frame, pose in zip(content["frames"], given, strict=True):
        moved = scale * (transform[:, :3] @ pose[:3, 3] + transform[:, 3])
        np.testing.assert_allclose(np.array(frame["transform_matrix"])[:3, 3], moved, atol=1e-3)
    given_file = with_solid_field.export(tmp_path / "given" / "transforms.json", coordinates="given")
    content = json.loads(given_file.read_text())
    assert content["applied_transform"] == np.eye(3, 4).tolist() and content["applied_scale"] == 1


def test_export_points_and_mesh_follow_the_coordinates(tmp_path, with_solid_field):
    bounds = {}
    for coordinates in ("run", "given"):
        for name in ("mesh.ply", "mesh.glb"):
            path = with_solid_field.export(tmp_path / coordinates / name, coordinates=coordinates, resolution=24)
            bounds[coordinates, name] = trimesh.load(path, force="mesh").bounds
    radius = np.ptp(bounds["run", "mesh.ply"], axis=0) / 2
    middle = {key: value.mean(0) for key, value in bounds.items()}
    assert radius == pytest.approx(0.63, abs=0.05)
    scale = json.loads(with_solid_field.export(tmp_path / "transforms.json").read_text())["applied_scale"]
    np.testing.assert_allclose(np.ptp(bounds["given", "mesh.ply"], axis=0) / 2, radius / scale, rtol=5e-3)
    x, y, z = middle["run", "mesh.ply"]
    np.testing.assert_allclose(middle["run", "mesh.glb"], [x, z, -y], atol=1e-5)  # z is up in the run
    np.testing.assert_allclose(middle["given", "mesh.glb"], middle["given", "mesh.ply"], atol=1e-3)  # y already
    np.testing.assert_allclose(middle["given", "mesh.ply"], OFFSET, atol=1.0)


@pytest.mark.parametrize(
    ("up", "point"),
    [((0, 0, 1), (1, 3, -2)), ((0, 1, 0), (1, 2, 3)), ((0, -1, 0), (1, -2, -3)), ((0.2, 0.1, -0.9), (1, -3, 2))],
)
def test_glb_has_the_axis_closest_to_up_along_y(tmp_path, up, point):
    vertices = np.array([[1, 2, 3], [0, 0, 0], [1, 0, 0], [0, 1, 0]], np.float32)
    shape = Shape(vertices, np.zeros((4, 3), np.uint8), np.array([[0, 1, 2], [1, 2, 3], [0, 1, 3], [0, 2, 3]]))
    shape.save(tmp_path / "a.glb", torch.tensor(up, dtype=torch.float64))
    assert np.abs(trimesh.load(tmp_path / "a.glb", force="mesh").vertices - np.array(point)).sum(1).min() < 1e-6
    shape.save(tmp_path / "a.ply", torch.tensor(up, dtype=torch.float64))
    np.testing.assert_allclose(trimesh.load(tmp_path / "a.ply").vertices, vertices)


def test_shape_too_far_for_single_precision_is_refused(tmp_path):
    shape = Shape(np.array([[5.4e6, 0, 0], [5.4e6 + 4, 1, 1]]), np.zeros((2, 3), np.uint8))
    with pytest.raises(DataError, match="single precision does not resolve"):
        shape.save(tmp_path / "a.ply", torch.tensor([0.0, 0, 1]))


@pytest.mark.parametrize("lens", list(LENSES))
@pytest.mark.parametrize("kind", ["nerfstudio", "colmap"])
def test_lens_and_intrinsics_are_read_back(tmp_path, lens, kind):
    expected = LENSES[lens][1]
    views = make_procedural_views(5, 8, seed=1)
    k = views.intrinsics.double().numpy() * np.array([[1.0], [1.1], [1.0]])
    images = [view._replace(intrinsics=m, distortion=expected) for view, m in zip(list_stored(views), k, strict=True)]
    poses = views.poses.double()
    none = Shape(np.zeros((0, 3)), np.zeros((0, 3), np.uint8))
    files = make_transforms("transforms.json", images, poses, None) if kind == "nerfstudio" else None
    for name, save in (files or make_colmap(images, poses, none)).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        save(tmp_path / name)
    listed = list_views(tmp_path).views
    assert len(listed) == 5
    for view, image, pose in zip(listed, images, poses, strict=True):
        np.testing.assert_allclose(view.intrinsics(8, 8), image.intrinsics, rtol=0, atol=1e-12)
        np.testing.assert_allclose(view.pose, pose, rtol=0, atol=1e-6)
        assert view.distortion == expected
    if kind == "colmap":
        camera = next(iter(pycolmap.Reconstruction(tmp_path / "sparse" / "0").cameras.values()))
        assert camera.model.name == ("PINHOLE" if lens == "none" else lens)


def test_colmap_refuses_a_lens_it_has_no_model_for():
    views = make_procedural_views(3, 8, seed=1)
    images = [view._replace(distortion=Distortion(k4=0.1)) for view in list_stored(views)]
    with pytest.raises(DataError, match=r"term of r\^8 .* Export a transforms.json"):
        make_colmap(images, views.poses.double(), Shape(np.zeros((0, 3)), np.zeros((0, 3), np.uint8)))


def read_counts(data: bytes) -> int:
    return struct.unpack_from("<Q", data)[0]


def test_colmap_binary_has_the_published_layout(tmp_path):
    """A reader of its own, from colmap.github.io/format.html, as gsplat's and brush's loaders read it."""
    views = make_procedural_views(4, 8, seed=2)
    views.intrinsics[1:3, 0, 0] += 2  # two cameras
    export(tmp_path, views, make_scene_field(), kind="colmap", points=200)
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == [f"{n}.png" for n in sorted(views.names)]
    cameras, images, points = ((tmp_path / name).read_bytes() for name in COLMAP_FILES)
    assert read_counts(cameras) == 2 and len(cameras) == 8 + 2 * (4 + 4 + 8 + 8 + 4 * 8)
    number, model, width, height, fx, fy, cx, cy = struct.unpack_from("<iiQQ4d", cameras, 8)
    k = views.intrinsics[0]
    assert (number, model, width, height) == (1, 1, 8, 8)
    assert (fx, fy, cx, cy) == (k[0, 0], k[1, 1], k[0, 2], k[1, 2])
    at, used = 8, []
    for i, name in enumerate(views.names):
        image_id, qw, qx, qy, qz, tx, ty, tz, camera_id = struct.unpack_from("<i7di", images, at)
        at += 4 + 7 * 8 + 4
        end = images.index(b"\0", at)
        assert image_id == i + 1 and images[at:end].decode() == f"{name}.png"
        assert struct.unpack_from("<Q", images, end + 1) == (0,)
        at = end + 1 + 8
        used.append(camera_id)
        assert np.linalg.norm([qw, qx, qy, qz]) == pytest.approx(1)
        assert np.linalg.norm([tx, ty, tz]) == pytest.approx(float(views.poses[i, :3, 3].norm()), abs=1e-5)
    assert at == len(images) and used == [1, 2, 2, 1]
    assert read_counts(points) > 50 and len(points) == 8 + read_counts(points) * (8 + 24 + 3 + 8 + 8)
    assert len(pycolmap.Reconstruction(tmp_path / "sparse" / "0").points3D) == read_counts(points)


def test_export_several_cameras_of_a_run_are_kept(tmp_path, run_of):
    data = write_scene(tmp_path / "data", focal_step=0.05)
    run = run_of(data)
    content = json.loads(run.export(tmp_path / "out" / "transforms.json").read_text())
    wanted = [27.5 + 0.05 * (i % 2) for i in range(10) if i % 8]
    assert [frame["fl_x"] for frame in content["frames"]] == pytest.approx(wanted, abs=1e-9)
    run.model.intrinsics[0, 0] *= 1.1  # as --optimize-camera focal does
    content = json.loads(run.export(tmp_path / "out" / "transforms.json").read_text())
    assert [frame["fl_x"] for frame in content["frames"]] == pytest.approx([1.1 * x for x in wanted], rel=1e-6)
    assert {frame["fl_y"] for frame in content["frames"]} == {27.25}  # unchanged


def test_export_several_sizes_of_a_run_are_kept(tmp_path, run_of):
    data = write_scene(tmp_path / "data")
    content = json.loads((data / "transforms.json").read_text())
    for frame in content["frames"][::2]:
        file, frame["h"] = data / frame["file_path"], 15
        Image.open(file).crop((0, 0, SIZE, 15)).save(file)
    (data / "transforms.json").write_text(json.dumps(content))
    run = run_of(data)
    for name, size in (("a", 15), ("b", None)):
        if size is None:  # not found: the views of the training, without padding
            data.rename(tmp_path / "moved")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = run.export(tmp_path / name / "transforms.json")
        frames = json.loads(path.read_text())["frames"]
        heights = (SIZE, 15) if size else (8, 6)
        assert [frame["h"] for frame in frames] == [heights[i % 2 == 0] for i in range(10) if i % 8]
        for frame in frames:
            assert Image.open(path.parent / frame["file_path"]).size == (frame["w"], frame["h"])
            unit = frame["w"] / SIZE
            assert [frame[key] / unit for key in ("fl_x", "cx", "cy")] == pytest.approx([27.5, 10.25, 9.75], abs=1e-3)


def test_export_of_a_distorted_run_keeps_pixels_and_lens(tmp_path, run_of):
    data = write_scene(tmp_path / "data", lens="OPENCV")
    run = run_of(data)
    folder = run.export(tmp_path / "out" / "transforms.json").parent
    view, own = list_views(folder).views[0], list_views(data, "train").views[0]
    assert view.distortion == own.distortion == LENSES["OPENCV"][1]
    np.testing.assert_array_equal(view.read_image(), own.read_image())


def test_check_epipolar_localised_images_are_left_out(scene, run_of, monkeypatch):
    run = run_of(scene)
    originals = find_originals(run.folder)
    with_localised = replace(originals, localised=originals.data[:1])
    assert len(with_localised.list_images(*run.camera_changes)) == len(run.poses) + 1
    monkeypatch.setattr("factorkit.nerfdiff.run.find_originals", lambda folder, data: with_localised)
    lists = []

    def check(views, poses, progress):
        lists.append([view.name for view in views])
        return EpipolarCheck(Check(EPIPOLAR_CHECK, not_run="since it is a stand-in"), None, None, [])

    monkeypatch.setattr("factorkit.nerfdiff.run.check_epipolar", check)
    run.check_epipolar()
    assert lists == [run.views.names]


@pytest.mark.slow
def test_export_data_elsewhere_is_found_by_the_argument(tmp_path, run_of):
    data = write_scene(tmp_path / "data")
    run = run_of(data)
    moved = data.rename(tmp_path / "moved")
    with pytest.warns(UserWarning, match=r"not in .*data any more: images and cameras are read at 8 x 8 pixels"):
        path = run.export(tmp_path / "small" / "transforms.json")
    small = open_views(path.parent)
    assert small.size == (8, 8) and small.masks is not None
    stored = open_views(moved, "train", 8)
    torch.testing.assert_close(small.masks, stored.masks, atol=0.003, rtol=0)
    torch.testing.assert_close(small.intrinsics, stored.intrinsics, atol=1e-4, rtol=0)
    given = run.export(tmp_path / "small2" / "transforms.json", coordinates="given")
    torch.testing.assert_close(open_views(given, layout="object").poses, stored.poses, atol=2e-3, rtol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i, source in enumerate((moved, open_views(moved, "train"))):
            path = run.export(tmp_path / f"full{i}" / "transforms.json", data=source)
            assert open_views(path.parent).size == (SIZE, SIZE)
    other = write_scene(tmp_path / "other")
    file = sorted((other / "images").iterdir())[3]
    Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
    with pytest.raises(DataError, match=f"{file.name} is not the image that the run was trained on"):
        run.export(tmp_path / "x" / "transforms.json", data=other)
    with pytest.raises(DataError, match="not the 8 views of the run"):
        run.export(tmp_path / "x" / "transforms.json", data=open_views(moved, "train").images[:5].numpy())
    assert not (tmp_path / "x").exists()


def test_export_of_data_that_changed_since_is_that_of_the_training(tmp_path, run_of):
    data = write_scene(tmp_path / "data")
    run = run_of(data)
    file = sorted((data / "images").iterdir())[3]
    Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
    for i in range(2):
        with pytest.warns(UserWarning, match=[f"{file.name} is not the image", "is missing: images and cameras"][i]):
            path = run.export(tmp_path / f"{i}" / "transforms.json")
        assert json.loads(path.read_text())["w"] == 8
        file.unlink(missing_ok=True)
    with warnings.catch_warnings():  # no image is written
        warnings.simplefilter("error")
        run.model.field.forward = solid
        run.export(tmp_path / "mesh.ply", resolution=12)


def test_export_given_coordinates_without_cameras_is_refused(tmp_path, run_of, scene):
    run = run_of(replace(open_views(scene, "train"), poses=None))
    with pytest.raises(ConfigError, match="needs training data with cameras"):
        run.export(tmp_path / "transforms.json", coordinates="given")
    with pytest.raises(ConfigError, match="coordinates='world'"):
        run.export(tmp_path / "transforms.json", coordinates="world")


def test_export_loss_masks_are_read_back(tmp_path):
    views = make_procedural_views(4, 8, seed=1)
    mask = torch.ones(4, 1, 8, 8)
    mask[:, :, :3] = 0
    path = export(tmp_path / "transforms.json", replace(views, loss_masks=mask), solid)
    assert torch.equal(open_views(path).loss_masks, mask)
    with pytest.warns(UserWarning, match="4 images with pixels that are not scored: a COLMAP model has no place"):
        export(tmp_path / "colmap", replace(views, loss_masks=mask), solid, points=50)


def test_aligned_geographic_coordinates_are_exact():
    poses = make_procedural_views(9, 8, seed=1).poses.double()
    far = poses.clone()
    far[:, :3, 3] = far[:, :3, 3] * 4 + torch.tensor([5.4e6, 3.2e5, 0.0], dtype=torch.float64)
    moved = align_poses(poses, far).apply(poses)
    torch.testing.assert_close(moved, far, rtol=0, atol=1e-5)
