"""Views: validation, resizing that preserves the camera, and other backgrounds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from factorkit.data.views.views import Views, make_background, resize_area, target_size
from factorkit.rendering import intrinsics_from_fov, orbit, pixel_rays
from factorkit.utils.errors import ConfigError, DataError


def some_views(count=4, height=12, width=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(count, 1, height, width, generator=generator)
    colors = torch.rand(count, 3, height, width, generator=generator)
    return Views(
        images=colors * masks + (1 - masks),
        masks=masks,
        poses=orbit(count, 3.0, 20.0),
        near=1.0,
        far=5.0,
        intrinsics=intrinsics_from_fov(40.0, height, width).repeat(count, 1, 1),
        background=torch.ones(3),
        names=[f"v{i}" for i in range(count)],
    )


def test_select_selects_all_fields():
    views = some_views()
    part = views.select([2, 0])
    assert part.names == ["v2", "v0"] and len(part) == 2 and part.size == (12, 16)
    for name in ("images", "masks", "poses", "intrinsics"):
        torch.testing.assert_close(getattr(part, name), getattr(views, name)[[2, 0]])
    assert views.select(slice(1, 3)).names == ["v1", "v2"]
    assert views.select(torch.tensor([False, True, False, True])).names == ["v1", "v3"]
    assert views.select(3).names == ["v3"]
    bare = replace(views, masks=None, poses=None).select([1])
    assert bare.masks is None and bare.poses is None


@pytest.mark.parametrize("sizes", [((12, 16), (6, 8)), ((12, 16), (5, 7)), ((7, 9), (14, 27)), ((9, 9), (1, 4))])
def test_resize_area_is_mean_over_area(sizes):
    (height, width), (new_height, new_width) = sizes
    pixels = np.random.default_rng(0).random((height, width), np.float32)
    result = resize_area(torch.from_numpy(pixels), new_height, new_width)
    box = Image.fromarray(pixels).resize((new_width, new_height), Image.Resampling.BOX)
    if height % new_height == 0 and width % new_width == 0:
        torch.testing.assert_close(result, torch.from_numpy(np.array(box)))
    # Every old pixel has the same weight in all new ones together.
    assert result.mean().item() == pytest.approx(pixels.mean(), rel=1e-5)
    fine = np.kron(pixels, np.ones((new_height, new_width)))
    blocks = fine.reshape(new_height, height, new_width, width).mean((1, 3))
    np.testing.assert_allclose(result, blocks, rtol=1e-5)


def test_resize_keeps_rays():
    views = some_views()
    small = views.resize((4, 10))
    assert small.size == (4, 10) and small.images.shape == (4, 3, 4, 10) and small.masks.shape == (4, 1, 4, 10)
    corners = torch.tensor([[0.0, 0], [16, 12], [4, 9]])
    before = pixel_rays(views.poses[1], views.intrinsics[1], corners).directions
    after = pixel_rays(small.poses[1], small.intrinsics[1], corners * torch.tensor([10 / 16, 4 / 12])).directions
    torch.testing.assert_close(before, after)
    assert views.resize(8).size == (6, 8)
    torch.testing.assert_close(views.resize(8).images.mean((2, 3)), views.images.mean((2, 3)))


def test_target_size_of_side_or_pair():
    assert target_size(100, 378, 504) == (75, 100)
    assert target_size(1, 10, 1000) == (1, 1)
    for wrong in (0, -3, (0, 4)):
        with pytest.raises(ConfigError, match="at least 1 pixel"):
            target_size(wrong, 10, 10)


def test_with_background_replaces_only_background():
    views = some_views()
    red = views.with_background((1.0, 0.0, 0.0))
    less = torch.tensor([0.0, -1.0, -1.0])[:, None, None]
    torch.testing.assert_close(red.images - views.images, (1 - views.masks) * less)
    torch.testing.assert_close(red.with_background("white").images, views.images)
    assert red.background.tolist() == [1, 0, 0]
    noisy = views.with_background("noise", seed=3)
    assert noisy.background is None and noisy.images.shape == views.images.shape
    torch.testing.assert_close(noisy.images, views.with_background("noise", seed=3).images)
    behind, _ = make_background("noise", views.images.shape, 3)
    torch.testing.assert_close(noisy.images, views.images + (1 - views.masks) * (behind - 1))
    assert behind.std() > 0.25
    with pytest.raises(ConfigError, match="background colour"):
        noisy.with_background("black")
    with pytest.raises(ConfigError, match="masks"):
        replace(views, masks=None).with_background("black")
    for wrong in ("pink", (1.0, 2.0, 0.0), (0.0, 0.0)):
        with pytest.raises(ConfigError, match="three numbers"):
            views.with_background(wrong)


def alter(tensor, index, value):
    changed = tensor.clone()
    changed[index] = value
    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: {"images": v.images[:0], "names": []}, "at least one view"),
        (lambda v: {"names": v.names[:3]}, r"3 names"),
        (lambda v: {"poses": v.poses[:3]}, r"poses of shape \(3, 4, 4\)"),
        (lambda v: {"masks": v.masks[..., :5]}, "masks of shape"),
        (lambda v: {"images": alter(v.images, (1, 0, 0, 0), torch.nan)}, "images: values that are not finite in v1"),
        (lambda v: {"images": alter(v.images, (1, 0, 0, 0), 255.0)}, "expected|need 0 to 1"),
        (lambda v: {"names": ["a", "b", "a", "c"]}, "named a"),
        (lambda v: {"poses": alter(v.poses, (2, 0, 3), torch.inf)}, "poses: values that are not finite in v2"),
        (lambda v: {"poses": alter(v.poses, (1, slice(3), 0), 2 * v.poses[1, :3, 0])}, "v1 is not rigid: it stretches"),
        (lambda v: {"poses": alter(v.poses, (3, slice(3), 0), -v.poses[3, :3, 0])}, "v3 is not rigid: it mirrors"),
        (lambda v: {"poses": alter(v.poses, (0, 3, 3), 2.0)}, "last row"),
        (lambda v: {"intrinsics": alter(v.intrinsics, (0, 1, 1), -5.0)}, "focal length"),
        (lambda v: {"intrinsics": alter(v.intrinsics, (2, 0, 1), 0.5)}, "K of v2 has skew"),
        (lambda v: {"intrinsics": alter(v.intrinsics, (1, 1, 0), -0.5)}, "K of v1 has skew"),
        (lambda v: {"intrinsics": alter(v.intrinsics, (3, 2, 2), 2.0)}, "last row of v3 is not 0 0 1"),
        (lambda v: {"near": 5.0}, "near=5 and far=5"),
        (lambda v: {"near": -1.0}, "need 0 <= near"),
        (lambda v: {"masks": v.masks * 0}, "no foreground: all masks"),
        (lambda v: {"layout": "inward"}, "layout"),
    ],
)
def test_views_invalid_fields_raise(change, message):
    views = some_views()
    with pytest.raises(DataError, match=message):
        replace(views, **change(views))


def test_reframe_sees_the_same_rays():
    """A smooth function of the ray's direction, seen by two cameras."""
    names, size = ["a"], (40, 60)
    k = torch.tensor([[50.0, 0, 28], [0, 52.0, 21], [0, 0, 1]])

    def see(k, height, width):
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        u, v = (x - k[0, 2]) / k[0, 0], (y - k[1, 2]) / k[1, 1]
        return torch.stack([0.5 + 0.4 * torch.sin(4 * u), 0.5 + 0.4 * torch.cos(5 * v), 0.5 + 0.3 * u * v])

    views = Views(see(k, *size)[None], names, k[None])
    for other, new_size in (
        (torch.tensor([[60.0, 0, 20], [0, 60.0, 18], [0, 0, 1]]), (36, 40)),
        (torch.tensor([[25.0, 0, 12], [0, 25.0, 9], [0, 0, 1]]), (18, 24)),
    ):
        framed = views.reframe(other, new_size)
        assert framed.size == new_size and torch.equal(framed.intrinsics[0], other)
        torch.testing.assert_close(
            framed.images[0, :, 2:-2, 2:-2], see(other, *new_size)[:, 2:-2, 2:-2], atol=0.02, rtol=0
        )
        assert framed.loss_masks is None
    wide = views.reframe(torch.tensor([[50.0, 0, 38], [0, 52.0, 31], [0, 0, 1]]), (60, 80))
    assert wide.loss_masks.sum() == 40 * 60 and wide.loss_masks[0, 0, 10:50, 10:70].min() == 1
    torch.testing.assert_close(wide.images[:, :, 10:50, 10:70], views.images, atol=1e-5, rtol=0)
    small = replace(views, masks=torch.ones(1, 1, 40, 60), background=torch.zeros(3)).reframe(k, (50, 60))
    assert small.images[..., 40:, :].max() == 0 and small.masks[..., 40:, :].max() == 0
