from __future__ import annotations

import math

import pytest
import torch

from factorkit.diffusion.schedule import Schedule
from factorkit.utils.errors import ConfigError


def test_alpha_bar_linear_equals_product_of_one_minus_beta():
    schedule, product = Schedule(), 1.0
    expected = []
    for t in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
        expected.append(product)
    got = schedule.alpha_bar(torch.arange(1000)).flatten().double()
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)
    assert schedule.alpha_bar(torch.tensor([3, 5])).shape == (2, 1, 1, 1)


def test_noise_first_level_is_exact():
    # 1 - ab_0 is 1e-4; taken from a float32 ab it would be wrong in the fourth digit.
    t = torch.tensor([0])
    assert Schedule().sigma(t).item() == pytest.approx(math.sqrt(1e-4), rel=1e-6)
    assert Schedule().signal(t).item() == pytest.approx(math.sqrt(1 - 1e-4), rel=1e-6)


def test_noise_mixes_per_image_with_unit_variance():
    schedule = Schedule(100)
    t = torch.tensor([0, 50, 99])
    torch.testing.assert_close(schedule.signal(t) ** 2 + schedule.sigma(t) ** 2, torch.ones(3, 1, 1, 1))
    x0, eps = torch.full((3, 3, 2, 2), 2.0), torch.full((3, 3, 2, 2), 5.0)
    x_t = schedule.noise(x0, eps, t)
    for i in range(3):
        ab = schedule.alpha_bars[t[i]].item()
        torch.testing.assert_close(x_t[i], torch.full((3, 2, 2), 2 * math.sqrt(ab) + 5 * math.sqrt(1 - ab)))


@pytest.mark.parametrize("steps", [50, 100, 4000])
def test_linear_schedule_any_length_ends_at_the_same_noise(steps):
    reference, other = Schedule().alpha_bars, Schedule(steps).alpha_bars
    assert 0.2 < math.log(other[-1]) / math.log(reference[-1]) < 2
    # Half way the scaled schedules have nearly the same level: sums of beta agree, the rest is second order in beta.
    assert other[steps // 2].item() == pytest.approx(reference[500].item(), abs=0.03)
    assert (other.diff() < 0).all()


def test_schedule_invalid_arguments_raise():
    with pytest.raises(ConfigError, match="20 steps"):
        Schedule(20)
    with pytest.raises(ConfigError, match=r"'exponential'.*linear, cosine, flow"):
        Schedule(kind="exponential")
    with pytest.raises(ConfigError, match="0 steps"):
        Schedule(0, "flow")
    assert (Schedule(21).alpha_bars > 0).all()


@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_cosine_schedule_equals_published_formula(steps):
    left = lambda t: math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2  # noqa: E731
    got = Schedule(steps, "cosine").alpha_bars
    # up to the last time, which alone is kept from having no signal at all, alpha_bar is the ratio they give
    expected = [left(t + 1) / left(0) for t in range(steps - 1)]
    torch.testing.assert_close(got[:-1], torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)
    before = got[-2] if steps > 1 else 1.0
    assert 0 < got[-1] <= 1.001e-3 * before


@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_flow_schedule_is_linear(steps):
    schedule = Schedule(steps, "flow")
    torch.testing.assert_close(schedule.signals + schedule.sigmas, torch.ones(steps, dtype=torch.float64))
    assert schedule.sigmas[0] == 1 / steps and schedule.signals[-1] == 0
    x0, eps, t = torch.full((1, 1, 1, 1), 3.0), torch.full((1, 1, 1, 1), -1.0), torch.tensor([steps // 2])
    tau = (steps // 2 + 1) / steps
    assert schedule.noise(x0, eps, t).item() == pytest.approx(3 * (1 - tau) - tau)


@pytest.mark.parametrize("kind", ["linear", "cosine", "flow"])
def test_find_time_as_noisy_returns_equal_snr(kind):
    reference, schedule = Schedule(), Schedule(kind=kind)
    for t in (0, 30, 600, 998):
        found = schedule.find_matching_time(t, reference)
        ratio = schedule.sigmas[found] / schedule.signals[found]
        wanted = reference.sigmas[t] / reference.signals[t]
        neighbours = (schedule.sigmas / schedule.signals)[[max(found - 1, 0), min(found + 1, 999)]]
        assert neighbours[0] <= wanted * 1.0001 or found == 0
        assert ratio / wanted == pytest.approx(1, abs=0.1) or found == 0
        if kind == "linear":
            assert found == t
