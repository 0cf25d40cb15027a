"""The procedural scene: correct poses, deterministic by seed, nearly symmetric under half a turn if requested."""

from __future__ import annotations

import pytest
import torch

from factorkit.data import make_procedural_views
from factorkit.data.procedural.scene import LAMP, TABLE, make_scene_field
from factorkit.metrics.image import psnr
from factorkit.utils.errors import ConfigError


def project(views, point):
    """Pixels [V, 2] (right, down) at which the views see a point."""
    local = torch.einsum("vji,vj->vi", views.poses[:, :3, :3], torch.tensor(point) - views.poses[:, :3, 3])
    image = torch.einsum("vij,vj->vi", views.intrinsics, local * torch.tensor([1.0, -1.0, -1.0]))
    return image[:, :2] / image[:, 2:]


@pytest.mark.slow
def test_views_ball_projects_to_its_pixels():
    views = make_procedural_views(12, 48, seed=5)
    ball = TABLE[4]
    positions = project(views, ball[1]).long()
    for image, mask, (right, down) in zip(views.images, views.masks, positions.tolist(), strict=True):
        red, green, blue = image[:, down, right].tolist()
        assert mask[0, down, right] > 0.95
        # Nothing else in the scene is so much more red and green than blue.
        assert min(red, green) > 3 * blue
    assert views.background.tolist() == [1, 1, 1] and views.layout == "object"
    corners = views.images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    torch.testing.assert_close(corners, torch.ones_like(corners), atol=1e-3, rtol=0)


def test_views_scene_is_inside_image_and_depth_range():
    views = make_procedural_views(16, 32, elevations=(-80.0, 85.0))
    border = torch.cat([views.masks[..., [0, -1], :].flatten(1), views.masks[..., [0, -1]].flatten(1)], dim=1)
    assert border.max() < 0.01 and 0.1 < views.masks.mean() < 0.5
    corner = torch.tensor([1.0, 1, 1]).norm()
    assert views.near == pytest.approx(4 - corner) and views.far == pytest.approx(4 + corner)


def test_poses_look_at_origin_within_elevations():
    views = make_procedural_views(40, 4, elevations=(-10.0, 30.0), radius=3.0)
    eyes, back = views.poses[:, :3, 3], views.poses[:, :3, 2]
    torch.testing.assert_close(eyes, 3 * back)
    elevation = torch.rad2deg(torch.asin(back[:, 2]))
    assert -10 <= elevation.min() < -6 and 26 < elevation.max() <= 30
    azimuth = torch.rad2deg(torch.atan2(eyes[:, 1], eyes[:, 0])).sort().values
    assert azimuth.diff().max() < 2 * 360 / 40


def test_views_depend_on_seed_only():
    first, again, other = (make_procedural_views(6, 16, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.images, again.images) and torch.equal(first.poses, again.poses)
    assert not torch.equal(first.poses, other.poses)


def half_turn(views):
    turn = torch.diag(torch.tensor([-1.0, -1.0, 1.0, 1.0]))
    return turn @ views.poses


@pytest.mark.parametrize(("symmetric", "minimum", "maximum"), [(True, 20.0, 50.0), (False, 0.0, 17.0)])
def test_views_half_turn_matches_only_symmetric_scene(symmetric, minimum, maximum, monkeypatch):
    from factorkit.data.procedural import scene as procedural_scene

    views = make_procedural_views(8, 24, symmetric=symmetric)
    monkeypatch.setattr(procedural_scene, "_sample_poses", lambda *settings: half_turn(views))
    turned = make_procedural_views(8, 24, symmetric=symmetric)
    alike = psnr(views.images, turned.images)
    assert minimum < alike.min() and alike.min() < maximum
    if symmetric:  # the lamp is what differs, and from most sides it can be seen
        assert (alike < 32).float().mean() >= 0.5


def test_symmetric_scene_differs_only_at_lamp():
    points = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    field = make_scene_field(symmetric=True)
    density, turned = (field(p, p)[0] for p in (points, points * torch.tensor([-1.0, -1, 1])))
    centre, size = torch.tensor(LAMP[1]).abs(), torch.tensor(LAMP[2])
    near_lamp = ((points * torch.tensor([-1.0, 1, 1])).abs() - centre).abs().sub(size).amax(1) < 0.2
    torch.testing.assert_close(density[~near_lamp], turned[~near_lamp])
    assert (density - turned).abs().max() > 10


@pytest.mark.parametrize(
    "settings",
    [
        {"count": 0},
        {"size": 0},
        {"seed": -1},
        {"elevations": (30.0, 10.0)},
        {"elevations": (0.0, 89.0)},
        {"radius": 1.0},
        {"fov": 180.0},
    ],
)
def test_views_invalid_arguments_raise(settings):
    with pytest.raises(ConfigError):
        make_procedural_views(**{"count": 2, "size": 4, **settings})
