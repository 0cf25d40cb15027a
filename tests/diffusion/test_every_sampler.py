"""Every sampler on every schedule, with every prediction, against closed forms: moments, weights, orders."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from factorkit.diffusion.samplers import SAMPLERS, count_evaluations, evenly_spaced_times, snr_spaced_times
from factorkit.diffusion.schedule import PREDICTIONS, SCHEDULES, Schedule
from factorkit.utils.errors import ConfigError
from tests.diffusion.closed_forms import Gaussian, TwoPoints, draw, moments

PAIRS = [(p, s) for p in PREDICTIONS for s in SCHEDULES if (p, s) != ("eps", "flow")]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("prediction", "kind"), PAIRS)
def test_sample_gaussian_data_has_its_moments(sampler, prediction, kind):
    model = Gaussian(Schedule(200, kind), 0.3, 0.4, prediction)
    # ancestral sampling needs all of its small steps; what its strides do instead is computed below
    steps = None if sampler == "ddpm" else 100
    images = draw(model, (1, 1, 100, 100), sampler=sampler, steps=steps, seed=1).images
    assert moments(images) == pytest.approx((0.3, 0.4), abs=0.016)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_strided_ddpm_step_has_posterior_mean_and_variance(kind):
    """q(x_r | x_t, x_0) is Gaussian with precision 1/s_r^2 + (a_t/a_r)^2 / v, v = s_t^2 - (a_t/a_r)^2 s_r^2 being the
    variance of x_t given x_r: Bayes' rule. A linear denoiser makes the moments a recursion.
    """
    mu, sd, schedule = 0.3, 0.5, Schedule(1000, kind)
    model = Gaussian(schedule, mu, sd)
    images = draw(model, sampler="ddpm", steps=12, seed=4).images

    a, s = (table[model.calls].tolist() for table in (schedule.signals, schedule.sigmas))
    mean, variance = 0.0, s[0] ** 2
    for i, (a_t, s_t) in enumerate(zip(a, s, strict=True)):
        slope = a_t * sd**2 / (a_t**2 * sd**2 + s_t**2)  # of E[x0 | x_t] in x_t
        offset = mu * (1 - slope * a_t)
        if i + 1 == len(a):
            mean, variance = slope * mean + offset, slope**2 * variance
            break
        ratio = a_t / a[i + 1]
        given = s_t**2 - (ratio * s[i + 1]) ** 2
        spread = 1 / (1 / s[i + 1] ** 2 + ratio**2 / given)
        of_x0, of_x = spread * a[i + 1] / s[i + 1] ** 2, spread * ratio / given
        mean = (of_x0 * slope + of_x) * mean + of_x0 * offset
        variance = (of_x0 * slope + of_x) ** 2 * variance + spread
    assert moments(images) == pytest.approx((mean, math.sqrt(variance)), abs=0.006)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("prediction", "kind"), PAIRS)
def test_sample_two_points_keeps_their_proportions(sampler, prediction, kind):
    model = TwoPoints(Schedule(200, kind), 0.6, 0.25, prediction)
    images = draw(model, (1, 1, 96, 96), sampler=sampler, steps=40, seed=3, clip=True).images
    assert ((images.abs() - 0.6).abs() < 0.05).float().mean() > 0.97
    assert (images > 0).float().mean().item() == pytest.approx(0.25, abs=0.03)


def flow_error(sampler: str, kind: str, steps: int, length: int) -> float:
    """The greatest distance from the flow of probability at the last time above the clean image."""
    model = Gaussian(Schedule(length, kind), 0.4, 0.25, "v")
    start = torch.linspace(-2, 2, 16).view(1, 1, 4, 4)
    last = draw(model, start.shape, sampler=sampler, steps=steps, x_start=start, trajectory=True).trajectory[-1]
    return (last.x_t - model.flow(start, length - 1, last.t)).abs().max().item()


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("heun", 2), ("dpm++", 2)])
def test_sampler_error_decreases_with_its_order(kind, sampler, order):
    few, many = 32, 128  # of so many times that rounding them to whole ones does not show
    errors = [flow_error(sampler, kind, steps, 16384) for steps in (few, many)]
    measured = math.log(errors[0] / errors[1]) / math.log(many / few)
    assert order - 0.25 < measured < order + 0.6, errors


def test_heun_equals_the_trapezoid_rule():
    """On the straight path, where the velocity is linear in x: x' = x + h (u + u') / 2, the last stride Euler's."""
    model = Gaussian(Schedule(4, "flow"), 0.4, 0.25, "flow")
    x = torch.tensor([[[[1.5]]]])

    def velocity(x: float, tau: float) -> float:
        a, var = 1 - tau, ((1 - tau) * 0.25) ** 2 + tau**2
        x0 = 0.4 + a * 0.25**2 / var * (x - a * 0.4)
        return (x - a * x0) / tau - x0

    value = x.item()
    for tau in (1.0, 0.75, 0.5):
        guess = value - 0.25 * velocity(value, tau)
        value -= 0.25 * (velocity(value, tau) + velocity(guess, tau - 0.25)) / 2
    value -= 0.25 * velocity(value, 0.25)
    images = draw(model, x.shape, sampler="heun", x_start=x).images
    assert images.item() == pytest.approx(value, abs=1e-5)
    assert model.calls == [3, 2, 2, 1, 1, 0, 0] and len(model.calls) == count_evaluations("heun", 4)


def test_dpm_solver_equals_the_published_update():
    """Their algorithm 2, written as there in lambda = log(a / s), h and r."""
    schedule = Schedule(100, "cosine")
    model = Gaussian(schedule, -0.2, 0.5, "v")
    x = torch.tensor([[[[0.7, -1.2]]]])
    walk = draw(model, x.shape, sampler="dpm++", steps=4, x_start=x, trajectory=True).trajectory
    a, s = schedule.signals, schedule.sigmas
    lam = torch.log(a / s)
    value, estimates = x.double(), []
    for i, step in enumerate(walk[:-1]):
        t, then = step.t, walk[i + 1].t
        estimates.append(model.posterior_mean(value, a[t], s[t]))
        h, mixed = lam[then] - lam[t], estimates[-1]
        if i:
            r = (lam[t] - lam[walk[i - 1].t]) / h
            mixed = (1 + 1 / (2 * r)) * estimates[-1] - 1 / (2 * r) * estimates[-2]
        value = s[then] / s[t] * value - a[then] * torch.expm1(-h) * mixed
        torch.testing.assert_close(walk[i + 1].x_t.double(), value, rtol=0, atol=2e-5)


def test_ddim_flow_schedule_equals_euler_steps():
    model = Gaussian(Schedule(10, "flow"), 0.4, 0.25, "flow")
    walk = draw(model, (1, 1, 2, 2), sampler="ddim", steps=5, seed=1, trajectory=True).trajectory
    assert [step.t for step in walk] == [9, 7, 5, 3, 1]  # tau = 1, .8, .6, .4, .2
    for now, then in itertools.pairwise(walk):
        velocity = model(now.x_t, torch.tensor([now.t])).prediction
        torch.testing.assert_close(then.x_t, now.x_t - 0.2 * velocity, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_count_evaluations_equals_network_calls(sampler):
    for steps in (1, 2, 9):
        model = Gaussian(Schedule(30), 0.1, 0.5)
        draw(model, (1, 1, 2, 2), sampler=sampler, steps=steps)
        assert len(model.calls) == count_evaluations(sampler, steps)


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("grid", [evenly_spaced_times, snr_spaced_times])
@pytest.mark.parametrize(("length", "start"), [(1000, 1000), (1000, 600), (50, 50), (21, 20)])
def test_sampling_times_are_distinct_and_decreasing(kind, grid, length, start):
    schedule = Schedule(length, kind)
    for steps in {1, 2, 3, 10, start // 2, start - 1, start}:
        times = grid(schedule, start, steps)
        assert len(times) == steps and times[0] == start - 1
        assert all(a > b >= 0 for a, b in itertools.pairwise(times))
        if kind != "flow" and steps > 1:
            assert times[-1] == 0
    assert grid(schedule, start, start) == list(range(start - 1, -1, -1))


def test_snr_spaced_times_long_schedule_has_even_strides():
    schedule = Schedule(1000)
    times = snr_spaced_times(schedule, 1000, 10)
    log_snr = torch.log(schedule.signals / schedule.sigmas)[times]
    strides = log_snr.diff()
    assert (strides / strides.mean() - 1).abs().max() < 0.08


def test_sample_invalid_arguments_raise():
    model = Gaussian(Schedule(50, "flow"), 0.0, 0.5, "eps")
    with pytest.raises(ConfigError, match=r"'eps'.*'flow'"):
        draw(model, (1, 1, 2, 2), sampler="heun")
