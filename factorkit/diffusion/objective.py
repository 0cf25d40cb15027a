"""Training targets of the network and weights of its error.

With a = a_t and s = s_t of the schedule, every parametrisation in use is a linear mix of the two unknowns,

    x_t = a x0 + s eps,        out = p x0 + q eps,

so a pair (p, q) as a function of (a, s) defines it: the training target is the second line, and the two lines solved
for x0 and eps recover both. A new parametrisation is one more line of `PREDICTIONS`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from factorkit.diffusion.schedule import Schedule
from factorkit.utils.errors import ConfigError

PREDICTIONS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "eps": lambda a, s: (torch.zeros_like(a), torch.ones_like(a)),  # Ho et al. 2020, eq. 12
    "v": lambda a, s: (-s, a),  # Salimans & Ho 2022, section 4
    "x0": lambda a, s: (torch.ones_like(a), torch.zeros_like(a)),  # the clean image itself
    "flow": lambda a, s: (-torch.ones_like(a), torch.ones_like(a)),  # velocity of the straight path, Lipman et al. 2023
}


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


def to_eps(prediction: str, schedule: Schedule, x_t: Tensor, out: Tensor, t: Tensor) -> Tensor:
    """Convert the network's output `out` for x_t at times t [B] to the unit noise [B, C, H, W]."""
    a, s, p, q = _coefficients(prediction, schedule, t)
    return (a * out - p * x_t) / (a * q - s * p)


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
