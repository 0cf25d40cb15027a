"""Denoisers that know the answer: of a Gaussian and of a two-point distribution, on any schedule."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from factorkit.diffusion.denoiser import Denoised, Denoiser
from factorkit.diffusion.samplers import sample
from factorkit.diffusion.schedule import Schedule


class Optimal(Denoiser):
    """A denoiser that knows the posterior mean of the clean pixel; its bottleneck is the time it was called with."""

    def __init__(self, schedule: Schedule, prediction: str = "v") -> None:
        super().__init__()
        self.schedule, self.prediction_name, self.calls = schedule, prediction, []

    def posterior_mean(self, x: Tensor, a: Tensor, s: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x_t: Tensor, t: Tensor, cond: object = None) -> Denoised:
        a, s = (table[t].view(-1, 1, 1, 1) for table in (self.schedule.signals, self.schedule.sigmas))
        x = x_t.double()
        x0 = self.posterior_mean(x, a, s)
        eps = (x - a * x0) / s
        self.calls.append(int(t[0]))
        said = {"eps": eps, "v": a * eps - s * x0, "x0": x0, "flow": eps - x0}
        return Denoised(said[self.prediction_name].float(), int(t[0]))


class Gaussian(Optimal):
    """Pixels are independent N(mu, sd^2)."""

    def __init__(self, schedule: Schedule, mu: float, sd: float, prediction: str = "v") -> None:
        super().__init__(schedule, prediction)
        self.mu, self.sd = mu, sd

    def posterior_mean(self, x: Tensor, a: Tensor, s: Tensor) -> Tensor:
        return self.mu + a * self.sd**2 / (a**2 * self.sd**2 + s**2) * (x - a * self.mu)

    def flow(self, x: Tensor, start: int, end: int | None) -> Tensor:
        """Where the flow of probability carries x from time `start` to time `end` (None: the clean image).

        x_t is N(a mu, a^2 sd^2 + s^2) at every time; a flow in one dimension carries quantiles to quantiles.
        """
        a, s = (float(table[start]) for table in (self.schedule.signals, self.schedule.sigmas))
        b, r = (1.0, 0.0) if end is None else (float(self.schedule.signals[end]), float(self.schedule.sigmas[end]))
        widths = math.hypot(b * self.sd, r) / math.hypot(a * self.sd, s)
        return b * self.mu + widths * (x.double() - a * self.mu)


class TwoPoints(Optimal):
    """Pixels are independent, +value with probability p and -value otherwise."""

    def __init__(self, schedule: Schedule, value: float, p: float, prediction: str = "v") -> None:
        super().__init__(schedule, prediction)
        self.value, self.log_odds = value, math.log(p / (1 - p))

    def posterior_mean(self, x: Tensor, a: Tensor, s: Tensor) -> Tensor:
        return self.value * torch.tanh(self.log_odds / 2 + a * self.value * x / s**2)


def draw(model: Optimal, shape=(1, 1, 256, 256), **options):
    options = {"schedule": model.schedule, "prediction": model.prediction_name, "clip": False} | options
    return sample(model, shape, **options)


def moments(x: Tensor) -> tuple[float, float]:
    return x.double().mean().item(), x.double().std().item()
