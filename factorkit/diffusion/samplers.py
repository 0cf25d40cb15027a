"""Drawing images from a denoiser: ancestral sampling (DDPM) and its less noisy relatives (DDIM)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from factorkit.diffusion.denoiser import Denoiser
from factorkit.diffusion.objective import to_x0
from factorkit.diffusion.schedule import Schedule
from factorkit.errors import ConfigError


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
    clip: bool = True,
    progress: bool = False,
    trajectory: bool = False,
) -> Samples:
    """Draw images of `shape` [B,C,H,W] in [-1, 1] from a denoiser trained with `schedule` and `prediction`.

    denoiser: called as denoiser(x_t [B,C,H,W], t int64 [B]) -> (prediction [B,C,H,W], bottleneck); put it in eval mode.
    sampler: "ddpm" is ancestral (Ho et al. 2020, algorithm 2): over all times the noise has variance beta_t; with
        fewer `steps` each stride takes the mean and the variance of its own posterior q(x_r | x_t, x_0). "ddim" adds
        no noise at eta 0 (Song et al. 2021, eq. 12) and is strided "ddpm" at eta 1.
    steps: how many times the denoiser is called, on an even grid from t_start - 1 down to 0; None is all of them.
    t_start: for a model trained on times [0, t_start) only: where to begin; None is the schedule's length.
    seed, generator: the same seed gives the same images on the same machine; a generator is used in its place.
    device: where to compute; None is the schedule's device. The schedule must lie there too.
    x_start: the image to begin with, taken to be at level t_start - 1; None draws noise of that level's variance.
    shared_noise: draw one image's noise and use it for every image, so that an image depends on its own start alone,
        not on its place among others.
    clip: keep each estimate of the clean image within [-1, 1].
    trajectory: also return every step; all of them stay in memory, so ask for few steps.

    Raises ConfigError for an unknown sampler or prediction, for steps or t_start out of range, for eta outside
    [0, 1] or given to "ddpm", and for an x_start of another shape.
    """
    t_start = schedule.steps if t_start is None else t_start
    times = _time_grid(schedule, t_start, steps)
    _check_sampler(sampler, eta)
    device = torch.device(schedule.device if device is None else device)
    if generator is None:
        generator = torch.Generator(device).manual_seed(seed)

    def unit_noise() -> Tensor:
        drawn = (1 if shared_noise else shape[0], *shape[1:])
        return torch.randn(drawn, generator=generator, device=generator.device).to(device).expand(tuple(shape))

    if x_start is None:
        x = unit_noise() * math.sqrt(1 - schedule.alpha_bars[t_start - 1])
    elif tuple(x_start.shape) != tuple(shape):
        raise ConfigError(f"x_start has shape {tuple(x_start.shape)}, but images of shape {tuple(shape)} are asked for")
    else:
        x = x_start.to(device, torch.float32)

    if sampler == "ddpm":
        eta = 1.0
    full_chain = sampler == "ddpm" and len(times) == t_start
    steps_taken: list[Step] = []
    bottleneck: object = None
    for i, t in enumerate(tqdm(times, desc="sampling", disable=not progress)):
        t_batch = torch.full((shape[0],), t, dtype=torch.int64, device=device)
        out, bottleneck = denoiser(x, t_batch)
        x0 = to_x0(prediction, schedule, x, out.float(), t_batch)
        if clip:
            x0 = x0.clamp(-1, 1)
        if trajectory:
            steps_taken.append(Step(t, x, x0, bottleneck))
        if i + 1 == len(times):
            x = x0
            break

        # One rule serves both samplers: of the noise due at the next level, the share `fresh` is drawn anew and the
        # rest is the estimated noise. At eta 1 the mean is that of the posterior (Song et al. 2021, section 4.1).
        ab, ab_next = float(schedule.alpha_bars[t]), float(schedule.alpha_bars[times[i + 1]])
        beta = 1 - ab / ab_next
        posterior = (1 - ab_next) / (1 - ab) * beta
        fresh = eta**2 * posterior
        eps = (x - math.sqrt(ab) * x0) / math.sqrt(1 - ab)
        x = math.sqrt(ab_next) * x0 + math.sqrt(1 - ab_next - fresh) * eps
        # beta bounds the reverse variance from above and the posterior's from below (Ho et al. 2020, section 3.2).
        # Over a long stride beta exceeds even the noise of the level arrived at: the images would keep its grain.
        variance = beta if full_chain else fresh
        if variance > 0:
            x = x + math.sqrt(variance) * unit_noise()
    return Samples(x, bottleneck, steps_taken if trajectory else None)


def _time_grid(schedule: Schedule, t_start: int, steps: int | None) -> list[int]:
    """`steps` distinct times, evenly spaced, from t_start - 1 to 0, both included (of one step, the first)."""
    if not 1 <= t_start <= schedule.steps:
        raise ConfigError(f"t_start={t_start} lies outside the schedule; use 1 to {schedule.steps}")
    steps = t_start if steps is None else steps
    if not 1 <= steps <= t_start:
        raise ConfigError(f"steps={steps} is not possible from t_start={t_start}; use 1 to {t_start}")
    return torch.linspace(t_start - 1, 0, steps, dtype=torch.float64).round().long().tolist()


def _check_sampler(sampler: str, eta: float) -> None:
    if sampler not in ("ddpm", "ddim"):
        raise ConfigError(f"sampler {sampler!r} is not known; use 'ddpm' or 'ddim'")
    if not 0 <= eta <= 1:
        raise ConfigError(f"eta={eta} lies outside [0, 1]; 0 adds no noise, 1 as much as ddpm")
    if sampler == "ddpm" and eta:
        raise ConfigError("eta belongs to sampler='ddim'; leave it out with 'ddpm'")
