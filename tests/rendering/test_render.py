"""render against closed forms, dense against packed, chunks against the whole, and its normals."""

from __future__ import annotations

import math

import pytest
import torch

import factorkit
from factorkit.rendering import (
    OccupancyGrid,
    OccupancySampling,
    Rays,
    UniformSampling,
    image_rays,
    intrinsics_from_fov,
    look_at,
    render,
)

LOWER, UPPER = (-1.0, -1.0, -1.0), (1.0, 1.0, 1.0)


def fog(positions, directions):
    """Density 0.7 everywhere, radiance that tells the direction."""
    return torch.full_like(positions[:, 0], 0.7), directions


def ball(positions, directions):
    """A soft ball of radius 0.6, coloured by place."""
    depth = 0.6 - positions.norm(dim=1)
    return 200 * torch.sigmoid(40 * depth), 0.5 + positions / 2


def view(height=6, width=8, dtype=torch.float64):
    eye, target = torch.tensor([2.5, 1.5, 1.0]), torch.tensor([0.05, 0.0, 0.1])
    pose = look_at(eye, target, torch.tensor([0.0, 0, 1])).to(dtype)
    return image_rays(pose, intrinsics_from_fov(45.0, height, width).to(dtype), height, width)


def samplings(resolution=32, **changes):
    yield UniformSampling(LOWER, UPPER, num_samples=400)
    yield OccupancySampling(OccupancyGrid(LOWER, UPPER, resolution=resolution), step=0.005, **changes)


@pytest.mark.parametrize("sampling", list(samplings()), ids=["even", "occupied"])
def test_render_uniform_density_follows_beer_lambert(sampling):
    origins = torch.tensor([[-3.0, 0.2, 0.1], [0.0, 0.0, 0.0], [-3.0, 5.0, 0.0]], dtype=torch.float64)
    directions = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.6, 0.8], [1.0, 0.0, 0.0]], dtype=torch.float64)
    background = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    seen = render(fog, Rays(origins, directions), sampling, background=background)
    near, length = torch.tensor([2.0, 0, 0]).double(), torch.tensor([2.0, 1.25, 0]).double()
    left = torch.exp(-0.7 * length)
    close = {"rtol": 0, "atol": 3e-3}  # the march's first and last steps may overlap the box's faces by half a step
    torch.testing.assert_close(seen.opacity, 1 - left, **close)
    torch.testing.assert_close(seen.color, (1 - left)[:, None] * directions + left[:, None] * background, **close)
    depth = near * (1 - left) + (1 - left * (1 + 0.7 * length)) / 0.7
    torch.testing.assert_close(seen.depth, depth, rtol=0, atol=6e-3)


def test_occupancy_sampling_equals_uniform_with_fewer_samples():
    grid = OccupancyGrid(LOWER, UPPER, resolution=32, threshold=1e-3)
    for _ in range(8):
        grid.update(lambda points: ball(points, points)[0])
    rays = view()
    even = render(ball, rays, UniformSampling(LOWER, UPPER, num_samples=800), normals=True)
    packed = render(ball, rays, OccupancySampling(grid, step=0.003), normals=True)
    for name in ("color", "depth", "opacity", "normals"):
        torch.testing.assert_close(getattr(packed, name), getattr(even, name), rtol=0, atol=1e-2)
    assert packed.opacity.max() > 0.99 and packed.num_steps < 0.7 * even.num_steps


def test_uniform_sampling_fine_samples_lie_on_the_surface():
    def hard_ball(p, d):
        return 3000 * (p.norm(dim=1) < 0.6).to(p), p

    def error(**counts):
        return (render(hard_ball, rays, UniformSampling(LOWER, UPPER, **counts)).depth - exact.depth).abs().mean()

    rays = view()
    exact = render(hard_ball, rays, UniformSampling(LOWER, UPPER, num_samples=10_000))

    assert error(num_samples=48, num_fine_samples=48) < 0.6 * error(num_samples=96)
    counts = [render(hard_ball, rays, UniformSampling(LOWER, UPPER, 48, more)).num_steps for more in (0, 48)]
    assert counts == [6 * 8 * 48, 6 * 8 * 96]


def test_render_normals_of_a_ball_point_outwards():
    rays = Rays(torch.tensor([[0.0, 0.1, 3.0]]), torch.tensor([[0.0, 0.0, -1.0]]))
    seen = render(ball, rays, UniformSampling(LOWER, UPPER, num_samples=500), normals=True, background=torch.ones(3))
    surface = torch.tensor([0, 0.1, math.sqrt(0.36 - 0.01)]) / 0.6
    torch.testing.assert_close(seen.normals[0], surface, rtol=0, atol=2e-2)
    torch.testing.assert_close(seen.color[0], torch.tensor([0.5, 0.55, 0.8]), rtol=0, atol=0.03)
    with torch.no_grad():
        again = render(
            ball, rays, UniformSampling(LOWER, UPPER, num_samples=500), normals=True, background=torch.ones(3)
        )
    torch.testing.assert_close(again.normals, seen.normals.detach())
    assert not again.normals.requires_grad
    with pytest.raises(ValueError, match="channels"):  # 30 channels leave no room for the normals
        render(lambda p, d: (p[:, 0] * 0, p[:, :1].expand(-1, 30)), rays, UniformSampling(LOWER, UPPER), normals=True)


@pytest.mark.slow
def test_render_normal_loss_trains_the_field():
    radius = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    squash = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)
    rays, sampling = view(), UniformSampling(LOWER, UPPER, num_samples=60)

    def run(radius, squash):
        stretch = torch.stack([squash, torch.ones_like(squash), torch.ones_like(squash)])
        field = lambda p, d: (20 * torch.sigmoid(8 * (radius - (p * stretch).norm(dim=1))), p)  # noqa: E731
        return render(field, rays, sampling, normals=True).normals

    assert torch.autograd.gradcheck(run, (radius, squash))


@pytest.mark.parametrize("sampling", list(samplings()), ids=["even", "occupied"])
def test_render_chunks_equal_the_whole_without_gradient(sampling):
    rays = view(dtype=torch.float32)
    gain = torch.tensor(2.0, requires_grad=True)
    field = lambda p, d: (gain * ball(p, d)[0], ball(p, d)[1])  # noqa: E731
    background = torch.rand(6, 8, 3)
    whole = render(field, rays, sampling, background=background, normals=True, distortion=True)
    parts = render(field, rays, sampling, background=background, normals=True, distortion=True, chunk=7)
    assert whole.color.requires_grad and not parts.color.requires_grad
    assert whole.color.shape == (6, 8, 3) and whole.depth.shape == whole.opacity.shape == (6, 8)
    assert whole.num_steps == parts.num_steps
    for name in ("color", "depth", "opacity", "normals", "distortion"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampling", list(samplings()), ids=["even", "occupied"])
def test_render_jitter_is_a_function_of_the_seed(sampling):
    rays = view()
    one, same, other, still = (render(ball, rays, sampling, seed=s).depth for s in (1, 1, 2, None))
    assert torch.equal(one, same) and not torch.equal(one, other) and not torch.equal(one, still)
    torch.testing.assert_close(one, still, rtol=0, atol=2e-2)


@pytest.mark.parametrize(
    "sampling",
    [*samplings(), UniformSampling(LOWER, UPPER, num_samples=20, num_fine_samples=7)],
    ids=["even", "occupied", "finer"],
)
def test_render_first_ray_makes_parts_equal_the_whole(sampling):
    """A batch is shared by processes; what each step's jitter is must not depend on by how many."""
    rays = Rays(*(x.reshape(-1, 3) for x in view()))
    whole = render(ball, rays, sampling, seed=5)
    parts = [
        render(ball, Rays(*(x[rows] for x in rays)), sampling, seed=5, first_ray=rows.start)
        for rows in (slice(0, 17), slice(17, 40), slice(40, 48))
    ]
    assert torch.equal(torch.cat([part.color for part in parts]), whole.color)
    assert torch.equal(torch.cat([part.depth for part in parts]), whole.depth)
    assert sum(part.num_steps for part in parts) == whole.num_steps
    again = render(ball, Rays(*(x[17:40] for x in rays)), sampling, seed=5)
    assert not torch.equal(again.color, parts[1].color)


@pytest.mark.parametrize("sampling", list(samplings()), ids=["even", "occupied"])
def test_render_one_zero_or_missing_rays_work(sampling):
    rays = view()
    many, one = render(ball, rays, sampling), render(ball, Rays(*(x[3, 4] for x in rays)), sampling, chunk=5)
    assert one.color.shape == (3,) and one.depth.shape == () and one.opacity > 0.5
    torch.testing.assert_close(tuple(one[:3]), tuple(x[3, 4] for x in many[:3]))
    none = render(ball, Rays(torch.zeros(0, 3), torch.zeros(0, 3)), sampling, chunk=4, background=torch.ones(3))
    assert none.color.shape == (0, 3) and none.depth.shape == (0,)
    away = Rays(torch.full((2, 3), 5.0), torch.nn.functional.normalize(torch.ones(2, 3), dim=1))
    seen = render(ball, away, sampling, background=torch.tensor([0.1, 0.2, 0.3]), normals=True)
    torch.testing.assert_close(seen.color, torch.tensor([[0.1, 0.2, 0.3]] * 2))
    assert (seen.opacity == 0).all() and (seen.normals == 0).all()


def test_occupancy_sampling_capacity_truncates_and_reports_count():
    full, cut = (list(samplings(capacity=capacity))[1] for capacity in (None, 1000))
    seen, short = (render(fog, view(), sampling) for sampling in (full, cut))
    assert seen.num_steps == short.num_steps > 1000
    assert short.opacity[0].sum() > 0 and short.opacity[-1].sum() == 0


def test_render_is_exported_by_factorkit():
    assert factorkit.render is render


def test_render_invalid_arguments_raise():
    rays, sampling = view(), UniformSampling(LOWER, UPPER)
    with pytest.raises(ValueError, match=r"density \(6144, 2\) and radiance \(6144, 3\) for 6144 points"):
        render(lambda p, d: (p[:, :2], p), rays, sampling)
    with pytest.raises(ValueError, match="chunk=0; give the number of rays"):
        render(fog, rays, sampling, chunk=0)
    with pytest.raises(ValueError, match=r"two tensors .* of one shape"):
        render(fog, Rays(rays.origins[0], rays.directions), sampling)


@pytest.mark.parametrize("sampling", list(samplings()), ids=["even", "occupied"])
def test_render_from_far_away_in_single_precision_equals_double_precision(sampling):
    torch.manual_seed(0)
    target = torch.rand(40, 3).double() * 1.6 - 0.8
    directions = torch.nn.functional.normalize(torch.randn(40, 3), dim=1) * 2
    origins = (target - 1e6 * directions.double()).float()
    got = render(ball, Rays(origins, directions), sampling)
    want = render(ball, Rays(origins.double(), directions.double()), sampling)
    assert (want.opacity > 0.9).sum() > 10
    torch.testing.assert_close(got.opacity.double(), want.opacity, rtol=0, atol=5e-3)
    torch.testing.assert_close(got.color.double(), want.color, rtol=0, atol=5e-3)
    torch.testing.assert_close(got.depth.double() / 1e6, want.depth / 1e6, rtol=0, atol=5e-3)
