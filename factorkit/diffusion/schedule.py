"""The forward process and the training target: what a network sees at time t and what it predicts.

With a = a_t and s = s_t of the schedule, every parametrisation in use is a linear mix of the two unknowns,

    x_t = a x0 + s eps,        out = p x0 + q eps,

so a pair (p, q) as a function of (a, s) defines it: the training target is the second line, and the two lines solved
for x0 and eps recover both. A new parametrisation is one more line of `PREDICTIONS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from factorkit.utils.errors import ConfigError

SCHEDULES = ("linear", "cosine", "flow")

PREDICTIONS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "eps": lambda a, s: (torch.zeros_like(a), torch.ones_like(a)),  # Ho et al. 2020, eq. 12
    "v": lambda a, s: (-s, a),  # Salimans & Ho 2022, section 4
    "x0": lambda a, s: (torch.ones_like(a), torch.zeros_like(a)),  # the clean image itself
    "flow": lambda a, s: (-torch.ones_like(a), torch.ones_like(a)),  # velocity of the straight path, Lipman et al. 2023
}


class Schedule:
    """The path from image to noise, x_t = a_t x_0 + s_t eps, at the integer times 0..steps-1.

    Time 0 is the least noisy level, not the clean image. The kinds:

    "linear": variance-preserving, a = sqrt(ab), s = sqrt(1 - ab), ab = prod(1 - beta) (Ho et al. 2020, eq. 4). beta
        runs linearly from 1e-4 to 0.02 for 1000 steps and is multiplied by 1000 / steps otherwise, so that every length
        ends at about the same noise.
    "cosine": variance-preserving, ab = cos^2((t/T + 0.008) / 1.008 * pi/2), beta at most 0.999 (Nichol & Dhariwal 2021,
        eq. 17).
    "flow": the straight path of flow matching (Lipman et al. 2023), a = 1 - tau, s = tau, tau = (t + 1) / steps. The
        last time is pure noise.

    The tables `signals`, `sigmas` (a and s) and `alpha_bars` (a^2 / (a^2 + s^2)), all [steps], are float64 on the CPU,
    for samplers that need exact ratios; the tables that training indexes are float32 on `device`.

    Raises:
        ConfigError: an unknown kind, fewer than one step, or a linear schedule of 20 steps or fewer, whose beta would
            reach 1.
    """

    def __init__(self, steps: int = 1000, kind: str = "linear", device: torch.device | str = "cpu") -> None:
        if kind not in SCHEDULES:
            raise ConfigError(f"schedule={kind!r} is unknown; choose one of {', '.join(SCHEDULES)}")
        if steps < 1:
            raise ConfigError(f"a schedule of {steps} steps has no times; use 1 step or more")
        self.steps, self.kind = steps, kind
        with torch.device("cpu"):  # whatever the default device is
            if kind == "flow":
                self.sigmas = torch.arange(1, steps + 1, dtype=torch.float64) / steps
                self.signals = 1 - self.sigmas
                self.alpha_bars = self.signals**2 / (self.signals**2 + self.sigmas**2)
            else:
                self.alpha_bars = torch.cumprod(1 - _betas(steps, kind), 0)
                self.signals, self.sigmas = self.alpha_bars.sqrt(), (1 - self.alpha_bars).sqrt()
        self.to(device)

    def to(self, device: torch.device | str) -> Schedule:
        """Move the tables to `device` in place and return the schedule."""
        self.device = torch.device(device)
        # 1 - ab is rounded after the subtraction: at t = 0 the float32 ab has lost 3 of its digits.
        self._alpha_bar = self.alpha_bars.to(self.device, torch.float32)
        self._signal = self.signals.to(self.device, torch.float32)
        self._sigma = self.sigmas.to(self.device, torch.float32)
        return self

    def alpha_bar(self, t: Tensor) -> Tensor:
        """Return the share of the variance that is signal, ab_t [B, 1, 1, 1] in [0, 1), for integer t [B]."""
        return _per_image(self._alpha_bar, t)

    def signal(self, t: Tensor) -> Tensor:
        """Return the factor of the clean image, a_t [B, 1, 1, 1], for integer t [B]."""
        return _per_image(self._signal, t)

    def sigma(self, t: Tensor) -> Tensor:
        """Return the factor of the noise, s_t [B, 1, 1, 1], for integer t [B]."""
        return _per_image(self._sigma, t)

    def noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return x_t [B, C, H, W] for clean images x0 and unit noise eps at integer times t [B]."""
        return self.signal(t) * x0 + self.sigma(t) * eps

    def find_matching_time(self, t: int, other: Schedule) -> int:
        """Return the time whose noise-to-signal ratio is nearest to that of `other` at its time t."""
        log_ratio = math.log(other.sigmas[t] / other.signals[t])
        return int((torch.log(self.sigmas / self.signals) - log_ratio).abs().argmin())


def _betas(steps: int, kind: str) -> Tensor:
    if kind == "cosine":
        angle = (torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2
        alpha_bars = angle.cos().square()
        return (1 - alpha_bars[1:] / alpha_bars[:-1]).clamp_max(0.999)
    if steps <= 20:
        raise ConfigError(
            f"a linear schedule of {steps} steps would need beta >= 1; use more than 20 steps, or 'cosine' or 'flow'"
        )
    scale = 1000 / steps
    return torch.linspace(1e-4 * scale, 0.02 * scale, steps, dtype=torch.float64)


def _per_image(table: Tensor, t: Tensor) -> Tensor:
    return table[t].view(-1, 1, 1, 1)


def check_objective(prediction: str, schedule: str) -> None:
    """Raise ConfigError for an unknown prediction, or one that does not determine the image on this schedule."""
    if prediction not in PREDICTIONS:
        raise ConfigError(f"prediction={prediction!r} is unknown; choose one of {', '.join(PREDICTIONS)}")
    if prediction == "eps" and schedule == "flow":
        raise ConfigError(
            "prediction='eps' cannot work with schedule='flow': at its last time, pure noise, eps does not determine "
            "the image; use prediction='flow', 'v' or 'x0', or schedule='linear' or 'cosine'"
        )


def training_target(prediction: str, schedule: Schedule, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Compute the target [B, C, H, W] of the network for clean images x0, unit noise eps and integer times t [B].

    Raises:
        ConfigError: `prediction` is not one of `PREDICTIONS`.
    """
    _, _, p, q = _coefficients(prediction, schedule, t)
    return p * x0 + q * eps


def to_x0(prediction: str, schedule: Schedule, x_t: Tensor, out: Tensor, t: Tensor) -> Tensor:
    """Convert the network's output `out` for x_t at times t [B] to the clean image [B, C, H, W]."""
    a, s, p, q = _coefficients(prediction, schedule, t)
    return (q * x_t - s * out) / (a * q - s * p)


def denoising_loss(out: Tensor, target: Tensor) -> Tensor:
    """Compute the mean squared error of each sample [B] over channels and pixels, in float32 for any input type."""
    return (out.float() - target.float()).square().flatten(1).mean(1)


def loss_weight(schedule: Schedule, t: Tensor, power: float | Tensor) -> Tensor:
    """Compute the loss weight (1 - ab_t)^power [B]: power 0 weighs all times alike, 1 favours noisy (coarse) ones.

    `power` may be a tensor on the schedule's device, so that a captured CUDA graph follows its changes.
    """
    return (1 - schedule.alpha_bar(t)).flatten() ** power


def min_snr_weight(prediction: str, schedule: Schedule, t: Tensor, gamma: float = 5.0) -> Tensor:
    """Compute the weight [B] that makes each loss min(SNR, gamma) times the squared error in x0 (Hang et al. 2023).

    SNR = a^2 / s^2. For a given x_t an error in x0 is (s p - a q) / s times the error in the output, so the weight is
    min(SNR, gamma) s^2 / (a q - s p)^2: min(SNR, gamma) over SNR for eps, over SNR + 1 for v, over 1 for x0.
    """
    a, s, p, q = (c.flatten() for c in _coefficients(prediction, schedule, t))
    return torch.minimum(a.square(), gamma * s.square()) / (a * q - s * p).square()


def coarse_to_fine_power(step: int | Tensor, start: int, end: int) -> Tensor:
    """Compute the power for `loss_weight` at a training step: 1 until `start`, then linearly down to 0 at `end`.

    Early training thus favours noisy times, where only coarse structure matters. The result is on the device of `step`,
    so a captured CUDA graph follows it.

    Raises:
        ConfigError: `end` is before `start`.
    """
    if end < start:
        raise ConfigError(f"the coarse-to-fine weight cannot end at step {end}, before its start at step {start}")
    return torch.as_tensor((end - step) / max(1, end - start)).clamp(0, 1)


def _coefficients(prediction: str, schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_objective(prediction, "")
    a, s = schedule.signal(t), schedule.sigma(t)
    return a, s, *PREDICTIONS[prediction](a, s)
