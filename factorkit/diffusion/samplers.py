"""Drawing images from a denoiser: ancestral (DDPM), and along the flow of probability (DDIM, Heun, DPM-Solver++)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from factorkit.diffusion.denoiser import Denoiser
from factorkit.diffusion.objective import check_objective, to_x0
from factorkit.diffusion.schedule import Schedule
from factorkit.diffusion.times import Level, check_steps, even_snr, even_times
from factorkit.utils.errors import ConfigError

SAMPLERS = ("ddpm", "ddim", "euler", "heun", "dpm++")


class Step(NamedTuple):
    """One step of a trajectory: what the denoiser saw, and what it made of it."""

    t: int
    x_t: Tensor  # [B,C,H,W]
    x0: Tensor  # [B,C,H,W], the clean image as estimated from x_t
    bottleneck: object


class Samples(NamedTuple):
    """Generated images [B,C,H,W], the bottleneck of the last step, and every step from noise to image if asked for."""

    images: Tensor
    bottleneck: object
    trajectory: list[Step] | None


class _Draw(NamedTuple):
    """What every rule may use: the network as an estimator, and fresh noise."""

    estimate: Callable[[Tensor, int], tuple[Tensor, object]]  # x_t, t -> x0, bottleneck
    unit_noise: Callable[[], Tensor]
    eta: float
    full_chain: bool


class _Known(NamedTuple):
    """A level of the trajectory with its image and the estimates made there."""

    level: Level
    x: Tensor
    x0: Tensor

    @property
    def eps(self) -> Tensor:
        return (self.x - self.level.signal * self.x0) / self.level.sigma

    @property
    def velocity(self) -> Tensor:
        """Of x / (a + s) along tau: the flow matching velocity."""
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
    """Draw images of `shape` [B,C,H,W] in [-1, 1] from a denoiser trained with `schedule` and `prediction`.

    Every sampler goes with every schedule and prediction, as what the network says is first turned into x0 and eps.

    denoiser: called as denoiser(x_t [B,C,H,W], t int64 [B]) -> (prediction [B,C,H,W], bottleneck); put it in eval mode.
    sampler: "ddpm" is ancestral (Ho et al. 2020, algorithm 2): over all times the noise has variance beta_t; with
        fewer `steps` each stride takes the mean and the variance of its own posterior q(x_r | x_t, x_0). "ddim" adds
        no noise at eta 0 (Song et al. 2021, eq. 12) and is strided "ddpm" at eta 1. "euler" is the name flow matching
        has for "ddim" at eta 0. "heun" corrects each Euler step but the last by the slope where it arrives (Karras et
        al. 2022, algorithm 1): second order, two calls of the network a step. "dpm++" is DPM-Solver++(2M) (Lu et al.
        2022, algorithm 2): second order from the previous step's estimate, one call a step.
    steps: how many strides to take, from t_start - 1 down to the clean image; None is every time there is. The times
        of the strides are `factorkit.diffusion.times`'.
    t_start: for a model trained on times [0, t_start) only: where to begin; None is the schedule's length.
    seed, generator: the same seed gives the same images on the same machine; a generator is used in its place.
    device: where to compute; None is the schedule's device. The schedule must lie there too.
    x_start: the image to begin with, taken to be at level t_start - 1; None draws noise of that level's variance.
    shared_noise: draw one image's noise and use it for every image, so that an image depends on its own start alone,
        not on its place among others.
    rows: compute only these of the images, each the one that it is among all of them; `shape` and `x_start` are theirs
        all. For processes that share the work.
    clip: keep each estimate of the clean image within [-1, 1].
    trajectory: also return every step; all of them stay in memory, so ask for few steps.

    Raises ConfigError for an unknown sampler or prediction, for "eps" on a "flow" schedule, for steps or t_start out of
    range, for eta outside [0, 1] or given to another sampler than "ddim", and for an x_start of another shape.
    """
    check_objective(prediction, schedule.kind)
    check_sampler(sampler, eta)
    t_start = schedule.steps if t_start is None else t_start
    steps = check_steps(schedule, t_start, steps)
    times = (even_snr if sampler == "dpm++" else even_times)(schedule, t_start, steps)
    levels = [Level.of(schedule, t) for t in times]
    device = torch.device(schedule.device if device is None else device)
    rows = slice(None) if rows is None else rows
    if generator is None:
        generator = torch.Generator(device).manual_seed(seed)

    def unit_noise() -> Tensor:
        drawn = (1 if shared_noise else shape[0], *shape[1:])
        noise = torch.randn(drawn, generator=generator, device=generator.device).to(device)
        return noise.expand(tuple(shape))[rows]

    def estimate(x: Tensor, t: int) -> tuple[Tensor, object]:
        t_batch = torch.full((len(x),), t, dtype=torch.int64, device=device)
        out, bottleneck = denoiser(x, t_batch)
        x0 = to_x0(prediction, schedule, x, out.float(), t_batch)
        return (x0.clamp(-1, 1) if clip else x0), bottleneck

    if x_start is None:
        x = unit_noise() * levels[0].sigma
    elif tuple(x_start.shape) != tuple(shape):
        raise ConfigError(f"x_start has shape {tuple(x_start.shape)}, but images of shape {tuple(shape)} are asked for")
    else:
        x = x_start[rows].to(device, torch.float32)

    full_chain = sampler == "ddpm" and len(times) == t_start
    draw = _Draw(estimate, unit_noise, 1.0 if sampler == "ddpm" else eta, full_chain)
    taken: list[Step] = []
    before: _Known | None = None
    for i, t in enumerate(tqdm(times, desc="sampling", disable=not progress)):
        x0, bottleneck = estimate(x, t)
        if trajectory:
            taken.append(Step(t, x, x0, bottleneck))
        if i + 1 == len(times):  # on to the clean image, where every rule says the same
            x = x0
            break
        now, then = _Known(levels[i], x, x0), levels[i + 1]
        if sampler == "heun":
            x = _heun(now, then, times[i + 1], draw)
        elif sampler == "dpm++":
            x = _two_step(before, now, then)
        else:
            x = _renoised(now, then, draw)
        before = now
    return Samples(x, bottleneck, taken if trajectory else None)


def evaluations(sampler: str, steps: int) -> int:
    """How often `steps` strides of a sampler call the denoiser."""
    return 2 * steps - 1 if sampler == "heun" else steps


def check_sampler(sampler: str, eta: float = 0.0) -> None:
    """Raise ConfigError for a sampler there is not, or an eta that it cannot take."""
    if sampler not in SAMPLERS:
        raise ConfigError(f"sampler {sampler!r} is not known; use one of {', '.join(SAMPLERS)}")
    if not 0 <= eta <= 1:
        raise ConfigError(f"eta={eta} lies outside [0, 1]; 0 adds no noise, 1 as much as ddpm")
    if sampler != "ddim" and eta:
        raise ConfigError(f"eta belongs to sampler='ddim'; leave it out with {sampler!r}")


def _renoised(now: _Known, then: Level, draw: _Draw) -> Tensor:
    """DDPM, DDIM and Euler. Of the noise due at the next level, a share is drawn anew and the rest is the estimated
    noise. At eta 1 the mean is that of the posterior (Song et al. 2021, section 4.1)."""
    a, s = now.level
    added = s**2 - (a / then.signal * then.sigma) ** 2  # the variance of x_t given x_r; beta on full VP chains
    fresh = draw.eta**2 * added * (then.sigma / s) ** 2
    x = then.signal * now.x0 + math.sqrt(then.sigma**2 - fresh) * now.eps
    # beta bounds the reverse variance from above and the posterior's from below (Ho et al. 2020, section 3.2).
    # Over a long stride beta exceeds even the noise of the level arrived at: the images would keep its grain.
    variance = added if draw.full_chain else fresh
    return x + math.sqrt(variance) * draw.unit_noise() if variance > 0 else x


def _heun(now: _Known, then: Level, t: int, draw: _Draw) -> Tensor:
    """The trapezoid rule for x / (a + s) along tau; t is the time of `then`.

    Divided by a + s every path is the straight one, (1 - tau) x0 + tau eps, so one rule serves all schedules.
    """
    guess = then.signal * now.x0 + then.sigma * now.eps  # Euler's
    there = _Known(then, guess, draw.estimate(guess, t)[0])
    slope = (now.velocity + there.velocity) / 2
    straight = now.x / (now.level.signal + now.level.sigma) + (then.tau - now.level.tau) * slope
    return (then.signal + then.sigma) * straight


def _two_step(before: _Known | None, now: _Known, then: Level) -> Tensor:
    """DPM-Solver++(2M): x0 extrapolated along log SNR to the middle of the stride; the first stride has no past."""
    x0 = now.x0
    if before is not None:
        ratio = (then.log_snr - now.level.log_snr) / (now.level.log_snr - before.level.log_snr)
        x0 = x0 + ratio / 2 * (x0 - before.x0)  # from pure noise, where log SNR is -inf, the ratio is 0: first order
    kept = then.sigma / now.level.sigma
    return kept * now.x + (then.signal - kept * now.level.signal) * x0
