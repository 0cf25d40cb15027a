"""Normalised device coordinates against the projection they are made of."""

from __future__ import annotations

import pytest
import torch

from factorkit.rendering import Rays, from_ndc, image_rays, ndc_rays

HEIGHT, WIDTH = 12, 20
K = torch.tensor([[25.0, 0, 10], [0, 24.0, 6], [0, 0, 1]], dtype=torch.float64)


def some_rays(count=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    origins = 0.3 * torch.randn(count, 3, dtype=torch.float64, generator=generator)
    directions = torch.randn(count, 3, dtype=torch.float64, generator=generator)
    directions[:, 2] = -directions[:, 2].abs() - 0.5
    return Rays(origins, torch.nn.functional.normalize(directions, dim=1))


def test_ndc_rays_points_map_back_to_the_ray():
    rays = some_rays()
    bent = ndc_rays(rays, K, HEIGHT, WIDTH, near=1.5)
    for t in (0.0, 0.3, 0.9):
        there = from_ndc(bent.origins + t * bent.directions, K, HEIGHT, WIDTH, near=1.5)
        towards = there - rays.origins
        along = (towards * rays.directions).sum(1)
        torch.testing.assert_close(towards, along[:, None] * rays.directions)
        if t == 0:
            torch.testing.assert_close(there[:, 2], torch.full((40,), -1.5).double())
        else:
            assert (there[:, 2] < -1.5).all()
    torch.testing.assert_close(bent.origins[:, 2], torch.full((40,), -1.0).double())
    torch.testing.assert_close((bent.origins + bent.directions)[:, 2], torch.ones(40).double())


def test_ndc_rays_frustum_maps_to_the_unit_box():
    rays = image_rays(torch.eye(4).double(), K, HEIGHT, WIDTH)
    bent = ndc_rays(rays, K, HEIGHT, WIDTH)
    torch.testing.assert_close(bent.directions[..., :2], torch.zeros(HEIGHT, WIDTH, 2).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(bent.origins[0, 0, :2], torch.tensor([-1 + 1 / WIDTH, 1 - 1 / HEIGHT]).double())
    torch.testing.assert_close(bent.origins[-1, -1, :2], torch.tensor([1 - 1 / WIDTH, -1 + 1 / HEIGHT]).double())


def test_ndc_rays_gradients_reach_rays_and_focal_lengths():
    rays = some_rays(3)
    origins, directions, k = rays.origins.requires_grad_(), rays.directions.requires_grad_(), K.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda o, d, k: tuple(ndc_rays(Rays(o, d), k, HEIGHT, WIDTH)), (origins, directions, k)
    )


def test_ndc_rays_sideways_rays_stay_finite():
    rays = Rays(torch.zeros(3, 3), torch.tensor([[1.0, 0, 0], [0, 0, 1.0], [0, 1.0, -1e-9]]))
    assert all(part.isfinite().all() for part in ndc_rays(rays, K.float(), HEIGHT, WIDTH))


def test_ndc_rays_near_not_positive_raises():
    with pytest.raises(ValueError, match="near=0"):
        ndc_rays(some_rays(), K, HEIGHT, WIDTH, near=0)
