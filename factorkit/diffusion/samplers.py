"""Samplers: ancestral (DDPM), and of the probability flow (DDIM, Heun, DPM-Solver++)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from factorkit.diffusion.denoiser import Denoiser
from factorkit.diffusion.schedule import Schedule, check_objective, to_x0
from factorkit.utils.errors import ConfigError

SAMPLERS = ("ddpm", "ddim", "heun", "dpm++")
MIN_LOG_SNR = -5.0  # log(a / s) below which an image carries no information; a linear schedule ends there


class SamplingStep(NamedTuple):
    """One step of a trajectory: the input of the denoiser and its outputs."""

    t: int
    x_t: Tensor  #: [B, C, H, W]
    x0: Tensor  #: [B, C, H, W], the clean image as estimated from x_t
    bottleneck: Any


class Samples(NamedTuple):
    """Generated images [B, C, H, W], the bottleneck of the last step, and all steps, noise first, if requested."""

    images: Tensor
    bottleneck: Any
    trajectory: list[SamplingStep] | None


class NoiseLevel(NamedTuple):
    """The exact factors of x = signal x0 + sigma eps."""

    signal: float
    sigma: float

    @property
    def tau(self) -> float:
        """The position on the straight path: 0 is the clean image, 1 pure noise."""
        return self.sigma / (self.signal + self.sigma)

    @property
    def log_snr(self) -> float:
        """The value log(a / s), half the logarithm of SNR; -inf for pure noise."""
        return math.log(self.signal / self.sigma) if self.signal else -math.inf


class _State(NamedTuple):
    """A level of the trajectory with its image and the estimate of the clean image."""

    level: NoiseLevel
    x: Tensor
    x0: Tensor

    @property
    def eps(self) -> Tensor:
        return (self.x - self.level.signal * self.x0) / self.level.sigma

    @property
    def velocity(self) -> Tensor:
        """The derivative of x / (a + s) by tau: the velocity of flow matching."""
        return self.eps - self.x0


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    shape: Sequence[int],
    *,
    schedule: Schedule,
    prediction: str,
    sampler: str = "ddpm",
    steps: int | None = None,
    t_start: int | None = None,
    eta: float = 0.0,
    seed: int = 0,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    x_start: Tensor | None = None,
    shared_noise: bool = False,
    rows: slice | None = None,
    clip: bool = True,
    progress: bool = False,
    trajectory: bool = False,
) -> Samples:
    """Sample images of `shape` [B, C, H, W] in [-1, 1] from a denoiser trained with `schedule` and `prediction`.

    Every sampler works with every schedule and prediction, because outputs are first converted to x0 and eps.

    Args:
        denoiser: called as denoiser(x_t [B, C, H, W], t int64 [B]) -> (prediction, bottleneck); must be in eval mode.
        shape: of all images.
        schedule: of the training, on `device`.
        prediction: one of `objective.PREDICTIONS`.
        sampler: "ddpm" is ancestral (Ho et al. 2020, algorithm 2): over all times the noise has variance beta_t; with
            fewer `steps` each stride takes mean and variance of its own posterior q(x_r | x_t, x_0). "ddim" adds no
            noise at eta 0 (Song et al. 2021, eq. 12), is the Euler method of flow matching, and at eta 1 is strided
            "ddpm". "heun" corrects each Euler step but the last by the slope at its end (Karras et al. 2022, algorithm
            1): second order, two network calls a step. "dpm++" is DPM-Solver++(2M) (Lu et al. 2022, algorithm 2):
            second order from the previous step's estimate, one call a step.
        steps: number of strides from t_start - 1 down to the clean image; None: one for every time.
        t_start: for a model trained on times [0, t_start) only; None: the schedule's length.
        eta: share of fresh noise of "ddim", 0 to 1.
        seed: the same seed gives the same images on the same machine.
        generator: used instead of `seed`.
        device: None: the schedule's device.
        x_start: the initial image, at level t_start - 1; None: noise of that level's variance.
        shared_noise: use the same noise for every image, so that an image depends on its own start only.
        rows: compute only these images of the batch, with the noise of the whole; for processes that share the work.
        clip: clamp each estimate of the clean image to [-1, 1].
        trajectory: also return every step; all of them stay in memory.

    Raises:
        ConfigError: an unknown sampler or prediction, "eps" on a "flow" schedule, steps or t_start out of range, eta
            outside [0, 1] or with a sampler other than "ddim", or an x_start of another shape.
    """
    check_objective(prediction, schedule.kind)
    check_sampler(sampler, eta)
    t_start = schedule.steps if t_start is None else t_start
    times = sampling_times(schedule, sampler, t_start, steps)
    levels = [NoiseLevel(float(schedule.signals[t]), float(schedule.sigmas[t])) for t in times]
    device = torch.device(schedule.device if device is None else device)
    rows = slice(None) if rows is None else rows
    if generator is None:
        generator = torch.Generator(device).manual_seed(seed)

    def unit_noise() -> Tensor:
        noise_shape = (1 if shared_noise else shape[0], *shape[1:])
        noise = torch.randn(noise_shape, generator=generator, device=generator.device).to(device)
        return noise.expand(tuple(shape))[rows]

    def estimate(x: Tensor, t: int) -> tuple[Tensor, Any]:
        t_batch = torch.full((len(x),), t, dtype=torch.int64, device=device)
        out, bottleneck = denoiser(x, t_batch)
        x0 = to_x0(prediction, schedule, x, out.float(), t_batch)
        return (x0.clamp(-1, 1) if clip else x0), bottleneck

    if x_start is None:
        x = unit_noise() * levels[0].sigma
    elif tuple(x_start.shape) != tuple(shape):
        raise ConfigError(f"x_start has shape {tuple(x_start.shape)}; give the shape of the images, {tuple(shape)}")
    else:
        x = x_start[rows].to(device, torch.float32)

    full_chain = sampler == "ddpm" and len(times) == t_start
    history: list[SamplingStep] = []
    previous: _State | None = None
    for i, t in enumerate(tqdm(times, desc="sampling", disable=not progress)):
        x0, bottleneck = estimate(x, t)
        if trajectory:
            history.append(SamplingStep(t, x, x0, bottleneck))
        if i + 1 == len(times):  # every rule ends at the estimate of the clean image
            x = x0
            break
        state, target = _State(levels[i], x, x0), levels[i + 1]
        if sampler == "heun":
            x = _heun_step(state, target, times[i + 1], estimate)
        elif sampler == "dpm++":
            x = _dpm_step(previous, state, target)
        else:
            x = _ddim_step(state, target, 1.0 if sampler == "ddpm" else eta, full_chain, unit_noise)
        previous = state
    return Samples(x, bottleneck, history if trajectory else None)


def count_evaluations(sampler: str, steps: int) -> int:
    """Return the number of denoiser calls of `steps` strides of a sampler."""
    return 2 * steps - 1 if sampler == "heun" else steps


def check_sampler(sampler: str, eta: float = 0.0) -> None:
    """Raise ConfigError for an unknown sampler, or an eta that it cannot use."""
    if sampler not in SAMPLERS:
        raise ConfigError(f"sampler={sampler!r} is unknown; choose one of {', '.join(SAMPLERS)}")
    if not 0 <= eta <= 1:
        raise ConfigError(f"eta={eta} is outside [0, 1]; 0 adds no noise, 1 as much as ddpm")
    if sampler != "ddim" and eta:
        raise ConfigError(f"eta={eta} needs sampler='ddim'; leave it out with {sampler!r}")


def sampling_times(schedule: Schedule, sampler: str, t_start: int, steps: int | None) -> list[int]:
    """Return the decreasing times at which a sampler calls the denoiser. Arguments as of :func:`sample`.

    Raises:
        ConfigError: steps or t_start out of range.
    """
    if not 1 <= t_start <= schedule.steps:
        raise ConfigError(f"t_start={t_start} is outside the schedule; use 1 to {schedule.steps}")
    steps = t_start if steps is None else steps
    if not 1 <= steps <= t_start:
        raise ConfigError(f"steps={steps} is not possible from t_start={t_start}; use 1 to {t_start}")
    return (snr_spaced_times if sampler == "dpm++" else evenly_spaced_times)(schedule, t_start, steps)


def evenly_spaced_times(schedule: Schedule, t_start: int, steps: int) -> list[int]:
    """Return `steps` distinct, evenly spaced, decreasing times from t_start - 1 to 0.

    On a "flow" schedule they end one stride above the clean image instead, so that all strides of the path are equal.
    """
    if schedule.kind == "flow":
        grid = torch.linspace(t_start, 0, steps + 1, dtype=torch.float64)[:-1] - 1
    else:
        grid = torch.linspace(t_start - 1, 0, steps, dtype=torch.float64)
    return grid.round().long().tolist()


def snr_spaced_times(schedule: Schedule, t_start: int, steps: int) -> list[int]:
    """Return `steps` distinct decreasing times from t_start - 1 to 0, as near as possible to equal strides of log SNR.

    Log SNR is clamped to `MIN_LOG_SNR`, because a path may begin at -inf. It changes fastest near time 0: where equal
    strides need more times than there are, every time is used.
    """
    log_snr = torch.log(schedule.signals / schedule.sigmas)[:t_start]
    grid = torch.linspace(float(log_snr[-1].clamp_min(MIN_LOG_SNR)), float(log_snr[0]), steps, dtype=torch.float64)
    nearest = (log_snr - grid[:, None]).abs().argmin(1).tolist()
    times = [t_start - 1]
    for i in range(1, steps):
        remaining = steps - 1 - i
        times.append(max(min(nearest[i], times[-1] - 1), remaining))
    return times


def _ddim_step(
    state: _State, target: NoiseLevel, eta: float, full_chain: bool, unit_noise: Callable[[], Tensor]
) -> Tensor:
    """Take a step of DDPM or DDIM: part of the noise at the next level is fresh, the rest is the estimated noise.

    At eta 1 the mean is that of the posterior (Song et al. 2021, section 4.1).
    """
    a, s = state.level
    added = s**2 - (a / target.signal * target.sigma) ** 2  # the variance of x_t given x_r; beta on full VP chains
    fresh = eta**2 * added * (target.sigma / s) ** 2
    x = target.signal * state.x0 + math.sqrt(target.sigma**2 - fresh) * state.eps
    # beta is the upper and the posterior's variance the lower bound of the reverse one (Ho et al. 2020, section 3.2).
    # Over a long stride beta exceeds even the noise of the target level: the images would stay grainy.
    variance = added if full_chain else fresh
    return x + math.sqrt(variance) * unit_noise() if variance > 0 else x


def _heun_step(
    state: _State, target: NoiseLevel, t: int, estimate: Callable[[Tensor, int], tuple[Tensor, Any]]
) -> Tensor:
    """Apply the trapezoid rule to x / (a + s) along tau; t is the time of the target level.

    Divided by a + s every path is straight, (1 - tau) x0 + tau eps, so one rule serves all schedules.
    """
    euler = target.signal * state.x0 + target.sigma * state.eps
    velocity = (state.velocity + _State(target, euler, estimate(euler, t)[0]).velocity) / 2
    straight = state.x / (state.level.signal + state.level.sigma) + (target.tau - state.level.tau) * velocity
    return (target.signal + target.sigma) * straight


def _dpm_step(previous: _State | None, state: _State, target: NoiseLevel) -> Tensor:
    """Take a step of DPM-Solver++(2M): x0 is extrapolated along log SNR to the middle of the stride."""
    x0 = state.x0
    if previous is not None:
        ratio = (target.log_snr - state.level.log_snr) / (state.level.log_snr - previous.level.log_snr)
        x0 = x0 + ratio / 2 * (x0 - previous.x0)  # after pure noise, at log SNR -inf, the ratio is 0: first order
    ratio = target.sigma / state.level.sigma
    return ratio * state.x + (target.signal - ratio * state.level.signal) * x0
