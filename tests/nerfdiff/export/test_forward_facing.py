"""Forward-facing scenes in the files of other programs: in the space of the cameras, not of the field's box."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import trimesh

from factorkit.nerfdiff.cameras.poses import forward_facing_poses
from factorkit.nerfdiff.export import export
from factorkit.nerfdiff.rays import render_views
from factorkit.rendering import Rays
from factorkit.utils.errors import ConfigError
from tests.nerfdiff.forward import CAMERA, CENTRE, RADIUS, WALL, ball_alone, ball_and_wall, forward_views

pycolmap = pytest.importorskip("pycolmap")
PlyData = pytest.importorskip("plyfile").PlyData


@pytest.fixture(scope="module")
def views():
    return forward_views()


def vertices(path):
    """Points and colours of a .ply as plyfile reads them."""
    table = PlyData.read(path)["vertex"]
    points, colors = ([table[name] for name in names] for names in (("x", "y", "z"), ("red", "green", "blue")))
    return torch.tensor(np.stack(points, 1)), torch.tensor(np.stack(colors, 1))


def test_to_ndc_from_ndc_round_trip():
    generator = torch.Generator().manual_seed(0)
    origins = 0.4 * torch.randn(50, 3, generator=generator) - torch.tensor([0, 0, 0.8])
    directions = torch.nn.functional.normalize(torch.randn(50, 3, generator=generator) - torch.tensor([0, 0, 6.0]))
    assert 5 < (origins[:, 2] < -1).sum() < 45
    bent = CAMERA.to_ndc(Rays(origins, directions), (30, 40))
    assert torch.equal(bent.directions[:, 2], CAMERA.to_ndc(Rays(0 * origins, directions), (3, 4)).directions[:, 2])
    for t in (0.0, 0.1, 0.4):
        world = CAMERA.from_ndc(bent.origins + t * bent.directions)
        along = ((world - origins) * directions).sum(1)
        torch.testing.assert_close(world, origins + along[:, None] * directions, atol=1e-3, rtol=1e-4)
        assert (along > -1e-4).all()  # nothing behind the camera, even where it stands beyond the nearest plane
        if t == 0:
            torch.testing.assert_close(-world[:, 2], (-origins[:, 2]).clamp_min(1), atol=1e-4, rtol=1e-4)


def test_export_forward_camera_in_the_scene_sees_the_surface_before_it():
    ahead = forward_facing_poses(torch.zeros(1, 3))
    ahead[0, :3, 3] = torch.tensor([0.2, -0.1, -3.5])  # behind the ball
    rendered = render_views(ball_and_wall, ahead, CAMERA, (6, 8), 512)
    assert torch.allclose(rendered.depth, torch.full((1, 6, 8), WALL), atol=0.1) and (rendered.opacity > 0.99).all()
    assert (
        rendered.color[..., 0] - rendered.color[..., 1]
    ).abs().max() < 0.01  # the wall's grey, none of the ball's red


def test_export_forward_points_are_on_the_surfaces(tmp_path, views):
    points, colors = vertices(export(tmp_path / "scene.ply", views, ball_and_wall, points=4000))
    assert 2500 < len(points) < 6000
    from_ball, from_wall = (points - CENTRE).norm(dim=1) - RADIUS, -points[:, 2] - WALL
    on_ball = from_ball.abs() < from_wall.abs()
    assert 200 < on_ball.sum() < 3000
    # a step of the box's depth, of which there are about 100, is as long as the square of the distance over that
    assert from_ball[on_ball].abs().median() < 0.05 and from_wall[~on_ball].abs().median() < WALL**2 / 100
    inside = from_ball < -0.02
    assert (colors[inside, 0].float() > 2 * colors[inside, 1]).float().mean() > 0.9  # red
    wall = from_wall.abs() < 0.3
    assert (colors[wall, 0].float() - colors[wall, 2]).abs().median() < 3  # grey


def test_export_forward_distant_points_are_omitted(tmp_path, views):
    near = vertices(export(tmp_path / "near.ply", views, ball_and_wall, points=2000, far=4.0))[0]
    assert -near[:, 2].min() < 4 and ((near - CENTRE).norm(dim=1) < RADIUS + 0.1).float().mean() > 0.95
    for far in (1.0, float("nan")):
        with pytest.raises(ConfigError, match="far="):
            export(tmp_path / "a.ply", views, ball_and_wall, far=far)
    far = trimesh.load(export(tmp_path / "mesh.ply", views, ball_and_wall, resolution=40, far=20.0))
    assert far.bounds[0, 2] == pytest.approx(-20, rel=1e-3)


def test_export_forward_mesh_has_faces_outwards(tmp_path, views):
    def shaded(positions, directions):
        return ball_alone(positions, directions)[0], (directions / 2).clamp(0, 1)

    export(tmp_path / "mesh.ply", views, ball_alone, resolution=80, level=200.0)
    mesh = trimesh.load(tmp_path / "mesh.ply")
    assert mesh.is_watertight and mesh.volume == pytest.approx(4 / 3 * np.pi * RADIUS**3, rel=0.06)
    away = np.linalg.norm(mesh.vertices - CENTRE.numpy(), axis=1)
    assert np.abs(away - RADIUS).max() < 0.06
    outwards = (mesh.face_normals * (mesh.triangles_center - CENTRE.numpy())).sum(1)
    assert (outwards > 0).mean() > 0.99
    _, colors = vertices(tmp_path / "mesh.ply")
    np.testing.assert_allclose(colors.float().median(0).values, [255, 51, 0], atol=1)
    _, colors = vertices(export(tmp_path / "mesh2.ply", views, shaded, resolution=30))
    assert (colors == torch.tensor([0, 0, 255])).all()  # as seen from straight before it


def test_export_forward_colmap_reads_cameras_and_points(tmp_path, views):
    folder = export(tmp_path / "colmap", views, ball_and_wall, points=3000)
    model = pycolmap.Reconstruction(folder / "sparse" / "0")
    assert len(model.cameras) == 1 and len(model.images) == len(views)
    camera = next(iter(model.cameras.values()))
    points = np.array([point.xyz for point in model.points3D.values()])
    colors = np.array([point.color for point in model.points3D.values()])
    ball = colors[:, 0] > 2.0 * colors[:, 1]
    assert 100 < ball.sum() < len(points) / 2
    red = views.images[:, 0] > 2.0 * views.images[:, 1]
    shares = []
    for i in range(len(views)):
        local = points[ball] @ model.images[i + 1].cam_from_world().matrix()[:, :3].T
        local = local + model.images[i + 1].cam_from_world().matrix()[:, 3]
        assert (local[:, 2] > 0).all()
        pixels = np.array([camera.img_from_cam(point) for point in local]).reshape(-1, 2)
        right, down = np.clip(pixels.astype(int), 0, [[23, 17]]).T
        shares.append(red[i, down, right].float().mean())
    assert min(shares) > 0.85  # of 24 x 18 pixels, those on the ball's rim are its colour or not
