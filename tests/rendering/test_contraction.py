"""Contraction of all of space to a box, and sampling of rays that have no end."""

from __future__ import annotations

import pytest
import torch

from factorkit.rendering import Rays, UnboundedSampling, contract, render, uncontract
from factorkit.rendering.sampling import FAR_FACTOR, RADIUS


def points(count=200, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(count, 3, dtype=torch.float64, generator=generator)


def test_contract_cube_is_scaled_exactly():
    inside = points(scale=0.3).float().clamp(-1, 1)
    assert torch.equal(contract(inside), inside / 2)


def test_contract_outside_has_the_published_norm():
    outside = points(scale=9.0)
    outside = outside[outside.abs().amax(1) > 1]
    norm = outside.abs().amax(1)
    torch.testing.assert_close(2 * contract(outside).abs().amax(1), 2 - 1 / norm)
    torch.testing.assert_close(torch.nn.functional.normalize(contract(outside)), torch.nn.functional.normalize(outside))


@pytest.mark.parametrize("scale", [0.5, 3.0, 50.0])
def test_contract_jacobian_equals_finite_differences(scale):
    x = points(40, scale).requires_grad_()
    assert torch.autograd.gradcheck(contract, x, eps=1e-6 * scale, atol=1e-7)


@pytest.mark.parametrize("scale", [0.3, 2.0, 1e3])
def test_uncontract_inverts_contract(scale):
    x = points(scale=scale)
    torch.testing.assert_close(uncontract(contract(x)), x, rtol=1e-9, atol=0)
    y = 2 * torch.rand(100, 3, dtype=torch.float64) - 1
    torch.testing.assert_close(contract(uncontract(y)), y)
    assert uncontract(torch.ones(1, 3)).isfinite().all()


def some_rays(count=50, distance=2.5):
    directions = torch.nn.functional.normalize(points(count, seed=2).float(), dim=1)
    origins = distance * torch.nn.functional.normalize(points(count, seed=1).float(), dim=1)
    return Rays(origins, directions)


@pytest.mark.parametrize("distance", [0.2, 2.5, 40.0])
@pytest.mark.parametrize("seed", [None, 3])
def test_unbounded_sampling_steps_tile_the_ray_evenly_near_and_in_disparity_far(distance, seed):
    rays = some_rays(distance=distance)
    steps = UnboundedSampling(64).place_evenly(rays.origins, seed)
    assert torch.equal(steps.t_end[:, :-1], steps.t_start[:, 1:]) and (steps.t_end > steps.t_start).all()
    assert (steps.t_start[:, 0] > 0).all()
    torch.testing.assert_close(steps.t_end[:, -1], torch.full((50,), FAR_FACTOR * (distance + RADIUS)))
    if seed is None:
        disparity = (1 / steps.t_end[:, 48:]).diff(dim=1)
        torch.testing.assert_close(disparity, disparity[:, :1].expand_as(disparity), rtol=1e-2, atol=1e-7)
        even = (steps.t_end - steps.t_start)[:, 8:48]
        torch.testing.assert_close(even, even[:, :1].expand_as(even), rtol=1e-3, atol=0)


def test_unbounded_sampling_steps_gather_at_a_surface_and_still_tile_the_ray():
    rays, sampling = some_rays(), UnboundedSampling(64)

    def density(steps):
        middle = (steps.t_start + steps.t_end) / 2
        return 20.0 * ((middle > 2) & (middle < 2.4))

    steps, even = sampling(*rays, density, 5), sampling.place_evenly(rays.origins, 5)
    assert torch.equal(steps.t_end[:, :-1], steps.t_start[:, 1:]) and (steps.t_end >= steps.t_start).all()
    assert torch.equal(steps.t_start[:, 0], even.t_start[:, 0]) and torch.equal(steps.t_end[:, -1], even.t_end[:, -1])
    near_surface = ((steps.t_start > 1.9) & (steps.t_end < 2.5)).float().mean()
    assert near_surface > 0.6


def test_render_unbounded_scene_sees_a_distant_wall_behind_a_ball():
    def scene(positions, directions):
        ball, wall = positions.norm(dim=1) < 0.5, positions[:, 0].abs() > 30
        return 100.0 * (ball | wall), torch.stack([ball, wall, wall], 1).float()

    origins = torch.tensor([[-3.0, 0.0, 0.0], [-3.0, 0.0, 2.0]])
    rays = Rays(origins, torch.tensor([[1.0, 0.0, 0.0]]).expand(2, 3))
    rendered = render(scene, rays, UnboundedSampling(256))
    torch.testing.assert_close(rendered.color, torch.tensor([[1.0, 0, 0], [0, 1, 1]]), atol=1e-3, rtol=0)
    torch.testing.assert_close(rendered.depth, torch.tensor([2.5, 33.0]), atol=0, rtol=0.03)
