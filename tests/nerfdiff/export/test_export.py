"""Every file that is exported is read back by a library it is for, and says what was put in."""

from __future__ import annotations

import json
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import trimesh

from factorkit.data import make_procedural_views, open_views
from factorkit.data.procedural.scene import TABLE, make_scene_field, signed_distance
from factorkit.nerfdiff.export import export
from factorkit.nerfdiff.export.cameras import COLMAP_IMAGE_FOLDER, IMAGE_FOLDER, make_colmap
from factorkit.nerfdiff.export.images import file_names, list_stored
from factorkit.nerfdiff.export.shapes import Shape
from factorkit.utils.errors import ConfigError, DataError, WriteError
from factorkit.utils.output_record import OutputRecord

pycolmap = pytest.importorskip("pycolmap")
PlyData = pytest.importorskip("plyfile").PlyData


@pytest.fixture(scope="module")
def views():
    return make_procedural_views(10, 24, seed=2)


def distance(points):
    """To the scene's surface, signed."""
    return torch.stack([signed_distance(shape, points)[0] for shape in TABLE], dim=1).min(dim=1).values


def vertices(path):
    """Points and colours of a .ply as plyfile reads them."""
    table = PlyData.read(path)["vertex"]
    points, colors = ([table[name] for name in names] for names in (("x", "y", "z"), ("red", "green", "blue")))
    return torch.tensor(np.stack(points, 1)), torch.tensor(np.stack(colors, 1))


@pytest.mark.slow
def test_export_points_are_on_the_surface_in_its_colours(tmp_path, views):
    path = export(tmp_path / "out" / "scene.ply", views, make_scene_field(), points=4000)
    points, colors = vertices(path)
    assert 2500 < len(points) < 6000 and colors.dtype == torch.uint8
    off = distance(points)
    # The soft step stops light 0.03 before its middle; samples are 0.018 apart.
    assert off.median().item() == pytest.approx(0.03, abs=0.005)
    assert (off - 0.03).abs().quantile(0.95) < 0.03 and off.abs().max() < 0.1
    for kind, centre, sizes, paint in TABLE:
        own = signed_distance((kind, centre, sizes, paint), points)[0] < 0.045
        assert own.sum() > 50
        # Shading leaves between 0.55 and all of the paint; where shapes touch, both paints are seen.
        ratio = colors[own].float().median(0).values / 255 / torch.tensor(paint)
        assert ratio.min() > 0.5 and ratio.max() < 1.05 and ratio.max() - ratio.min() < 0.2


@pytest.mark.slow
def test_export_points_silhouettes_leave_none_in_empty_space(tmp_path, views, monkeypatch):
    from factorkit.nerfdiff.export import shapes

    stored, _ = vertices(export(tmp_path / "a.ply", views, make_scene_field(), points=4000))
    monkeypatch.setattr(shapes, "MIN_OPTICAL_DEPTH", -1.0)
    every, _ = vertices(export(tmp_path / "b.ply", views, make_scene_field(), points=4000))
    assert distance(every).max() > 0.2 > 0.1 > distance(stored).max()


@pytest.mark.slow
def test_export_mesh_is_closed_and_has_the_volume_of_the_density(tmp_path, views):
    field = make_scene_field()
    for name in ("mesh.ply", "thing.obj", "thing.glb"):
        path = export(tmp_path / name, views, field, resolution=80, level=100.0)
        mesh = trimesh.load(path, force="mesh")
        assert mesh.volume > 0.1 and np.abs(mesh.bounds).max() <= 1
    mesh = trimesh.load(tmp_path / "mesh.ply")
    assert mesh.is_watertight
    points, colors = vertices(tmp_path / "mesh.ply")
    faces = np.stack(PlyData.read(tmp_path / "mesh.ply")["face"]["vertex_indices"])
    assert faces.shape[1] == 3 and faces.min() >= 0 and faces.max() < len(points)
    assert distance(points).abs().quantile(0.98) < 0.025  # cells have sides of 0.025
    inside = torch.rand(20_000, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    volume = 8 * (field(inside, inside)[0] > 100).float().mean().item()
    assert mesh.volume == pytest.approx(volume, rel=0.06)
    ball = signed_distance(TABLE[2], points)[0].abs() < 0.01
    expected = field(points[ball], points[ball])[1] * 255
    torch.testing.assert_close(colors[ball].float(), expected, atol=1, rtol=0)


def test_export_mesh_has_the_colours_of_outside_views(tmp_path, views):
    def shiny_ball(positions, directions):
        return 100 * (0.6 - positions.norm(dim=1)).clamp_min(0), (1 + directions) / 2

    points, colors = vertices(export(tmp_path / "mesh.ply", views, shiny_ball, resolution=40))
    inwards = -torch.nn.functional.normalize(points, dim=1)
    assert ((colors / 255 * 2 - 1) - inwards).norm(dim=1).median() < 0.1


def test_export_mesh_cut_by_the_box_is_closed(tmp_path, views):
    def half_space(positions, directions):
        return 40 * (positions[:, 0] > 0.31).float(), positions.abs()

    path = export(tmp_path / "mesh.ply", views, half_space, resolution=20, lower=(-1, -1, -0.5), upper=(1, 1, 0.5))
    mesh = trimesh.load(path)
    assert mesh.is_watertight and mesh.volume == pytest.approx(0.69 * 2 * 1, rel=0.06)
    np.testing.assert_allclose(mesh.bounds[:, 1:], [[-1, -0.5], [1, 0.5]], atol=1e-6)


def test_export_transforms_round_trip(tmp_path, views):
    path = export(tmp_path / "studio" / "transforms.json", views, make_scene_field())
    content = json.loads(path.read_text())
    assert content["camera_model"] == "OPENCV" and content["w"] == content["h"] == 24
    assert {type(content[key]) for key in ("fl_x", "fl_y", "cx", "cy")} == {float}
    for frame in content["frames"]:
        assert set(frame) == {"file_path", "transform_matrix"} and (path.parent / frame["file_path"]).is_file()
        assert np.array(frame["transform_matrix"]).shape == (4, 4)
    back = open_views(path.parent)
    torch.testing.assert_close(back.poses, views.poses)
    torch.testing.assert_close(back.intrinsics, views.intrinsics)
    torch.testing.assert_close(back.images, views.images, atol=0.012, rtol=0)
    torch.testing.assert_close(back.masks, views.masks, atol=0.003, rtol=0)


@pytest.mark.parametrize("kind", ["transforms.json", "colmap"])
def test_export_localised_images_are_added_and_flagged(tmp_path, views, kind):
    images = list_stored(views)
    images[7:] = [image._replace(is_localised=True) for image in images[7:]]
    path = tmp_path / "out" / kind
    export(path, views.select(slice(0, 7)), make_scene_field(), images=images, localised=views.poses[7:], points=500)
    flagged = [f"{name}.png" for name in views.names[7:]]
    if kind == "colmap":
        assert (path / "localised.txt").read_text().splitlines() == flagged
    else:
        frames = json.loads(path.read_text())["frames"]
        assert [Path(frame["file_path"]).name for frame in frames if frame.get("localised")] == flagged
    torch.testing.assert_close(open_views(path).poses, views.poses)


def test_export_beside_images_leaves_them_unchanged(tmp_path, views):
    own = [tmp_path / "images" / f"{name}.png" for name in views.names]
    own[0].parent.mkdir()
    for path in own:
        path.write_bytes(b"all there is of it")
    export(tmp_path / "transforms.json", views, make_scene_field())
    written = sorted((tmp_path / IMAGE_FOLDER).iterdir())
    assert len(written) == 10
    with pytest.raises(WriteError, match=f"{own[0].name} exists and was not written by factorkit"):
        export(tmp_path, views, make_scene_field(), kind="colmap", points=100)
    assert not (tmp_path / "sparse").exists()
    for path in own:
        assert path.read_bytes() == b"all there is of it"
    written[0].write_bytes(b"edited")
    with pytest.raises(WriteError, match="changed after factorkit wrote it"):
        export(tmp_path / "transforms.json", views, make_scene_field())
    assert written[0].read_bytes() == b"edited"
    export(tmp_path / "transforms.json", views, make_scene_field(), overwrite=True)
    assert all(path.stat().st_size > 6 for path in written)


@pytest.mark.parametrize("name", ["scene.ply", "mesh.ply", "transforms.json", "colmap"])
@pytest.mark.slow
def test_export_replaces_only_what_it_wrote_for_the_same_scene(tmp_path, views, name):
    path = tmp_path / name
    target = path / "sparse" / "0" / "cameras.bin" if name == "colmap" else path
    options = {"points": 500} if name in ("scene.ply", "colmap") else {"resolution": 12}
    target.parent.mkdir(exist_ok=True, parents=True)
    target.write_text("mine")
    with pytest.raises(WriteError, match=f"{target.name} exists and was not written by factorkit"):
        export(path, views, make_scene_field(), source="a", **options)
    assert target.read_text() == "mine"
    for _ in range(2):
        target.unlink()
        export(path, views, make_scene_field(), source="a", **options)
    before = target.read_bytes()
    with pytest.raises(WriteError, match=r"written for another input \(a\)"):
        export(path, views, make_scene_field(), source="b", **options)
    assert target.read_bytes() == before


def test_export_transforms_different_cameras_round_trip(tmp_path, views):
    from dataclasses import replace

    k = views.intrinsics.clone()
    k[3, 0, 0] = 50.0
    different = replace(views, intrinsics=k, masks=None, background=None)
    path = export(tmp_path / "transforms.json", different, make_scene_field())
    content = json.loads(path.read_text())
    assert "fl_x" not in content and content["frames"][3]["fl_x"] == 50
    back = open_views(path)
    torch.testing.assert_close(back.intrinsics, k)
    torch.testing.assert_close(back.images, views.images, atol=0.002, rtol=0)


@pytest.mark.slow
def test_export_colmap_is_read_by_pycolmap(tmp_path, views):
    folder = export(tmp_path / "colmap", views, make_scene_field(), points=2000)
    model = pycolmap.Reconstruction(folder / "sparse" / "0")
    assert len(model.cameras) == 1 and len(model.images) == 10
    camera = next(iter(model.cameras.values()))
    assert camera.model.name == "PINHOLE" and (camera.width, camera.height) == (24, 24)
    points = np.array([point.xyz for point in model.points3D.values()])
    assert len(points) > 1000 and distance(torch.tensor(points).float()).abs().max() < 0.1
    for i, name in enumerate(views.names):
        image = model.images[i + 1]
        assert image.name == f"{name}.png" and (folder / COLMAP_IMAGE_FOLDER / image.name).is_file()
        world_to_camera = image.cam_from_world().matrix()
        expected = np.linalg.inv(views.poses[i].double().numpy() @ np.diag([1.0, -1, -1, 1]))[:3]
        np.testing.assert_allclose(world_to_camera, expected, atol=1e-5)
        # The scene's points fall on the image's foreground.
        local = points @ world_to_camera[:, :3].T + world_to_camera[:, 3]
        pixels = np.array([camera.img_from_cam(point) for point in local]).reshape(-1, 2)
        assert (local[:, 2] > 0).all()
        right, down = np.clip(pixels.astype(int), 0, 23).T
        assert (views.masks[i, 0, down, right] > 0.05).float().mean() > 0.98


def fundamental(model, first, second):
    """The fundamental matrix of two images of a pycolmap model (Hartley & Zisserman, eq. 9.2)."""

    def projection(image):
        camera = model.cameras[image.camera_id]
        matrix = image.cam_from_world().matrix()
        return camera.calibration_matrix(), matrix[:, :3], matrix[:, 3]

    (k1, r1, t1), (k2, r2, t2) = projection(model.images[first + 1]), projection(model.images[second + 1])
    turn = r2 @ r1.T
    x, y, z = t2 - turn @ t1
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.linalg.inv(k2).T @ cross @ turn @ np.linalg.inv(k1)


@pytest.mark.slow
def test_export_colmap_matched_pixels_satisfy_the_epipolar_constraint(tmp_path):
    """What the images say themselves: the middles of the yellow ball in two images are the same point of space."""
    views = make_procedural_views(14, 96, seed=6, elevations=(25.0, 60.0))
    folder = export(tmp_path / "colmap", views, make_scene_field(), points=500)
    model = pycolmap.Reconstruction(folder / "sparse" / "0")
    middles = []
    for image in views.images:
        red, green, blue = image
        yellow = (green > 2.5 * blue) & (green > 0.6 * red) & (red > 0.4)
        down, right = yellow.nonzero().double().mean(0) + 0.5
        middles.append(np.array([right, down, 1.0]))
    errors = []
    for i in range(14):
        for j in range(14):
            if i != j:
                line = fundamental(model, i, j) @ middles[i]
                errors.append(abs(line @ middles[j]) / math.hypot(line[0], line[1]))
    assert np.median(errors) < 0.5 and np.max(errors) < 1.5
    flipped = fundamental(model, 0, 5) @ np.diag([1.0, -1, 1])
    assert abs(flipped @ middles[0] @ middles[5]) / np.linalg.norm((flipped @ middles[0])[:2]) > 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nerf_lego_200", "llff_fern_504"])
def test_export_colmap_real_images_satisfy_the_epipolar_constraint(tmp_path, real_data, name):
    """Pixels matched by their surroundings (SIFT); Blender wrote the poses of the Lego scene, COLMAP those of Fern."""
    views = open_views(real_data(name), "train").select(slice(0, 40))
    with OutputRecord(tmp_path) as record:
        none = Shape(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.uint8))
        record.write(make_colmap(list_stored(views), views.poses.double(), none), "export")
    model = pycolmap.Reconstruction(tmp_path / "sparse" / "0")
    names = [model.images[i + 1].name for i in range(len(views))]
    sift = cv2.SIFT_create()
    result = [sift.detectAndCompute(cv2.imread(str(tmp_path / COLMAP_IMAGE_FOLDER / name), 0), None) for name in names]
    errors = []
    for i in range(len(views)):
        for j in range(i + 1, len(views)):
            for first, second in cv2.BFMatcher().knnMatch(result[i][1], result[j][1], k=2):
                if first.distance < 0.6 * second.distance:
                    here, there = ((*result[v][0][n].pt, 1.0) for v, n in ((i, first.queryIdx), (j, first.trainIdx)))
                    line = fundamental(model, i, j) @ (np.add(here, (0.5, 0.5, 0)))
                    errors.append(abs(line @ (np.add(there, (0.5, 0.5, 0)))) / math.hypot(line[0], line[1]))
    assert len(errors) > 100 and np.median(errors) < 1.0


def test_file_names_are_safe_and_unique():
    names = ["train/r_0.png", "./a.jpg", "a.png", "../../b c.png", "/etc/x", "C:\\d\\e.png", "..", "a.png.png"]
    result = file_names(names)
    assert result[:3] == ["train/r_0.png", "a.png", "a.png.png"]
    assert result[3:7] == ["b_c.png", "etc/x.png", "C_/d/e.png", "view.png"]
    assert len(set(result)) == len(names) and not any(name.startswith("/") or " " in name for name in result)


def empty(positions, directions):
    return torch.zeros(len(positions)), torch.zeros(len(positions), 3)


def test_export_invalid_request_raises(tmp_path, views):
    from dataclasses import replace

    with pytest.raises(DataError, match="no view shows anything solid"):
        export(tmp_path / "scene.ply", views, empty)
    with pytest.raises(DataError, match="at most 0"):
        export(tmp_path / "mesh.ply", views, empty)
    for path in ("scene.ply", "transforms.json", "colmap"):
        with pytest.raises(DataError, match="without poses"):
            export(tmp_path / path, replace(views, poses=None), empty)
    with pytest.raises(ConfigError, match="end it in"):
        export(tmp_path / "scene.xyz", views, empty)
    with pytest.raises(ConfigError, match="written as"):
        export(tmp_path / "scene.stl", views, empty, kind="mesh")
    with pytest.raises(ConfigError, match="kind='cloud'"):
        export(tmp_path / "scene.ply", views, empty, kind="cloud")
    with pytest.raises(ConfigError, match="points=0"):
        export(tmp_path / "scene.ply", views, empty, points=0)
    with pytest.raises(ConfigError, match="level=-1"):
        export(tmp_path / "mesh.ply", views, empty, level=-1.0)
