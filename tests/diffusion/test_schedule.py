from __future__ import annotations

import math

import pytest
import torch

from factorkit.diffusion.schedule import (
    PREDICTIONS,
    Schedule,
    check_objective,
    coarse_to_fine_power,
    denoising_loss,
    loss_weight,
    min_snr_weight,
    to_x0,
    training_target,
)
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


@pytest.fixture(params=["linear", "cosine", "flow"])
def noisy_batch(request):
    torch.manual_seed(0)
    schedule, t = Schedule(kind=request.param), torch.tensor([1, 300, 700, 950])
    x0, eps = torch.rand(4, 3, 5, 7) * 2 - 1, torch.randn(4, 3, 5, 7)
    return schedule, x0, eps, t, schedule.noise(x0, eps, t)


def test_training_target_equals_published_definitions(noisy_batch):
    schedule, x0, eps, t, _ = noisy_batch
    a, s = schedule.signal(t), schedule.sigma(t)
    torch.testing.assert_close(training_target("eps", schedule, x0, eps, t), eps)
    torch.testing.assert_close(training_target("v", schedule, x0, eps, t), a * eps - s * x0)
    torch.testing.assert_close(training_target("x0", schedule, x0, eps, t), x0)
    torch.testing.assert_close(training_target("flow", schedule, x0, eps, t), eps - x0)


def test_training_target_flow_is_the_path_velocity():
    schedule = Schedule(1000, "flow")
    x0, eps = torch.rand(1, 3, 2, 2, dtype=torch.float64), torch.randn(1, 3, 2, 2, dtype=torch.float64)
    later, now = (schedule.signals[t] * x0 + schedule.sigmas[t] * eps for t in (401, 400))
    velocity = (later - now) / (schedule.sigmas[401] - schedule.sigmas[400])
    torch.testing.assert_close(training_target("flow", schedule, x0, eps, torch.tensor([400])), velocity)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_to_x0_perfect_output_recovers_the_clean_image(noisy_batch, prediction):
    schedule, x0, eps, t, x_t = noisy_batch
    out = training_target(prediction, schedule, x0, eps, t)
    torch.testing.assert_close(to_x0(prediction, schedule, x_t, out, t), x0, rtol=0, atol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_to_x0_any_output_is_that_of_the_clean_image(noisy_batch, prediction):
    schedule, _, _, t, x_t = noisy_batch
    out = torch.randn_like(x_t)
    x0 = to_x0(prediction, schedule, x_t, out, t)
    eps = (x_t - schedule.signal(t) * x0) / schedule.sigma(t)
    torch.testing.assert_close(training_target(prediction, schedule, x0, eps, t), out, rtol=1e-3, atol=1e-3)


def test_denoising_loss_half_precision_is_float32_mean_per_sample():
    out = torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16)
    loss = denoising_loss(out, torch.stack([torch.full((3, 4, 4), 0.1), torch.full((3, 4, 4), 3.0)]))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.tensor([0.01, 9.0]))


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weight_equals_published_formulas(kind, gamma):
    schedule, t = Schedule(kind=kind), torch.tensor([0, 20, 250, 600, 990])
    ab = schedule.alpha_bars[t]
    snr = ab / (1 - ab)
    capped = snr.clamp_max(gamma)
    for prediction, weight in {"x0": capped, "eps": capped / snr, "v": capped / (snr + 1)}.items():
        found = min_snr_weight(prediction, schedule, t, gamma).double()
        torch.testing.assert_close(found, weight, rtol=1e-4, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weight_gives_equal_x0_weight_for_all_predictions(noisy_batch, prediction):
    schedule, x0, eps, t, x_t = noisy_batch
    out = training_target(prediction, schedule, x0, eps, t)
    wrong = out + 0.1 * torch.randn_like(out)
    error = denoising_loss(to_x0(prediction, schedule, x_t, wrong, t), to_x0(prediction, schedule, x_t, out, t))
    snr = (schedule.signals[t] / schedule.sigmas[t]).square().float()
    weighted = min_snr_weight(prediction, schedule, t, 5.0) * denoising_loss(wrong, out)
    torch.testing.assert_close(weighted, snr.clamp_max(5) * error, rtol=2e-3, atol=0)


def test_min_snr_weight_pure_noise_is_zero():
    schedule = Schedule(10, "flow")
    assert min_snr_weight("flow", schedule, torch.tensor([9])).tolist() == [0]


def test_coarse_to_fine_power_decreases_linearly():
    schedule, t = Schedule(), torch.tensor([0, 999])
    ab = schedule.alpha_bars[t].float()
    torch.testing.assert_close(loss_weight(schedule, t, 1.0), 1 - ab, rtol=1e-3, atol=0)
    torch.testing.assert_close(loss_weight(schedule, t, 0.5), (1 - ab).sqrt(), rtol=1e-3, atol=0)
    assert loss_weight(schedule, t, torch.tensor(0.0)).tolist() == [1, 1]
    assert [coarse_to_fine_power(step, 50, 150) for step in (0, 50, 75, 100, 150, 9999)] == [1, 1, 0.75, 0.5, 0, 0]
    assert [coarse_to_fine_power(step, 0, 0) for step in (0, 1)] == [0, 0]


def test_objective_invalid_arguments_raise(noisy_batch):
    schedule, x0, eps, t, _ = noisy_batch
    with pytest.raises(ConfigError, match=r"'score'.*eps, v, x0, flow"):
        training_target("score", schedule, x0, eps, t)
    with pytest.raises(ConfigError, match=r"step 10.*step 20"):
        coarse_to_fine_power(0, 20, 10)
    with pytest.raises(ConfigError, match=r"'eps'.*'flow'.*pure noise"):
        check_objective("eps", "flow")
    for kind in ("linear", "cosine", "flow"):
        for prediction in ("v", "x0", "flow"):
            check_objective(prediction, kind)
