"""Samplers against distributions whose optimal denoiser, and so whose sampling process, is known in closed form."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from factorkit.diffusion.schedule import Schedule
from factorkit.utils.errors import ConfigError
from tests.diffusion.closed_forms import Gaussian, TwoPoints, draw, moments


@pytest.mark.parametrize(("mu", "sd"), [(0.3, 0.2), (-0.5, 1.5)])
def test_ddim_gaussian_data_follows_the_probability_flow(mu, sd):
    """The flow carries x_T to mu + sd (x_T - a_T mu) / sqrt(a_T^2 sd^2 + s_T^2): quantiles go to quantiles."""
    model = Gaussian(Schedule(), mu, sd)
    start = torch.linspace(-3, 3, 8).view(1, 1, 2, 4)
    a, s = (math.sqrt(v) for v in (model.schedule.alpha_bars[-1], 1 - model.schedule.alpha_bars[-1]))
    exact = mu + sd * (start - a * mu) / math.sqrt((a * sd) ** 2 + s**2)

    def error(steps: int) -> float:
        images = draw(model, start.shape, sampler="ddim", steps=steps, x_start=start).images
        return ((images - exact).abs().max() / sd).item()

    assert error(1000) < 0.03
    assert 2.5 < error(125) / error(500) < 6  # a method of first order


def test_ddim_few_steps_equal_the_affine_map():
    """One step multiplies x - a mu by (a' a sd^2 + s' s) / (a^2 sd^2 + s^2); the grid is even and has both ends."""
    mu, sd, schedule = 0.4, 0.3, Schedule()
    model = Gaussian(schedule, mu, sd)
    start = torch.tensor([-2.0, 0.1, 1.0]).view(3, 1, 1, 1)
    result = draw(model, start.shape, sampler="ddim", steps=5, t_start=601, x_start=start, trajectory=True)
    assert model.calls == [600, 450, 300, 150, 0] == [step.t for step in result.trajectory]
    levels = [schedule.alpha_bars[t].item() for t in model.calls] + [1.0]
    x = start.double()
    for ab, ab_next in itertools.pairwise(levels):
        a, s, a_next, s_next = math.sqrt(ab), math.sqrt(1 - ab), math.sqrt(ab_next), math.sqrt(1 - ab_next)
        factor = (a_next * a * sd**2 + s_next * s) / (a**2 * sd**2 + s**2)
        x = a_next * mu + factor * (x - a * mu)
    torch.testing.assert_close(result.images.double(), x, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_ddpm_unit_gaussian_keeps_its_variance():
    """For N(0, 1) pixels x_{t-1} given x_t has variance exactly beta_t (Ho et al. 2020, section 3.2), so every level
    has variance 1; the smaller posterior variance would lose 3% at 50 steps.
    """
    model = Gaussian(Schedule(50), 0.0, 1.0)
    result = draw(model, (1, 1, 400, 400), seed=1, trajectory=True)
    variances = [step.x_t.var().item() for step in result.trajectory]
    assert variances[1:] == pytest.approx([1.0] * 49, abs=0.02)
    assert result.images.var().item() == pytest.approx(model.schedule.alpha_bars[0].item(), abs=0.01)


@pytest.mark.slow
def test_ddpm_gaussian_data_has_its_moments():
    images = draw(Gaussian(Schedule(400), 0.3, 0.2), seed=2).images
    assert moments(images) == pytest.approx((0.3, 0.2), abs=0.01)


@pytest.mark.parametrize("options", [{"sampler": "ddpm"}, {"sampler": "ddpm", "steps": 50}, {"sampler": "ddim"}])
def test_sample_two_points_keeps_their_proportions(options):
    images = draw(TwoPoints(Schedule(200), 0.6, 0.25), (1, 1, 128, 128), seed=3, clip=True, **options).images
    assert ((images.abs() - 0.6).abs() < 0.05).float().mean() > 0.97
    assert (images > 0).float().mean().item() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_sample_eps_and_v_give_the_same_trajectory(sampler):
    schedule = Schedule(100)
    walks = [
        draw(Gaussian(schedule, 0.2, 0.4, name), (2, 3, 4, 4), sampler=sampler, trajectory=True, clip=True).trajectory
        for name in ("eps", "v")
    ]
    for one, other in zip(*walks, strict=True):
        torch.testing.assert_close(one.x_t, other.x_t, rtol=0, atol=2e-4)


def test_strided_ddpm_equals_ddim_at_eta_one():
    model = Gaussian(Schedule(), 0.0, 0.5)
    torch.testing.assert_close(
        draw(model, (1, 1, 8, 8), sampler="ddpm", steps=20, seed=5).images,
        draw(model, (1, 1, 8, 8), sampler="ddim", steps=20, seed=5, eta=1.0).images,
    )


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_eta_scales_the_fresh_noise(eta):
    """Song et al. 2021, eq. 12 and 16. Where all pixels are 0, x_t is noise: its variance must be that of the level
    whatever eta is, and what is left of the noise before tells sigma.
    """
    model = Gaussian(Schedule(), 0.0, 0.0)
    before, after, _ = draw(model, sampler="ddim", steps=3, eta=eta, trajectory=True).trajectory
    ab, ab_next = (model.schedule.alpha_bars[step.t].item() for step in (before, after))
    sigma = eta * math.sqrt((1 - ab_next) / (1 - ab) * (1 - ab / ab_next))
    kept = (before.x_t * after.x_t).mean() / before.x_t.square().mean()
    assert kept.item() == pytest.approx(math.sqrt((1 - ab_next - sigma**2) / (1 - ab)), abs=0.01)
    assert after.x_t.var().item() == pytest.approx(1 - ab_next, abs=0.02)


def test_sample_start_has_the_variance_of_its_level():
    schedule = Schedule()
    model = Gaussian(schedule, 0.0, 0.5)
    result = draw(model, sampler="ddim", steps=1, t_start=100, trajectory=True)
    (step,) = result.trajectory
    assert step.t == 99 and result.bottleneck == 99
    assert moments(step.x_t) == pytest.approx((0, math.sqrt(1 - schedule.alpha_bars[99])), abs=0.01)
    torch.testing.assert_close(result.images, step.x0)


def test_sample_same_seed_gives_same_images():
    model = Gaussian(Schedule(50), 0.0, 0.5)
    one, same, other = (draw(model, (2, 3, 4, 4), seed=seed).images for seed in (7, 7, 8))
    assert torch.equal(one, same) and not torch.equal(one, other)
    given = draw(model, (2, 3, 4, 4), generator=torch.Generator().manual_seed(7)).images
    assert torch.equal(one, given)


def test_sample_shared_noise_ignores_the_position_in_the_batch():
    """Every image of the batch goes the way it would go by itself; with noise of its own, none but the first does."""
    model = Gaussian(Schedule(50), 0.0, 0.5)
    start = torch.randn(1, 3, 4, 4).expand(3, -1, -1, -1)
    shared = draw(model, start.shape, x_start=start, shared_noise=True, seed=7).images
    alone = draw(model, (1, 3, 4, 4), x_start=start[:1], seed=7).images
    torch.testing.assert_close(shared, alone.expand(3, -1, -1, -1))
    assert not torch.allclose(draw(model, start.shape, x_start=start, seed=7).images[1], alone[0], atol=1e-2)
    noise = draw(model, (3, 3, 4, 4), shared_noise=True, seed=7).images
    torch.testing.assert_close(noise, draw(model, (1, 3, 4, 4), seed=7).images.expand(3, -1, -1, -1))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "heun", "dpm++"])
@pytest.mark.parametrize("start", [None, torch.linspace(-1, 1, 20).reshape(5, 1, 2, 2)])
def test_sample_rows_equal_those_of_the_whole_batch(sampler, start):
    model = Gaussian(Schedule(50), 0.0, 0.5)
    options = {"sampler": sampler, "steps": 5, "x_start": start, "seed": 7}
    everything = draw(model, (5, 1, 2, 2), **options).images
    for rows in (slice(0, 2), slice(2, 5), slice(4, 5)):
        assert torch.equal(draw(model, (5, 1, 2, 2), rows=rows, **options).images, everything[rows])


def test_sample_clip_bounds_every_estimate():
    result = draw(Gaussian(Schedule(50), 1.0, 0.5), (1, 1, 16, 16), clip=True, trajectory=True)
    assert max(step.x0.max().item() for step in result.trajectory) == 1.0 == result.images.max().item()
    assert draw(Gaussian(Schedule(50), 1.0, 0.5), (1, 1, 16, 16)).images.max() > 1.0


def test_sample_returns_last_bottleneck_without_gradient():
    model = Gaussian(Schedule(50), 0.0, 0.5)
    model.mu = torch.nn.Parameter(torch.zeros(()))
    result = draw(model, (1, 1, 2, 2), sampler="ddim", steps=3)
    assert result.bottleneck == 0 and result.trajectory is None and not result.images.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "rk4"}, "'rk4'.*ddpm.*heun"),
        ({"sampler": "heun", "eta": 0.5}, "eta.*'heun'"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 31, "t_start": 30}, "steps=31.*t_start=30"),
        ({"t_start": 51}, "t_start=51.*50"),
        ({"eta": 0.5}, "eta.*ddim"),
        ({"sampler": "ddim", "eta": 1.5}, "eta=1.5"),
        ({"x_start": torch.zeros(1, 1, 4, 4)}, r"\(1, 1, 4, 4\)"),
        ({"prediction": "score"}, "'score'"),
    ],
)
def test_sample_invalid_arguments_raise(options, message):
    with pytest.raises(ConfigError, match=message):
        draw(Gaussian(Schedule(50), 0.0, 0.5), (1, 1, 2, 2), **options)
