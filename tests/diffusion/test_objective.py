from __future__ import annotations

import pytest
import torch

from factorkit.diffusion.objective import (
    PREDICTIONS,
    check_objective,
    coarse_to_fine_power,
    denoising_loss,
    loss_weight,
    min_snr_weight,
    to_eps,
    to_x0,
    training_target,
)
from factorkit.diffusion.schedule import Schedule
from factorkit.utils.errors import ConfigError


@pytest.fixture(params=["linear", "cosine", "flow"])
def noised(request):
    torch.manual_seed(0)
    schedule, t = Schedule(kind=request.param), torch.tensor([1, 300, 700, 950])
    x0, eps = torch.rand(4, 3, 5, 7) * 2 - 1, torch.randn(4, 3, 5, 7)
    return schedule, x0, eps, t, schedule.noise(x0, eps, t)


def test_training_target_equals_published_definitions(noised):
    schedule, x0, eps, t, _ = noised
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
def test_to_x0_and_to_eps_perfect_output_recovers_both(noised, prediction):
    schedule, x0, eps, t, x_t = noised
    out = training_target(prediction, schedule, x0, eps, t)
    torch.testing.assert_close(to_x0(prediction, schedule, x_t, out, t), x0, rtol=0, atol=1e-4)
    torch.testing.assert_close(to_eps(prediction, schedule, x_t, out, t), eps, rtol=0, atol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_to_x0_and_to_eps_any_output_recombine_to_x_t(noised, prediction):
    schedule, _, _, t, x_t = noised
    out = torch.randn_like(x_t)
    x0, eps = (f(prediction, schedule, x_t, out, t) for f in (to_x0, to_eps))
    torch.testing.assert_close(schedule.noise(x0, eps, t), x_t, rtol=1e-4, atol=1e-4)


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
def test_min_snr_weight_gives_equal_x0_weight_for_all_predictions(noised, prediction):
    schedule, x0, eps, t, x_t = noised
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


def test_objective_invalid_arguments_raise(noised):
    schedule, x0, eps, t, _ = noised
    with pytest.raises(ConfigError, match=r"'score'.*eps, v, x0, flow"):
        training_target("score", schedule, x0, eps, t)
    with pytest.raises(ConfigError, match=r"step 10.*step 20"):
        coarse_to_fine_power(0, 20, 10)
    with pytest.raises(ConfigError, match=r"'eps'.*'flow'.*pure noise"):
        check_objective("eps", "flow")
    for kind in ("linear", "cosine", "flow"):
        for prediction in ("v", "x0", "flow"):
            check_objective(prediction, kind)
