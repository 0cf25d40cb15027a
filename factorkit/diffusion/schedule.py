"""The forward process: how much signal and how much noise an image holds at time t."""

from __future__ import annotations

import torch
from torch import Tensor

from factorkit.errors import ConfigError


class Schedule:
    """Variance-preserving noising with linear beta, x_t = sqrt(ab_t) x_0 + sqrt(1 - ab_t) eps (Ho et al. 2020, eq. 4).

    Times are the integers 0..steps-1: 0 is the least noisy level, not the clean image. beta runs linearly from 1e-4 to
    0.02 for 1000 steps and is multiplied by 1000 / steps otherwise, so that every length ends at about the same noise.

    The tables are computed in float64. `alpha_bars` [steps] stays so, on the CPU, for samplers that need exact ratios;
    the tables that training indexes are float32 and live on `device`.

    Raises ConfigError for an unknown kind, or for 20 steps or fewer, where the scaled beta would reach 1.
    """

    def __init__(self, steps: int = 1000, kind: str = "linear", device: torch.device | str = "cpu") -> None:
        if kind != "linear":
            raise ConfigError(f"schedule {kind!r} is not known; use 'linear'")
        if steps <= 20:
            raise ConfigError(f"a linear schedule of {steps} steps would need beta >= 1; use more than 20 steps")
        self.steps, self.kind = steps, kind
        scale = 1000 / steps
        beta = torch.linspace(1e-4 * scale, 0.02 * scale, steps, dtype=torch.float64)
        self.alpha_bars = torch.cumprod(1 - beta, 0)
        self.to(device)

    def to(self, device: torch.device | str) -> Schedule:
        """Move the tables to `device`, in place; returns the schedule itself."""
        self.device = torch.device(device)
        # 1 - ab must be rounded after the subtraction: at t = 0 the float32 ab has lost 3 of its digits.
        self._alpha_bar = self.alpha_bars.to(self.device, torch.float32)
        self._signal = self.alpha_bars.sqrt().to(self.device, torch.float32)
        self._sigma = (1 - self.alpha_bars).sqrt().to(self.device, torch.float32)
        return self

    def alpha_bar(self, t: Tensor) -> Tensor:
        """The share of the variance that is signal, ab_t [B,1,1,1] in (0, 1), for integer t [B] in [0, steps)."""
        return _per_image(self._alpha_bar, t)

    def signal(self, t: Tensor) -> Tensor:
        """The factor of the clean image, sqrt(ab_t) [B,1,1,1], for integer t [B]."""
        return _per_image(self._signal, t)

    def sigma(self, t: Tensor) -> Tensor:
        """The factor of the noise, sqrt(1 - ab_t) [B,1,1,1], for integer t [B]."""
        return _per_image(self._sigma, t)

    def noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t [B,C,H,W] from clean images x0 and unit noise eps of the same shape, at integer times t [B]."""
        return self.signal(t) * x0 + self.sigma(t) * eps


def _per_image(table: Tensor, t: Tensor) -> Tensor:
    return table[t].view(-1, 1, 1, 1)
