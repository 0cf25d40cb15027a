"""At which of a schedule's times a sampler looks."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from factorkit.diffusion.schedule import Schedule
from factorkit.utils.errors import ConfigError

NOISE = -5.0  # log(a / s) below which an image tells nothing; a linear schedule ends there


class Level(NamedTuple):
    """Where a path stands: x = signal x0 + sigma eps, exact."""

    signal: float
    sigma: float

    @classmethod
    def of(cls, schedule: Schedule, t: int) -> Level:
        """The level at time t."""
        return cls(float(schedule.signals[t]), float(schedule.sigmas[t]))

    @property
    def tau(self) -> float:
        """The place on the straight path: 0 is the clean image, 1 pure noise."""
        return self.sigma / (self.signal + self.sigma)

    @property
    def log_snr(self) -> float:
        """log(a / s), half of the logarithm of SNR; -inf for pure noise."""
        return math.log(self.signal / self.sigma) if self.signal else -math.inf


def check_steps(schedule: Schedule, t_start: int, steps: int | None) -> int:
    """The number of strides, None being all. Raises ConfigError where t_start or steps cannot be."""
    if not 1 <= t_start <= schedule.steps:
        raise ConfigError(f"t_start={t_start} lies outside the schedule; use 1 to {schedule.steps}")
    steps = t_start if steps is None else steps
    if not 1 <= steps <= t_start:
        raise ConfigError(f"steps={steps} is not possible from t_start={t_start}; use 1 to {t_start}")
    return steps


def even_times(schedule: Schedule, t_start: int, steps: int) -> list[int]:
    """`steps` distinct times, evenly spaced, the first t_start - 1 and falling.

    They end at 0 (of one step, the first is all). On a "flow" schedule they end one stride above the clean image
    instead, so that all strides of the straight path are equal.
    """
    if schedule.kind == "flow":
        grid = torch.linspace(t_start, 0, steps + 1, dtype=torch.float64)[:-1] - 1
    else:
        grid = torch.linspace(t_start - 1, 0, steps, dtype=torch.float64)
    return grid.round().long().tolist()


def even_snr(schedule: Schedule, t_start: int, steps: int) -> list[int]:
    """`steps` distinct times from t_start - 1 to 0 as near as whole times come to equal strides of log SNR.

    What is noisier than `NOISE` counts as just as noisy: a path may begin at log SNR -inf. Near time 0 log SNR changes
    fastest: where it asks for more times than there are, each of them is taken.
    """
    log_snr = torch.log(schedule.signals / schedule.sigmas)[:t_start]
    wanted = torch.linspace(float(log_snr[-1].clamp_min(NOISE)), float(log_snr[0]), steps, dtype=torch.float64)
    nearest = (log_snr - wanted[:, None]).abs().argmin(1).tolist()
    times = [t_start - 1]
    for i in range(1, steps):
        left = steps - 1 - i  # times still to come below this one
        times.append(max(min(nearest[i], times[-1] - 1), left))
    return times
